//! One short file per command: settings, the call, the report.

pub mod check;
mod daemon;
pub mod demo;
pub mod dump;
pub mod image;
pub mod image_cache;
pub mod image_proxy;
mod report;
pub mod restore;
mod snapshots;
