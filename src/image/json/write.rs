//! JSON in the very bytes that `crit` writes: `", "` and `": "` in one line, four spaces of
//! indent in many, everything beyond ASCII escaped.

use std::io::{self, Write};

use serde_json::Value;

/// Writes `value` to `to`, in many lines if `pretty`. No newline at the end.
pub fn write(to: &mut impl Write, value: &Value, pretty: bool) -> io::Result<()> {
    put(to, value, pretty.then_some(0))
}

/// `indent` is the depth of the line that `value` begins in, or `None` for one line.
fn put(to: &mut impl Write, value: &Value, indent: Option<usize>) -> io::Result<()> {
    let inner = indent.map(|depth| depth + 1);
    match value {
        Value::Null => to.write_all(b"null"),
        Value::Bool(value) => write!(to, "{value}"),
        Value::Number(number) => write!(to, "{number}"),
        Value::String(text) => put_text(to, text),
        Value::Array(list) if list.is_empty() => to.write_all(b"[]"),
        Value::Array(list) => {
            to.write_all(b"[")?;
            for (at, member) in list.iter().enumerate() {
                separate(to, at == 0, inner)?;
                put(to, member, inner)?;
            }
            new_line(to, indent)?;
            to.write_all(b"]")
        }
        Value::Object(members) if members.is_empty() => to.write_all(b"{}"),
        Value::Object(members) => {
            to.write_all(b"{")?;
            for (at, (key, member)) in members.iter().enumerate() {
                separate(to, at == 0, inner)?;
                put_text(to, key)?;
                to.write_all(b": ")?;
                put(to, member, inner)?;
            }
            new_line(to, indent)?;
            to.write_all(b"}")
        }
    }
}

fn separate(to: &mut impl Write, first: bool, indent: Option<usize>) -> io::Result<()> {
    match (first, indent) {
        (true, _) => new_line(to, indent),
        (false, Some(_)) => {
            to.write_all(b",")?;
            new_line(to, indent)
        }
        (false, None) => to.write_all(b", "),
    }
}

fn new_line(to: &mut impl Write, indent: Option<usize>) -> io::Result<()> {
    let Some(depth) = indent else { return Ok(()) };
    to.write_all(b"\n")?;
    (0..depth).try_for_each(|_| to.write_all(b"    "))
}

fn put_text(to: &mut impl Write, text: &str) -> io::Result<()> {
    to.write_all(b"\"")?;
    let plain = |c: char| matches!(c, ' '..='~') && c != '"' && c != '\\';
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let end = rest.find(|c| !plain(c)).unwrap_or(rest.len());
        let (ready, after) = rest.split_at(end);
        to.write_all(ready.as_bytes())?;
        rest = after;
        if end > 0 {
            continue;
        }
        match c {
            '"' => to.write_all(b"\\\"")?,
            '\\' => to.write_all(b"\\\\")?,
            '\n' => to.write_all(b"\\n")?,
            '\r' => to.write_all(b"\\r")?,
            '\t' => to.write_all(b"\\t")?,
            '\u{8}' => to.write_all(b"\\b")?,
            '\u{c}' => to.write_all(b"\\f")?,
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(to, "\\u{unit:04x}")?;
                }
            }
        }
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    to.write_all(b"\"")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(value: &Value, pretty: bool) -> String {
        let mut bytes = Vec::new();
        write(&mut bytes, value, pretty).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn one_line() {
        let value = json!({"a": [1, 2, {}], "b": [], "c": "é\u{7f}\u{1}\"\\/\n\u{1F600}"});
        let want = r#"{"a": [1, 2, {}], "b": [], "c": "\u00e9\u007f\u0001\"\\/\n\ud83d\ude00"}"#;
        assert_eq!(written(&value, false), want);
    }

    #[test]
    fn many_lines() {
        let value = json!({"a": [1, []], "b": {}});
        assert_eq!(
            written(&value, true),
            "{\n    \"a\": [\n        1,\n        []\n    ],\n    \"b\": {}\n}"
        );
    }
}
