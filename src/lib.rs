//! crtool: checkpoint and restore of Linux process trees, in CRIU's image format.
//!
//! The library offers [`tracee`]: another process, typed. Everything else serves the program `crtool`; tests,
//! benchmarks and fuzz targets reach it with the feature `internals`, which promises nothing. Without that feature the
//! compiler sees what nobody uses (`cargo check --lib --bins`).

#![cfg_attr(not(feature = "internals"), allow(unreachable_pub))]

#[cfg(not(feature = "internals"))]
pub(crate) mod action;
#[cfg(not(feature = "internals"))]
pub(crate) mod arch;
#[doc(hidden)]
pub mod cli;
#[cfg(not(feature = "internals"))]
pub(crate) mod command;
#[cfg(not(feature = "internals"))]
pub(crate) mod cpuinfo;
#[cfg(not(feature = "internals"))]
pub(crate) mod deadline;
#[cfg(not(feature = "internals"))]
pub(crate) mod dump;
#[cfg(not(feature = "internals"))]
pub(crate) mod exit;
#[cfg(not(feature = "internals"))]
pub(crate) mod files;
#[cfg(not(feature = "internals"))]
pub(crate) mod finding;
#[cfg(not(feature = "internals"))]
pub(crate) mod host;
#[cfg(not(feature = "internals"))]
pub(crate) mod image;
#[cfg(not(feature = "internals"))]
pub(crate) mod interrupt;
pub(crate) mod kept;
#[cfg(not(feature = "internals"))]
pub(crate) mod log;
#[cfg(not(feature = "internals"))]
pub(crate) mod mem;
pub(crate) mod ns;
#[cfg(not(feature = "internals"))]
pub(crate) mod ownership;
#[cfg(not(feature = "internals"))]
pub(crate) mod pages;
#[cfg(not(feature = "internals"))]
pub(crate) mod pidfile;
#[cfg(not(feature = "internals"))]
pub(crate) mod proc;
pub(crate) mod process_tree;
pub(crate) mod progress;
#[cfg(not(feature = "internals"))]
pub(crate) mod remote;
#[cfg(not(feature = "internals"))]
pub(crate) mod restore;
#[cfg(not(feature = "internals"))]
pub(crate) mod settings;
#[cfg(not(feature = "internals"))]
pub(crate) mod stats;
#[cfg(not(feature = "internals"))]
pub(crate) mod sys;
#[cfg(not(feature = "internals"))]
pub(crate) mod task;
pub mod tracee;
#[cfg(not(feature = "internals"))]
pub(crate) mod view;

#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod action;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod arch;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod command;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod cpuinfo;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod deadline;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod dump;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod exit;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod files;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod finding;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod host;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod image;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod interrupt;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod log;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod mem;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod ownership;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod pages;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod pidfile;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod proc;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod remote;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod restore;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod settings;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod stats;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod sys;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod task;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod view;
