//! The house rules that a program can check, so that no reviewer has to: where `unsafe` may be, which way the arrows
//! between modules point, what code that reads outside input must not do, that no kind is forgotten in its
//! table, and what nothing may be called.
//!
//! Each rule is a function over a [`Tree`] of sources that returns what breaks it. Its first test runs it on this
//! crate, its second on a made-up tree that breaks it, so a rule that has stopped seeing anything fails.

mod arrows;
mod input;
mod names;
mod source;
mod tables;
mod unsafety;

use std::path::Path;

use source::Tree;

/// This crate's own sources.
fn own() -> Tree {
    let tree = Tree::read(Path::new(env!("CARGO_MANIFEST_DIR")));
    assert!(tree.files.iter().any(|f| f.path == "src/lib.rs"), "the sources are not where they should be");
    tree
}

/// Fails with one line for each finding.
fn none(findings: Vec<String>) {
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}
