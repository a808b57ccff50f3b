//! A thing lives with its owner: no file is called by what it is not.

use super::source::Tree;

const REFUSED: [&str; 8] = ["util", "utils", "common", "helper", "helpers", "misc", "types", "prelude"];

fn homeless(tree: &Tree) -> Vec<String> {
    let is_refused = |path: &str| path.split('/').any(|part| REFUSED.contains(&part.trim_end_matches(".rs")));
    tree.files
        .iter()
        .filter(|f| is_refused(&f.path))
        .map(|f| format!("{}: name says nothing", f.path))
        .collect()
}

#[test]
fn say_what_is_there() {
    super::none(homeless(&super::own()));
}

#[test]
fn breaches_are_seen() {
    let tree = Tree::from([
        ("src/files/util.rs", ""),
        ("src/helpers/a.rs", ""),
        ("src/utility.rs", ""),
        ("src/files/x.rs", ""),
    ]);
    assert_eq!(
        homeless(&tree),
        ["src/files/util.rs: name says nothing", "src/helpers/a.rs: name says nothing"]
    );
}
