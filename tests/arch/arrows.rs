//! A module knows only modules below it, and no two know each other.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Tree, bracketed, leading_word, line_of, words};

/// From the top down; those of one layer stand side by side and may use each other one way. Names that are not
/// there yet are places kept for them.
const LAYERS: [&[&str]; 7] = [
    &["main", "cli"],
    &["command"],
    &["dump", "restore", "remote", "migrate"],
    &["files", "task", "mem", "cpuinfo", "ns", "cgroup", "net", "pages", "process_tree"],
    // What is asked for and what is told, as plain data, besides what knows one thing of the outside.
    &[
        "image",
        "tracee",
        "proc",
        "host",
        "settings",
        "stats",
        "log",
        "finding",
        "action",
        "exit",
        "interrupt",
        "ownership",
        "deadline",
        "progress",
        "kept",
        "pidfile",
        "view",
    ],
    &["arch"],
    &["sys"],
];

/// Single things that may be used from anywhere, and why.
const OPEN: [(&str, &str); 2] = [
    ("tracee::RemoteAddr", "a number that says whose address it is, no more"),
    (
        "image::pb",
        "plain data: registers and the xsave area are turned into messages where their layout is known",
    ),
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The module below the crate's root that a file belongs to, and how deep in it the file is.
fn place(path: &str) -> Option<(&str, usize)> {
    let path = path.strip_prefix("src/")?.strip_suffix(".rs")?;
    let path = path.strip_suffix("/mod").unwrap_or(path);
    let module = path.split('/').next()?;
    Some((module, path.split('/').count()))
}

/// Where in `code` a module below the root is named, and which: `crate::x`, `crate::{x, y::z}`, `super::super::x`.
fn named(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let roots = words(code, "crate").chain(words(code, "crtool")).filter_map(|at| {
        let len = leading_word(&code[at..]).len();
        code[at + len..].starts_with("::").then_some(at + len + 2)
    });
    let climbs = words(code, "super").filter_map(|at| {
        // Only the first of a chain, and only a chain that reaches the root from this depth.
        if code[..at].ends_with("super::") {
            return None;
        }
        let mut end = at;
        let mut steps = 0;
        while let Some(rest) = code[end..].strip_prefix("super::") {
            end = code.len() - rest.len();
            steps += 1;
        }
        (steps >= depth).then_some(end)
    });
    for at in roots.chain(climbs).collect::<Vec<_>>() {
        if code[at..].starts_with('{') {
            let group = &code[at + 1..at + bracketed(&code[at..]).max(2) - 1];
            let mut rest = group;
            while !rest.is_empty() {
                let trimmed = rest.trim_start();
                let whence = code.len() - code[at + 1 + group.len()..].len() - trimmed.len();
                found.push((whence, leading_word(trimmed).to_string()));
                let mut end = 0;
                while end < trimmed.len() && !trimmed[end..].starts_with(',') {
                    end += if trimmed[end..].starts_with('{') { bracketed(&trimmed[end..]) } else { 1 };
                }
                rest = trimmed.get(end + 1..).unwrap_or_default();
            }
        } else {
            found.push((at, leading_word(&code[at..]).to_string()));
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

fn upward(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    let modules: BTreeSet<&str> = tree.files.iter().filter_map(|f| Some(place(&f.path)?.0)).collect();
    let mut uses: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for file in tree.below("src/") {
        let Some((module, depth)) = place(&file.path) else { continue };
        if module == "lib" {
            continue;
        }
        let Some(own) = layer(module) else {
            findings.push(format!("{}: {module} has no layer; give it one in LAYERS", file.path));
            continue;
        };
        for (at, other) in named(&file.live, depth) {
            // What the root itself re-exports is no module; the compiler knows whether it exists.
            let is_open = OPEN.iter().any(|(path, _)| file.live[at..].starts_with(path));
            if other == module || is_open || !modules.contains(&other[..]) {
                continue;
            }
            let whence = format!("{}:{}", file.path, line_of(&file.live, at));
            match layer(&other) {
                Some(theirs) if theirs < own => {
                    findings.push(format!("{whence}: {module} uses {other}, which is above it"))
                }
                _ => {
                    uses.entry(module).or_default().entry(other).or_insert(whence);
                }
            }
        }
    }
    findings.extend(cycles(&uses));
    findings
}

/// Each pair of modules that can reach each other.
fn cycles(uses: &BTreeMap<&str, BTreeMap<String, String>>) -> Vec<String> {
    let reach = |from: &str| {
        let mut seen = BTreeSet::new();
        let mut open = vec![from.to_string()];
        while let Some(module) = open.pop() {
            for next in uses.get(&module[..]).into_iter().flat_map(BTreeMap::keys) {
                if seen.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        seen
    };
    let mut findings = Vec::new();
    for (module, others) in uses {
        for (other, whence) in others {
            if reach(other).contains(*module) {
                findings.push(format!("{whence}: {module} uses {other}, which leads back to {module}"));
            }
        }
    }
    findings
}

#[test]
fn point_down() {
    super::none(upward(&super::own()));
}

#[test]
fn own_arrows_are_found() {
    let tree = super::own();
    let command =
        tree.below("src/command").flat_map(|f| named(&f.live, 9)).any(|(_, name)| name == "settings");
    assert!(command, "a command is known to use its settings");
}

#[test]
fn breaches_are_seen() {
    let tree = Tree::from([
        ("src/lib.rs", "pub mod sys; pub use crate::dump::x;"),
        ("src/main.rs", "crtool::cli::main()"),
        ("src/cli/mod.rs", "use crate::command;"),
        ("src/command/mod.rs", "use crate::{\n  sys::{self, a, b}, dump::x,\n};"),
        (
            "src/dump/mod.rs",
            "use crate::mem;\n// crate::cli\n#[cfg(test)]\nmod tests { use crate::command; }",
        ),
        ("src/mem/mod.rs", "pub(crate) fn f() { crate::sys::f() }"),
        ("src/mem/area.rs", "use super::super::dump;\nuse super::dump as local;"),
        ("src/tracee/mod.rs", "use crate::{sys::{a, dump}, mem};"),
        ("src/proc/mod.rs", "use crate::image;"),
        ("src/image/mod.rs", "use crate::settings;"),
        ("src/settings.rs", "use crate::proc::maps;"),
        ("src/sys/mod.rs", "use crate::Unknown;"),
        ("src/other/mod.rs", ""),
        ("src/arch/mod.rs", "use crate::{sys::pod, tracee::RemoteAddr};\nuse crate::tracee::Remote;"),
    ]);
    let mut got = upward(&tree);
    got.sort();
    assert_eq!(
        got,
        [
            "src/arch/mod.rs:2: arch uses tracee, which is above it",
            "src/image/mod.rs:1: image uses settings, which leads back to image",
            "src/mem/area.rs:1: mem uses dump, which is above it",
            "src/other/mod.rs: other has no layer; give it one in LAYERS",
            "src/proc/mod.rs:1: proc uses image, which leads back to proc",
            "src/settings.rs:1: settings uses proc, which leads back to settings",
            "src/tracee/mod.rs:1: tracee uses mem, which is above it",
        ]
    );
}
