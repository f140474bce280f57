//! What containerd must be told, and telling it: keys are set in a file's text, and all else in it
//! stays as it was, comments included.

use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, TableLike, value};

use super::InstallError;
use crate::node::containerd::{CRI, CRI_IMAGES, TRANSFER};

/// The snapshotter's name in containerd.
pub(super) const NAME: &str = "weightfs";

/// Version 3 of the format is of containerd 2.0 and later.
const NEW: u64 = 2;

/// What containerd must be told of the daemon.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// The snapshotter's socket.
    pub(super) address: String,
    /// The state directory.
    pub(super) root: String,
    /// First number of containerd's version.
    pub(super) major: u64,
}

/// A key, with the tables that it is in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setting {
    /// From the outermost table to the key.
    pub(super) path: Vec<&'static str>,
    value: Wish,
}

#[derive(Debug, Clone, PartialEq)]
enum Wish {
    Text(String),
    No,
    /// In a list of tables: one with each of these snapshotters.
    Snapshotters([&'static str; 2]),
}

impl Wanted {
    /// All that is to be set. Tried: in a file of version 2, containerd 2 needs its own tables as
    /// well; it does not take the snapshotter over from those of 1.x.
    pub(super) fn settings(&self, version: i64) -> Vec<Setting> {
        let text = |path: &[&'static str], text: &str| Setting {
            path: path.to_vec(),
            value: Wish::Text(text.to_owned()),
        };
        let no = |path: &[&'static str]| Setting { path: path.to_vec(), value: Wish::No };
        let mut settings = vec![
            text(&["proxy_plugins", NAME, "type"], "snapshot"),
            text(&["proxy_plugins", NAME, "address"], &self.address),
        ];
        if version < 3 {
            settings.push(text(&["plugins", CRI, "containerd", "snapshotter"], NAME));
            settings.push(no(&["plugins", CRI, "containerd", "disable_snapshot_annotations"]));
        }
        if self.major >= NEW {
            let exports = ["proxy_plugins", NAME, "exports"];
            settings.push(text(&[&exports[..], &["root"]].concat(), &self.root));
            let key = "enable_remote_snapshot_annotations";
            settings.push(text(&[&exports[..], &[key]].concat(), "true"));
            settings.push(text(&["plugins", CRI_IMAGES, "snapshotter"], NAME));
            settings.push(no(&["plugins", CRI_IMAGES, "disable_snapshot_annotations"]));
            settings.push(Setting {
                path: vec!["plugins", TRANSFER, "unpack_config"],
                // A list of one's own replaces containerd's.
                value: Wish::Snapshotters(["overlayfs", NAME]),
            });
        }
        settings
    }
}

impl Setting {
    /// The table that containerd merges or replaces as a whole: `plugins.X`, `proxy_plugins.X`.
    pub(super) fn section(&self) -> &[&'static str] {
        self.path.get(..2).unwrap_or(&self.path)
    }

    /// Sets it.
    pub(super) fn apply(&self, document: &mut DocumentMut) -> Result<(), InstallError> {
        let (key, tables) = self.split();
        let table = tables_at(document, tables)?;
        match &self.value {
            Wish::Text(text) => set(table, key, value(text)),
            Wish::No => set(table, key, value(false)),
            Wish::Snapshotters(names) => {
                if !table.contains_key(key) {
                    table.insert(key, Item::ArrayOfTables(ArrayOfTables::new()));
                }
                let list = table.get_mut(key).and_then(Item::as_array_of_tables_mut);
                let list = list.ok_or_else(|| InstallError::NotATable { key: key.to_owned() })?;
                names.iter().for_each(|name| add_snapshotter(list, name));
            }
        }
        Ok(())
    }

    /// Gives it back the value that it had.
    pub(super) fn undo(&self, document: &mut DocumentMut, before: &DocumentMut) {
        let (key, tables) = self.split();
        let had = at(before.as_table(), tables).and_then(|table| table.get(key)).cloned();
        if let Some(table) = at_mut(document.as_table_mut(), tables) {
            match had {
                Some(item) => set(table, key, item),
                None => drop(table.remove(key)),
            }
        }
        // Tables that are empty now and were not there.
        for depth in (1..=tables.len()).rev() {
            let (Some((name, outer)), None) = (
                tables.get(..depth).and_then(<[_]>::split_last),
                tables.get(..depth).and_then(|path| at(before.as_table(), path)),
            ) else {
                continue;
            };
            if let Some(outer) = at_mut(document.as_table_mut(), outer)
                && outer.get(name).and_then(Item::as_table_like).is_some_and(TableLike::is_empty)
            {
                outer.remove(name);
            }
        }
    }

    fn split(&self) -> (&'static str, &[&'static str]) {
        self.path.split_last().map_or(("", &[]), |(key, tables)| (*key, tables))
    }
}

/// Sets a value and leaves the comments around it.
fn set(table: &mut dyn TableLike, key: &str, mut item: Item) {
    match table.get_mut(key) {
        Some(found) => {
            if let (Some(old), Some(new)) = (found.as_value(), item.as_value_mut()) {
                *new.decor_mut() = old.decor().clone();
            }
            *found = item;
        }
        None => drop(table.insert(key, item)),
    }
}

/// The table of that path, made where it is not there.
fn tables_at<'a>(
    document: &'a mut DocumentMut,
    path: &[&str],
) -> Result<&'a mut dyn TableLike, InstallError> {
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for (depth, name) in path.iter().enumerate() {
        if !table.contains_key(name) {
            let mut new = Table::new();
            // Only the innermost gets a line of its own.
            new.set_implicit(depth + 1 < path.len());
            table.insert(name, Item::Table(new));
        }
        let item = table.get_mut(name).and_then(Item::as_table_like_mut);
        table = item.ok_or_else(|| InstallError::NotATable { key: (*name).to_owned() })?;
    }
    Ok(table)
}

/// The table of that path, if it is there.
pub(super) fn at<'a>(table: &'a dyn TableLike, path: &[&str]) -> Option<&'a dyn TableLike> {
    path.iter().try_fold(table, |table, name| table.get(name)?.as_table_like())
}

fn at_mut<'a>(table: &'a mut dyn TableLike, path: &[&str]) -> Option<&'a mut dyn TableLike> {
    path.iter().try_fold(table, |table, name| table.get_mut(name)?.as_table_like_mut())
}

fn add_snapshotter(list: &mut ArrayOfTables, name: &str) {
    let is_there = |entry: &Table| entry.get("snapshotter").and_then(Item::as_str) == Some(name);
    if !list.iter().any(is_there) {
        let mut entry = Table::new();
        entry.insert("platform", value(platform()));
        entry.insert("snapshotter", value(name));
        list.push(entry);
    }
}

/// This machine's, in OCI's words.
fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(major: u64) -> Wanted {
        Wanted { address: "/w.sock".to_owned(), root: "/w".to_owned(), major }
    }

    fn parse(text: &str) -> DocumentMut {
        text.parse().unwrap()
    }

    const OWN: &str = "# mine\nversion = 2 # really\n\n[plugins]\n  # CRI\n  \
        [plugins.\"io.containerd.grpc.v1.cri\"]\n    sandbox_image = \"pause\" # small\n    \
        [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n      \
        snapshotter = \"overlayfs\" # fast\n[proxy_plugins.other]\n  type = \"snapshot\"\n";

    #[test]
    fn what_was_there_stays_and_is_there_again() {
        for (text, version, major) in
            [(OWN, 2, 1), (OWN, 2, 2), ("", 2, 1), ("version = 3\n", 3, 2), ("# only\n", 2, 1)]
        {
            let mut document = parse(text);
            let settings = wanted(major).settings(version);
            settings.iter().for_each(|setting| setting.apply(&mut document).unwrap());
            let installed = document.to_string();
            for line in text.lines().filter(|line| !line.contains("overlayfs")) {
                assert!(installed.contains(line), "{line} in {installed}");
            }
            assert!(installed.contains("address = \"/w.sock\""), "{installed}");
            let again = installed.clone();
            settings.iter().for_each(|setting| setting.apply(&mut document).unwrap());
            assert_eq!(document.to_string(), again, "idempotent");
            // Somebody has changed it since.
            let mut changed = parse(&format!("{installed}\n[debug]\nlevel = \"info\"\n"));
            settings.iter().rev().for_each(|setting| setting.undo(&mut changed, &parse(text)));
            let undone = changed.to_string();
            assert!(
                !undone.contains("weightfs") && undone.contains("level = \"info\""),
                "{undone}"
            );
            assert_eq!(undone.replace("\n[debug]\nlevel = \"info\"\n", "").trim(), text.trim());
        }
    }

    #[test]
    fn a_list_of_ones_own_is_added_to() {
        let text = "version = 3\n[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
            platform = \"linux/amd64\"\nsnapshotter = \"native\"\n";
        let mut document = parse(text);
        for setting in wanted(2).settings(3) {
            setting.apply(&mut document).unwrap();
        }
        let installed = document.to_string();
        for name in ["native", "overlayfs", "weightfs"] {
            assert!(installed.contains(&format!("snapshotter = \"{name}\"")), "{installed}");
        }
    }

    #[test]
    fn a_key_where_a_table_should_be_is_refused() {
        let mut document = parse("plugins = 3");
        let settings = wanted(1).settings(2);
        let refused = settings.iter().find_map(|setting| setting.apply(&mut document).err());
        assert!(matches!(refused, Some(InstallError::NotATable { .. })), "{refused:?}");
    }
}
