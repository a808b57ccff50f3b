//! Whatever knows a kernel resource is a row of the table of its kind: a module that nobody asks loses state unseen.

use super::source::{Tree, bracketed, leading_word, line_of, words};

/// Where the tables are, and what the traits of their rows end in: `FileKind`, `TaskPart`, `NsKind`.
const TABLES: [&str; 4] = ["src/files", "src/task", "src/ns", "src/cgroup"];
const ROWS: [&str; 2] = ["Kind", "Part"];

/// Every `impl …Kind for T` below `dir`: where it stands, and T.
fn rows<'a>(tree: &'a Tree, dir: &'a str) -> impl Iterator<Item = (String, &'a str)> {
    tree.below(dir).flat_map(|file| {
        words(&file.live, "impl").filter_map(move |at| {
            let header = &file.live[at..at + file.live[at..].find('{')?];
            let (contract, target) = header.split_once(" for ")?;
            let contract =
                contract.split(['<', ' ', ':']).rfind(|word| ROWS.iter().any(|end| word.ends_with(end)))?;
            let target = target.trim();
            let whence = format!("{}:{}", file.path, line_of(&file.live, at));
            (!contract.is_empty()).then_some((whence, leading_word(target)))
        })
    })
}

/// The values of all `static` and `const` items below `dir` that are lists.
fn tables<'a>(tree: &'a Tree, dir: &'a str) -> impl Iterator<Item = &'a str> {
    tree.below(dir).flat_map(|file| {
        words(&file.live, "static").chain(words(&file.live, "const")).filter_map(|at| {
            let item = &file.live[at..];
            let value =
                item.find('=').map(|equals| item[equals + 1..].trim_start_matches([' ', '\n', '&']))?;
            value.starts_with('[').then(|| &value[..bracketed(value)])
        })
    })
}

fn forgotten(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    for dir in TABLES {
        let dir = format!("{dir}/");
        let tables: Vec<&str> = tables(tree, &dir).collect();
        for (whence, name) in rows(tree, &dir) {
            if !tables.iter().any(|table| words(table, name).next().is_some()) {
                findings.push(format!("{whence}: {name} is in no table"));
            }
        }
    }
    findings
}

#[test]
fn have_every_kind() {
    super::none(forgotten(&super::own()));
}

#[test]
fn own_rows_are_found() {
    let tree = super::own();
    let names: Vec<&str> = rows(&tree, "src/files/").map(|(_, name)| name).collect();
    assert!(names.contains(&"Eventfd"), "{names:?}");
}

#[test]
fn breaches_are_seen() {
    let tree = Tree::from([
        (
            "src/files/mod.rs",
            "pub(crate) static KINDS: &[Row] = &[Row::Kind(kind::<a::A>()), kind::<c::C>()];\nconst X: u8 = 1;",
        ),
        ("src/files/a.rs", "impl FileKind for A { }\nimpl Drop for A {}"),
        ("src/files/b.rs", "// A\nimpl super::FileKind for B {}\n#[cfg(test)]\nimpl FileKind for T {}"),
        ("src/files/c.rs", "impl<'a> FileKind for C<'a> {}"),
        ("src/task/a.rs", "impl TaskPart for A {}"),
        ("src/task/table.rs", "const PARTS: [Part; 1] =\n    [part::<b::B>()];"),
        ("src/mem/a.rs", "impl MemKind for A {}"),
    ]);
    assert_eq!(forgotten(&tree), ["src/files/b.rs:2: B is in no table", "src/task/a.rs:1: A is in no table"]);
}
