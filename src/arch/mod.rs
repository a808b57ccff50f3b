//! What differs from one processor architecture to the next.

#[cfg(test)]
pub(crate) mod target;
mod x86_64;

pub use x86_64::{Delivery, registers, restart, restart_for, sigframe, xsave};
