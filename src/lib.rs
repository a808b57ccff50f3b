//! crtool: checkpoint and restore of Linux process trees, in CRIU's image format.

pub mod action;
pub mod arch;
pub mod cli;
pub mod command;
pub mod cpuinfo;
pub mod dump;
pub mod exit;
pub mod files;
pub mod finding;
pub mod host;
pub mod image;
pub mod interrupt;
pub mod log;
pub mod mem;
pub mod pages;
pub mod pidfile;
pub mod proc;
pub(crate) mod process_tree;
pub mod remote;
pub mod restore;
pub mod settings;
pub mod stats;
pub mod sys;
pub mod task;
pub mod tracee;
pub mod view;
