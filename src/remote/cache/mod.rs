//! The image-cache: takes snapshots from other hosts into memory and gives them to restores of this host.
//!
//! - [`run`](run()): the daemon as a whole.
//! - [`serve`]: the one thread, its sockets and its clock.
//! - [`source`]: a connection from a source: which frame may follow which; [`decode`] takes them out of its bytes.
//! - [`local`]: commands of this host.
//! - [`shelf`]: all snapshots, what may become of each, and the memory they take.
//! - [`snapshot`], [`memory`]: the images of one, and the bytes of one image.
//!
//! Nothing is ever written to a disk. What is not here: how sockets come to be, and how the daemon starts.

mod decode;
mod local;
mod memory;
mod run;
mod serve;
mod shelf;
mod snapshot;
mod source;
#[cfg(test)]
mod tests;

pub use run::run;
pub use serve::Cache;
