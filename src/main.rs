//! The `crtool` binary.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: crtool::cli::Allocator = crtool::cli::Allocator;

fn main() -> ExitCode {
    crtool::cli::main()
}
