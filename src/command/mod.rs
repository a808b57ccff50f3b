//! One short file per command: settings, the call, the report.

pub mod check;
pub mod demo;
pub mod dump;
pub mod image;
mod report;
pub mod restore;
