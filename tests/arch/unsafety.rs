//! `unsafe` stands only in `src/sys`, and each time with a line that says why it holds there.

use super::source::{File, Tree, line_of, words};

/// Where `unsafe` may be: the fronts over system calls, and the target programs of tests and benchmarks.
const ALLOWED: [&str; 8] = [
    "src/sys/",
    "tests/live/",
    "tests/memory/target.rs",
    "tests/faults/",
    "tests/hangs/",
    "tests/attacks/",
    "tests/remote_faults/sys.rs",
    "benches/",
];

fn outside(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| !ALLOWED.iter().any(|dir| f.path.starts_with(dir))) {
        for at in words(&file.code, "unsafe") {
            findings.push(format!("{}:{}: unsafe outside of src/sys", file.path, line_of(&file.code, at)));
        }
        for at in words(&file.code, "unsafe_code") {
            findings.push(format!(
                "{}:{}: the lint against unsafe is touched",
                file.path,
                line_of(&file.code, at)
            ));
        }
    }
    findings
}

fn unexplained(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    for file in &tree.files {
        for at in words(&file.code, "unsafe") {
            // `unsafe extern` declares symbols; whoever uses one says why.
            if file.code[at..].starts_with("unsafe extern") {
                continue;
            }
            let line = line_of(&file.code, at);
            if !is_explained(file, at, line) {
                findings.push(format!("{}:{line}: unsafe without a SAFETY line", file.path));
            }
        }
    }
    findings
}

/// Looks for the reason on the line itself, and above it as far as the same statement and its comment reach.
fn is_explained(file: &File, at: usize, line: usize) -> bool {
    let what = file.code[at..].trim_start_matches("unsafe").split_whitespace().next().unwrap_or_default();
    // What a caller or implementer must keep is documented under this heading; the rest gives its own reason.
    let reasons: &[&str] = if matches!(what, "fn" | "trait") { &["# Safety"] } else { &["SAFETY:"] };
    let says = |text: &str| reasons.iter().any(|r| text.contains(r));
    let texts: Vec<&str> = file.text.lines().collect();
    let codes: Vec<&str> = file.code.lines().collect();
    if texts[line - 1].split_once("//").is_some_and(|(_, comment)| says(comment)) {
        return true;
    }
    for above in (0..line - 1).rev() {
        let (text, code) = (texts[above].trim(), codes[above].trim());
        let is_comment = text.starts_with("//");
        if is_comment && says(text) {
            return true;
        }
        let goes_on =
            is_comment || text.starts_with("#[") || !(text.is_empty() || code.ends_with([';', '{', '}']));
        if !goes_on {
            return false;
        }
    }
    false
}

#[test]
fn only_in_sys() {
    super::none(outside(&super::own()));
}

#[test]
fn always_explained() {
    super::none(unexplained(&super::own()));
}

#[test]
fn breaches_are_seen() {
    let tree = Tree::from([
        ("src/sys/a.rs", "#![allow(unsafe_code)]\n// SAFETY: ours\nlet x =\n    f(unsafe { g() });\n"),
        ("src/sys/b.rs", "// SAFETY: for the first only\nunsafe { a() };\nunsafe { b() };\n"),
        (
            "src/sys/c.rs",
            "/// # Safety\n/// Keep it.\n#[inline]\npub unsafe fn f() {}\n/// none\nunsafe trait T {}\n",
        ),
        ("src/sys/d.rs", "// SAFETY: a\n\nunsafe { b() }; // SAFETY: c\nunsafe { d() }\n"),
        ("src/mem/a.rs", "// unsafe\nfn f() { unsafe { g() } }\n"),
        ("src/mem/b.rs", "#![allow(unsafe_code)]\n"),
        ("tests/live/sys.rs", "// SAFETY: x\nunsafe { g() }"),
    ]);
    assert_eq!(
        outside(&tree),
        ["src/mem/a.rs:2: unsafe outside of src/sys", "src/mem/b.rs:1: the lint against unsafe is touched"]
    );
    let lines: Vec<_> =
        unexplained(&tree).iter().map(|f| f.split(": ").next().unwrap_or_default().to_string()).collect();
    assert_eq!(lines, ["src/sys/b.rs:3", "src/sys/c.rs:6", "src/sys/d.rs:4", "src/mem/a.rs:2"]);
}
