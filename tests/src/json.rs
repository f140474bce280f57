//! What `--json` prints, compared with what `docs/json.md` says of it.

use serde_json::Value;

const PAGE: &str = include_str!("../../docs/json.md");

/// What a command printed, whose keys are those of the table below `heading`.
///
/// # Panics
/// When it is no JSON, or has other keys.
pub fn documented(heading: &str, text: &str) -> Value {
    let value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_documented(heading, &value);
    value
}

/// Compares the keys of an object, or of each of a list, with the table below `heading`.
///
/// # Panics
/// When they differ.
pub fn assert_documented(heading: &str, value: &Value) {
    if let Value::Array(list) = value {
        assert!(!list.is_empty(), "{heading}: nothing to compare");
        return list.iter().for_each(|value| assert_documented(heading, value));
    }
    let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, keys_of(heading), "{heading} in docs/json.md");
}

/// The keys in the table below a heading, sorted.
fn keys_of(heading: &str) -> Vec<String> {
    let mut lines =
        PAGE.lines().skip_while(|line| line.trim_start_matches('#') != format!(" {heading}"));
    assert!(lines.next().is_some(), "docs/json.md has nothing of {heading}");
    let table = lines.take_while(|line| !line.starts_with('#'));
    let rows = table.filter_map(|line| line.strip_prefix("| `"));
    let mut keys: Vec<_> = rows.filter_map(|row| Some(row.split_once('`')?.0.to_owned())).collect();
    keys.sort();
    keys
}
