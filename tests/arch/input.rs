//! Code that reads what others wrote must not panic on it: no unwrap, expect, panic or plain indexing in live code.

use super::source::{Tree, is_word, line_of};

/// Where images, /proc, page contents and the wire are read.
const READERS: [&str; 4] = ["src/image", "src/proc", "src/pages", "src/remote"];

/// Calls that end the thread. `assert!` stays allowed: it is for what we ourselves promise.
const CALLS: [&str; 9] = [
    ".unwrap()",
    ".expect(",
    ".unwrap_err()",
    ".expect_err(",
    "panic!",
    "unreachable!",
    "todo!",
    "unimplemented!",
    "get_unchecked",
];

/// What stands there all the same: part of a line below a directory, and why nothing from outside reaches it.
const OURS: [(&str, &str, &str); 8] = [
    ("src/image/", ".expect(\"a message of ours below 4 GiB\")", "we write it; the limit is the format's"),
    ("src/image/", ".expect(\"descriptors made by our own build\")", "embedded in the program"),
    ("src/image/", ".expect(\"descriptors of our own build\")", "embedded in the program"),
    ("src/image/", "ALPHABET[six as usize]", "six bits of 64 letters"),
    ("src/image/", "Some(messages[0])", "a const fn over our own table"),
    ("src/image/", "&ROWS[self as usize]", "one row for each variant, in order"),
    ("src/image/", "types[n].worth_a_look", "an index that the same function made"),
    ("src/image/", "t.fields[number]", "an index that the same function made"),
];

/// Where opening something is not a parser's business.
const NO_IO: [&str; 4] = ["std::fs", "std::io", "std::net", "crate::sys"];

/// A type of plain numbers.
const NO_IO_BUT: &str = "crate::sys::pid::";

fn is_reader(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
}

fn panics(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    let readers = tree.files.iter().filter(|f| READERS.iter().any(|dir| is_reader(&f.path, dir)));
    for file in readers {
        let mut report = |at, what| {
            let line = line_of(&file.live, at);
            let text = file.text.lines().nth(line - 1).unwrap_or_default();
            if !OURS.iter().any(|(dir, part, _)| file.path.starts_with(dir) && text.contains(part)) {
                findings.push(format!("{}:{line}: {what}", file.path));
            }
        };
        for call in CALLS {
            for (at, _) in file.live.match_indices(call) {
                if call.starts_with('.') || at == 0 || !is_word(file.live.as_bytes()[at - 1]) {
                    report(at, call);
                }
            }
        }
        for (at, _) in file.live.match_indices('[').filter(|(at, _)| is_index(&file.live, *at)) {
            report(at, "indexing");
        }
    }
    findings
}

/// `x[`, `x()[`, `x[0][` and `x?[`; not `&[`, `vec![`, `#[`, `&'a [`, nor `[..]`, which cannot fail.
fn is_index(code: &str, at: usize) -> bool {
    let before = &code.as_bytes()[..at];
    !code[at..].starts_with("[..]")
        && before.last().is_some_and(|&b| is_word(b) || matches!(b, b')' | b']' | b'?'))
}

fn io_in_parsers(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| is_reader(&f.path, "src/proc")) {
        for name in NO_IO {
            for (at, _) in
                file.live.match_indices(name).filter(|(at, _)| !file.live[*at..].starts_with(NO_IO_BUT))
            {
                findings.push(format!("{}:{}: {name} in a parser", file.path, line_of(&file.live, at)));
            }
        }
    }
    findings
}

#[test]
fn readers_do_not_panic() {
    super::none(panics(&super::own()));
}

#[test]
fn parsers_open_nothing() {
    super::none(io_in_parsers(&super::own()));
}

#[test]
fn breaches_are_seen() {
    let tree = Tree::from([
        (
            "src/proc/maps.rs",
            "fn f(a: &[u8], b: &'a [u8]) -> [u8; 2] {\n #[x] let v = vec![1];\n a.unwrap();\n a[0] }\n#[cfg(test)]\nmod tests { a[0].unwrap() }",
        ),
        (
            "src/pages.rs",
            "unreachable!();\nx.expect(\"\");\nf()[1];\n// panic!\nmy_panic!()\nx.unwrap_or(1)[..]",
        ),
        ("src/mem/mod.rs", "a[0].unwrap()"),
        ("src/image/x.rs", "Some(messages[0])\nSome(messages[1])"),
        ("src/proc/io.rs", "use std::fs;"),
    ]);
    assert_eq!(
        panics(&tree),
        [
            "src/proc/maps.rs:3: .unwrap()",
            "src/proc/maps.rs:4: indexing",
            "src/pages.rs:2: .expect(",
            "src/pages.rs:1: unreachable!",
            "src/pages.rs:3: indexing",
            "src/image/x.rs:2: indexing",
        ]
    );
    assert_eq!(io_in_parsers(&tree), ["src/proc/io.rs:1: std::fs in a parser"]);
}
