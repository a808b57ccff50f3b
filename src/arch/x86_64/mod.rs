//! x86_64: general registers, the xsave area, signal frames.

pub mod registers;
pub mod sigframe;
pub mod xsave;

pub use registers::{Delivery, restart, restart_for};
