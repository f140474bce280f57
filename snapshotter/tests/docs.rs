//! What the documentation tells people to type is what the program takes, and what it points to is
//! there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory as _, Parser as _};
use weightfs::cli::Cli;

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All pages: their paths and texts.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let others = ["README.md", "CONTRIBUTING.md", "packaging/kubernetes/README.md"];
    let all = docs.chain(others.map(|name| root().join(name)));
    let pages = all.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    let pages = pages.map(|path| (path.clone(), fs::read_to_string(path).unwrap()));
    pages.collect()
}

/// The lines of code blocks; a line that ends with a backslash goes on in the next.
fn code_lines(text: &str) -> Vec<String> {
    let blocks = text.split("\n```").skip(1).step_by(2);
    let joined = blocks.map(|block| block.replace("\\\n", " "));
    let lines = joined.flat_map(|block| {
        // The first line is the name of a language, if anything.
        block.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    });
    lines.collect()
}

/// The words of a command, as a shell splits simple ones; comments are left out.
fn words(line: &str) -> Vec<String> {
    let line = line.split(" #").next().unwrap_or(line);
    line.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect()
}

#[test]
fn every_command_in_the_documentation_is_one_that_the_program_takes() {
    let mut seen = BTreeSet::new();
    for (path, text) in pages() {
        for line in code_lines(&text) {
            let words = words(line.trim_start_matches("$ "));
            if words.first().is_none_or(|word| word != "weightfs") {
                continue;
            }
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{}: `{line}`: {error}", path.display());
            }
            seen.extend(words.get(1).cloned());
        }
    }
    assert!(seen.len() >= 15, "commands of {} kinds only: {seen:?}", seen.len());
}

#[test]
fn every_subcommand_that_is_named_is_there() {
    let command = Cli::command();
    let known: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
    for (path, text) in pages() {
        let spans = text.split('`').skip(1).step_by(2);
        for span in spans.filter_map(|span| span.strip_prefix("weightfs ")) {
            let name = span.split_whitespace().next().unwrap_or_default();
            let word = !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase());
            assert!(!word || known.contains(&name), "{}: weightfs {span}", path.display());
        }
    }
}

#[test]
fn every_target_of_make_that_is_named_is_there() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    for (path, text) in pages() {
        let spans = text.split('`').skip(1).step_by(2).map(str::to_owned);
        for line in code_lines(&text).into_iter().chain(spans) {
            let words = words(&line);
            let Some(target) = words.strip_prefix(&["make".to_owned()]).and_then(<[_]>::first)
            else {
                continue;
            };
            let there = makefile.lines().any(|line| line.starts_with(&format!("{target}:")));
            assert!(there, "{}: make {target}", path.display());
        }
    }
}

#[test]
fn every_link_leads_to_a_file() {
    let mut links = 0;
    for (path, text) in pages() {
        for rest in text.split("](").skip(1) {
            let link = rest.split([')', '#']).next().unwrap_or_default();
            if link.is_empty() || link.contains("://") {
                continue;
            }
            let target = path.parent().unwrap().join(link);
            assert!(target.exists(), "{}: {link}", path.display());
            links += 1;
        }
    }
    assert!(links > 20, "{links} links");
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let contents = fs::read_to_string(root().join("docs/README.md")).unwrap();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") && name != "README.md" {
            assert!(contents.contains(&name), "docs/README.md leaves out {name}");
        }
    }
}
