//! The `crtool` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    crtool::cli::main()
}
