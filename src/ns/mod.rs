//! Namespaces: one file per kind, dump and restore side by side.

pub(crate) mod threads;
pub(crate) mod time;
