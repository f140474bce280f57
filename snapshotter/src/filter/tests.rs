use std::time::SystemTime;

use proptest::prelude::*;

use super::*;
use crate::metadata::{Backing, Change, Copies, DirectoryId, Kind, Usage};

fn info(name: &str, labels: &[(&str, &str)]) -> SnapshotInfo {
    SnapshotInfo {
        name: name.to_owned(),
        parent: Some("sha256:parent".to_owned()),
        kind: Kind::Committed,
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        created: SystemTime::UNIX_EPOCH,
        updated: SystemTime::UNIX_EPOCH,
    }
}

fn matches(filters: &[&str], info: &SnapshotInfo) -> bool {
    let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
    Filters::parse(&filters).unwrap().matches(info)
}

fn refused(filter: &str) -> FilterError {
    Filters::parse(&[filter.to_owned()]).unwrap_err()
}

#[test]
fn fields_are_compared() {
    let info = info("default/1/a key", &[("a.b/c", "x"), ("simple", "1"), ("a.b", "dotted")]);
    for (filter, expected) in [
        ("", true),
        ("kind==committed", true),
        ("kind==active", false),
        ("kind!=active", true),
        ("name==\"default/1/a key\"", true),
        ("name==default/1/a", false),
        ("parent==sha256:parent", true),
        ("parent!=sha256:parent", false),
        ("labels.\"a.b/c\"==x", true),
        ("labels.\"a.b/c\"==\"x\"", true),
        ("labels.\"a.b/c\"!=x", false),
        ("labels.simple==1", true),
        ("labels.a.b==dotted", true),
        ("labels.missing==x", false),
        ("labels.missing!=x", true),
        ("labels.\"a.b/c\"", true),
        ("labels.missing", false),
        ("name", true),
        ("unknown", false),
        ("unknown==x", false),
        ("unknown!=x", true),
        (" kind == committed", true),
    ] {
        assert_eq!(matches(&[filter], &info), expected, "{filter}");
    }
}

#[test]
fn a_comma_is_and_and_several_filters_are_or() {
    let info = info("a", &[("x", "1")]);
    assert!(matches(&["kind==committed,labels.x==1"], &info));
    assert!(!matches(&["kind==committed,labels.x==2"], &info));
    assert!(matches(&["kind==active", "labels.x==1"], &info));
    assert!(!matches(&["kind==active", "labels.x==2"], &info));
    assert!(matches(&[], &info));
}

#[test]
fn the_handshakes_filter_is_read() {
    let info = info("n", &[("containerd.io/snapshot.ref", "sha256:0123abc")]);
    let filter = "labels.\"containerd.io/snapshot.ref\"==sha256:0123abc,parent==\"sha256:parent\"";
    assert!(matches(&[filter], &info));
    assert!(!matches(&[&filter.replace("0123abc", "0123abd")], &info));
}

#[test]
fn regular_expressions_search() {
    let info = info("default/12/extract", &[]);
    assert!(matches(&["name~=^default/[0-9]+/"], &info));
    assert!(matches(&["name~=/extract$/"], &info));
    assert!(matches(&["name~=/^default\\/1/"], &info), "the quote itself can be escaped");
    assert!(matches(&["name~=|^default/1|"], &info));
    assert!(matches(&["name~=\"ext.act\""], &info));
    assert!(!matches(&["name~=^extract"], &info));
    assert!(matches(&["labels.missing~=^$"], &info), "an absent value is matched as empty");
}

#[test]
fn quoted_values_have_gos_escapes() {
    for (quoted, value) in [
        (r#""a\nb""#, "a\nb"),
        (r#""\a\b\f\n\r\t\v\\\"""#, "\u{7}\u{8}\u{c}\n\r\t\u{b}\\\""),
        (r#""\x41\101\u00e9\U0001F600""#, "AA\u{e9}\u{1f600}"),
        (r#""\xc3\xa9""#, "\u{e9}"),
        (r#""""#, ""),
        (r#""ä,b c""#, "ä,b c"),
    ] {
        assert!(matches(&[&format!("name=={quoted}")], &info(value, &[])), "{quoted}");
    }
}

#[test]
fn bad_filters_are_refused_where_they_are_wrong() {
    for (filter, position) in [
        ("kind=committed", 4),
        ("kind===committed", 4),
        ("kind==", 6),
        ("==x", 0),
        ("kind==a,", 8),
        ("kind==a,,name==b", 8),
        ("kind committed", 5),
        ("name==\"open", 6),
        ("name==/a/", 6),
        ("name==.a", 6),
        ("name==a b", 7),
        (r#"name=="\q""#, 8),
        (r#"name=="\x4""#, 10),
        (r#"name=="\400""#, 8),
        (r#"name=="\ud800""#, 9),
        (r#"name=="\xff""#, 6),
        ("name~=(", 6),
        ("labels.==x", 7),
        ("ä", 0),
    ] {
        let error = refused(filter);
        assert_eq!(error.position, position, "{filter}: {error}");
        assert!(error.to_string().contains(&format!("byte {position}")), "{error}");
    }
}

#[test]
fn filters_are_bounded() {
    let half = format!("name=={}", "a".repeat(FILTERS_BYTES_MAX / 2 - 6));
    assert!(Filters::parse(&[half.clone(), half.clone()]).is_ok());
    let error = Filters::parse(&[half.clone(), half, "name".to_owned()]).unwrap_err();
    assert!(error.problem.contains("131072"), "{error}");
    let expanding = refused("name~=((a{100}){100}){100}");
    assert!(expanding.problem.contains("regular expression"), "{expanding}");
    assert!(refused(&"(".repeat(10_000)).to_string().len() < 1000);
}

#[test]
fn indexed_answers_equal_scanned_ones() {
    let mut index = Index::default();
    for (name, kind) in [("a", Kind::Committed), ("b", Kind::Committed), ("c", Kind::Active)] {
        let mut info = info(name, &[(SNAPSHOT_REF, "sha256:1")]);
        info.kind = kind;
        info.parent = None;
        let (id, usage) = (DirectoryId(1), Usage::default());
        let backing = Backing::Directory { id, usage, reason: None, copies: Copies::Whole };
        index.apply(Change::Put(Record { info, backing }));
    }
    let reference = "labels.\"containerd.io/snapshot.ref\"==sha256:1";
    for (filters, expected) in [
        (vec![format!("{reference},parent==\"\"")], vec!["a", "b", "c"]),
        (vec![format!("{reference},parent==\"\",kind==active")], vec!["c"]),
        (vec![format!("{reference},parent==x")], vec![]),
        (vec!["name==b".to_owned(), "name==a".to_owned(), "name==b".to_owned()], vec!["a", "b"]),
        (vec!["name==b,kind==active".to_owned()], vec![]),
        (vec!["name==b".to_owned(), "kind==active".to_owned()], vec!["b", "c"]),
        (vec![reference.to_owned()], vec!["a", "b", "c"]),
    ] {
        let found = Filters::parse(&filters).unwrap().select(&index);
        let names: Vec<_> = found.iter().map(|record| record.info.name.as_str()).collect();
        assert_eq!(names, expected, "{filters:?}");
    }
}

/// Quotes a string as Go's `%q` does, as far as filters need it.
fn quoted(value: &str) -> String {
    let mut text = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => text.push_str(&format!("\\U{:08x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text + "\""
}

#[test]
fn fuzz_filters_are_refused_at_a_byte_or_match_without_a_panic() {
    let samples: [&[u8]; 3] = [
        br#"name=="default/1/a key",labels."containerd.io/snapshot.ref"==sha256:aa"#,
        br"labels.a.b~=/^x+\/[a-z]$/,kind!=active",
        br#"parent=="\u00e4\x41\101\n'"#,
    ];
    let info = info("name", &[("a.b", "x")]);
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = weightfs_fuzz::foreign(&samples, input);
        let filter = String::from_utf8_lossy(&bytes).into_owned();
        match Filters::parse(std::slice::from_ref(&filter)) {
            Ok(filters) => _ = filters.matches(&info),
            Err(error) => assert!(error.position <= filter.len() && !error.problem.is_empty()),
        }
    });
}

proptest! {
    #[test]
    fn every_name_can_be_asked_for(name in any::<String>(), other in any::<String>()) {
        let filter = format!("name=={}", quoted(&name));
        prop_assert!(matches(&[&filter], &info(&name, &[])));
        prop_assert_eq!(matches(&[&filter], &info(&other, &[])), name == other);
    }

    #[test]
    fn every_label_can_be_asked_for(label in "\\PC{1,20}", value in any::<String>()) {
        let filter = format!("labels.{}=={}", quoted(&label), quoted(&value));
        prop_assert!(matches(&[&filter], &info("n", &[(&label, &value)])));
    }
}
