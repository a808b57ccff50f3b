//! Rust sources with comments, texts and test code blanked out, so that plain searches find only code.

use std::fs;
use std::path::Path;

/// One file.
#[derive(Debug)]
pub(crate) struct File {
    /// From the root of the crate, with `/`.
    pub(crate) path: String,
    /// As it is.
    pub(crate) text: String,
    /// The same without comments and without the insides of texts: blanks in their place, newlines kept.
    pub(crate) code: String,
    /// `code` without items under `#[cfg(test)]`. Empty for a file that is one.
    pub(crate) live: String,
}

/// All files of a crate, or of a made-up one.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) files: Vec<File>,
}

impl Tree {
    /// Reads `src`, `tests` and `benches` below `root`, and `build.rs`.
    pub(crate) fn read(root: &Path) -> Tree {
        let mut found = Vec::new();
        for dir in ["src", "tests", "benches", "build.rs"] {
            collect(root, &root.join(dir), &mut found);
        }
        found.sort();
        Tree::new(found)
    }

    /// A tree of (path, text).
    pub(crate) fn new(sources: impl IntoIterator<Item = (String, String)>) -> Tree {
        let mut files: Vec<File> = sources
            .into_iter()
            .map(|(path, text)| {
                let code = code_only(&text);
                File { path, live: code.clone(), code, text }
            })
            .collect();
        let mut test_dirs = Vec::new();
        for file in &mut files {
            let (live, modules) = without_tests(&file.code);
            file.live = live;
            test_dirs.extend(modules.iter().map(|module| format!("{}/{module}", module_dir(&file.path))));
        }
        for file in &mut files {
            let is_test =
                |dir: &String| file.path == format!("{dir}.rs") || file.path.starts_with(&format!("{dir}/"));
            if test_dirs.iter().any(is_test) {
                file.live = String::new();
            }
        }
        Tree { files }
    }

    /// The files below `dir`, which ends in `/`.
    pub(crate) fn below<'a>(&'a self, dir: &'a str) -> impl Iterator<Item = &'a File> {
        self.files.iter().filter(move |f| f.path.starts_with(dir))
    }
}

#[cfg(test)]
impl<const N: usize> From<[(&str, &str); N]> for Tree {
    fn from(sources: [(&str, &str); N]) -> Tree {
        Tree::new(sources.map(|(path, text)| (path.into(), text.into())))
    }
}

fn collect(root: &Path, at: &Path, found: &mut Vec<(String, String)>) {
    if at.is_dir() {
        for entry in fs::read_dir(at).expect("a source directory") {
            collect(root, &entry.expect("a source directory").path(), found);
        }
    } else if at.extension().is_some_and(|e| e == "rs") && at.exists() {
        let path = at.strip_prefix(root).expect("below the root").to_str().expect("a plain name").to_string();
        found.push((path, fs::read_to_string(at).expect("a source file")));
    }
}

/// Where the files of a module's children are: `src/a` for both `src/a.rs` and `src/a/mod.rs`.
fn module_dir(path: &str) -> String {
    let dir = path.strip_suffix(".rs").unwrap_or(path);
    for end in ["/mod", "/lib", "/main"] {
        if let Some(parent) = dir.strip_suffix(end) {
            return parent.to_string();
        }
    }
    dir.to_string()
}

/// The number of the line, from 1, that byte `at` of `text` is in.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count() + 1
}

/// Where `word` stands in `code` by itself and not within a longer word.
pub(crate) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = at.checked_sub(1).is_none_or(|b| !is_word(bytes[b]));
        before && bytes.get(at + word.len()).is_none_or(|&b| !is_word(b))
    })
}

/// Whether a byte can be part of a name.
pub(crate) fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || !b.is_ascii()
}

/// The name that `code` begins with, or nothing.
pub(crate) fn leading_word(code: &str) -> &str {
    let len = code.bytes().position(|b| !is_word(b)).unwrap_or(code.len());
    &code[..len]
}

/// The length of what stands between the bracket that `code` begins with and its partner, both included.
pub(crate) fn bracketed(code: &str) -> usize {
    let mut depth = 0usize;
    for (at, b) in code.bytes().enumerate() {
        match b {
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

fn blank(out: &mut [u8], from: usize, to: usize) {
    let to = to.min(out.len());
    for b in out.get_mut(from..to).unwrap_or_default() {
        if *b != b'\n' {
            *b = b' ';
        }
    }
}

/// Blanks comments and the insides of string and character literals.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text.as_bytes()[at..];
        let in_word = at > 0 && is_word(bytes[at - 1]);
        let end = if rest.starts_with(b"//") {
            at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            at + block_comment(rest)
        } else if let Some(len) = (!in_word).then(|| raw_string(rest)).flatten() {
            at + len
        } else if rest[0] == b'"' {
            at + string(rest)
        } else if let Some(len) = character(rest) {
            at + len
        } else {
            at += 1;
            continue;
        };
        // Quotes stay, so that a text is still an expression.
        let quoted = !rest.starts_with(b"/");
        blank(&mut out, at + usize::from(quoted), end - usize::from(quoted));
        at = end;
    }
    String::from_utf8(out).expect("whole characters were blanked")
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of `r"…"`, `br#"…"#` and the like.
fn raw_string(rest: &[u8]) -> Option<usize> {
    let prefix = rest.iter().position(|b| !matches!(b, b'b' | b'c')).filter(|&n| n <= 1)?;
    let hashes_from = prefix + 1;
    if rest.get(prefix) != Some(&b'r') {
        return None;
    }
    let hashes = rest[hashes_from..].iter().position(|&b| b != b'#')?;
    if rest.get(hashes_from + hashes) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let body = hashes_from + hashes + 1;
    let len = rest[body..].windows(close.len()).position(|w| w == close);
    Some(len.map_or(rest.len(), |len| body + len + close.len()))
}

fn string(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// The length of `'x'` or `'\n'`; `None` for a lifetime.
fn character(rest: &[u8]) -> Option<usize> {
    if rest[0] != b'\'' {
        return None;
    }
    if rest.get(1) == Some(&b'\\') {
        return Some(3 + rest.get(3..)?.iter().position(|&b| b == b'\'')? + 1);
    }
    let width = match rest.get(1)?.leading_ones() {
        0 => 1,
        ones => ones as usize,
    };
    (rest.get(1 + width) == Some(&b'\'')).then_some(width + 2)
}

/// Blanks every item under `#[cfg(test)]`; with the names of those that are modules in files of their own.
fn without_tests(code: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let mut out = code.as_bytes().to_vec();
    let mut modules = Vec::new();
    for (at, _) in code.match_indices(MARK) {
        let item = &code[at..];
        // The item ends with its first braces, or before them with a semicolon.
        let body = item.find('{').unwrap_or(item.len());
        let end = match item[..body].find(';') {
            Some(semicolon) => {
                if let Some(name) = item[..semicolon].split_whitespace().last()
                    && words(&item[..semicolon], "mod").next().is_some()
                {
                    modules.push(name.to_string());
                }
                semicolon + 1
            }
            None => body + bracketed(&item[body..]),
        };
        blank(&mut out, at, at + end);
    }
    (String::from_utf8(out).expect("whole characters were blanked"), modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> String {
        let code = code_only(text);
        assert_eq!(code.len(), text.len());
        code.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_texts_are_not_code() {
        assert_eq!(code("a // unsafe\nb"), "a b");
        assert_eq!(code("a /* x /* unsafe */ \" */ b"), "a b");
        assert_eq!(code(r#"f("unsafe \" x", b"y")"#), r#"f(" ", b" ")"#);
        assert_eq!(code("f(r#\"un\"safe\"#) + r\"\\\" + br\"x\" g"), "f(r #) + r \" + b \" g");
        assert_eq!(code(r"m('x', '\'', '\u{1F600}', 'é', b'\\') z"), r"m(' ', ' ', ' ', ' ', b' ') z");
        assert_eq!(
            code("fn f<'a>(x: &'a str, y: &'static u8) {}"),
            "fn f<'a>(x: &'a str, y: &'static u8) {}"
        );
        assert_eq!(code("let bar = \"//\"; unsafe"), "let bar = \" \"; unsafe");
    }

    #[test]
    fn test_items_are_not_live() {
        let (live, modules) =
            without_tests("a();\n#[cfg(test)]\nmod tests { x[{1}] }\nb();\n#[cfg(test)]\nmod far;\nc();");
        assert_eq!(live.split_whitespace().collect::<String>(), "a();b();c();");
        assert_eq!(modules, ["far"]);
        let tree = Tree::from([
            ("src/a/mod.rs", "#[cfg(test)]\nmod far;"),
            ("src/a/far.rs", "x"),
            ("src/b.rs", "#[cfg(test)]\nmod tests;"),
            ("src/b/tests.rs", "x"),
            ("src/b/tests/more.rs", "x"),
            ("src/b/other.rs", "x"),
        ]);
        let live: Vec<_> = tree.files.iter().filter(|f| f.live == "x").map(|f| &f.path[..]).collect();
        assert_eq!(live, ["src/b/other.rs"]);
    }

    #[test]
    fn words_are_whole() {
        let code = "unsafe unsafe_code not_unsafe (unsafe)";
        assert_eq!(words(code, "unsafe").collect::<Vec<_>>(), [0, code.len() - 7]);
        assert_eq!(line_of("a\nb\nc", 4), 3);
        assert_eq!(bracketed("{a(b)[c]{d}}e"), 12);
    }
}
