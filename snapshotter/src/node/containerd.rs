//! containerd's configuration, read: as containerd itself says that it is (`containerd config
//! dump`), or where its program is not at hand, as its files say.
//!
//! The two formats differ in how imported files are merged, which was tried with 1.6, 1.7 and 2.1:
//! up to 1.7 a `[plugins.X]` in a later file *replaces* the whole table of an earlier one, from 2.0
//! on they are merged key by key. `[proxy_plugins.X]` is replaced as a whole everywhere.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;
use toml::{Table, Value};

/// A configuration file at the most, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Files of one configuration at the most: the main one and what it imports.
const FILES_MAX: usize = 64;

/// How long containerd's program may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// CRI's plugin up to containerd 1.7.
pub const CRI: &str = "io.containerd.grpc.v1.cri";
/// The part of CRI that knows snapshotters, from containerd 2.0 on.
pub const CRI_IMAGES: &str = "io.containerd.cri.v1.images";
/// The transfer service, which pulls from containerd 2.1 on.
pub const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// The format of containerd 2.0 and later.
pub const NEW_FORMAT: i64 = 3;

/// Where containerd and its configuration are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its program, by a path or a name that is looked for in `PATH`.
    pub program: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
}

/// The configuration can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// A file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is no TOML, or not containerd's.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Imports without an end.
    #[error("{} imports more than {FILES_MAX} files", path.display())]
    TooMany {
        /// The main file.
        path: PathBuf,
    },
    /// containerd refuses it.
    #[error("`{} --config {} {what}` fails: {message}", program.display(), config.display())]
    Refused {
        /// containerd's program.
        program: PathBuf,
        /// The main file.
        config: PathBuf,
        /// What was asked.
        what: &'static str,
        /// What it wrote.
        message: String,
    },
}

/// A file of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub text: String,
    /// The same, parsed.
    pub table: Table,
}

/// Who says what the configuration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// containerd's program.
    Containerd,
    /// The files.
    Files,
}

/// What containerd is told, its imports included.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Who says so.
    pub by: By,
    table: Table,
}

/// A `[proxy_plugins.X]` that is a snapshotter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Its name: what containerd calls the snapshotter.
    pub name: String,
    /// Its socket.
    pub address: String,
    /// `exports`, of 2.1 and later: the image file system, and whether annotations are sent.
    pub root: Option<String>,
    /// `enable_remote_snapshot_annotations`
    pub annotations: bool,
}

impl Place {
    /// What is configured.
    ///
    /// # Errors
    /// Files that can't be read, and what containerd refuses.
    pub async fn settings(&self) -> Result<Settings, ContainerdError> {
        let (by, text) = match self.ask(&["config", "dump"], "config dump").await? {
            Some(text) => (By::Containerd, text),
            None => return Ok(Settings { by: By::Files, table: merged(&files(&self.config)?) }),
        };
        let table = parse(&text, &self.config)?;
        Ok(Settings { by, table })
    }

    /// The first number of containerd's version; `None` if its program is not at hand.
    ///
    /// # Errors
    /// A program that fails.
    pub async fn major_version(&self) -> Result<Option<u64>, ContainerdError> {
        let answer = self.ask(&["--version"], "--version").await?;
        // `containerd github.com/containerd/containerd 1.6.20~ds1 …`, `… v2.1.9 …`
        let version = answer.as_deref().and_then(|text| text.split_whitespace().nth(2));
        let major = version.and_then(|text| text.trim_start_matches('v').split('.').next());
        Ok(major.and_then(|major| major.parse().ok()))
    }

    /// What the program writes; `None` if there is none.
    async fn ask(
        &self,
        words: &[&str],
        what: &'static str,
    ) -> Result<Option<String>, ContainerdError> {
        let refused = |message: String| ContainerdError::Refused {
            program: self.program.clone(),
            config: self.config.clone(),
            what,
            message,
        };
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).args(words).kill_on_drop(true);
        command.stdin(std::process::Stdio::null());
        match tokio::time::timeout(PATIENCE, command.output()).await {
            Err(_) => Err(refused(format!("no answer within {PATIENCE:?}"))),
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Ok(Err(error)) => Err(refused(error.to_string())),
            Ok(Ok(output)) if output.status.success() => {
                Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
            }
            Ok(Ok(output)) => Err(refused(last_line(&output.stderr))),
        }
    }
}

impl Settings {
    /// The format's version; a file without one is of version 1.
    pub fn version(&self) -> i64 {
        self.table.get("version").and_then(Value::as_integer).unwrap_or(1)
    }

    /// The snapshotters that are proxies.
    pub fn proxies(&self) -> Vec<Proxy> {
        let proxies = self.table.get("proxy_plugins").and_then(Value::as_table);
        let snapshotter = |(name, plugin): (&String, &Value)| {
            let text = |key: &str| plugin.get(key).and_then(Value::as_str);
            let export = |key: &str| plugin.get("exports")?.get(key)?.as_str();
            (text("type") == Some("snapshot")).then(|| Proxy {
                name: name.clone(),
                address: text("address").unwrap_or_default().to_owned(),
                root: export("root").map(str::to_owned),
                annotations: export("enable_remote_snapshot_annotations") == Some("true"),
            })
        };
        proxies.into_iter().flatten().filter_map(snapshotter).collect()
    }

    /// Whether CRI is one of the plugins.
    pub fn has_cri(&self) -> bool {
        let disabled = self.table.get("disabled_plugins").and_then(Value::as_array);
        let mut disabled = disabled.into_iter().flatten().filter_map(Value::as_str);
        !disabled.any(|id| id == CRI || id == CRI_IMAGES || id == "cri")
    }

    /// A key of CRI's image part, wherever this version has it.
    fn cri(&self, key: &str) -> Option<&Value> {
        let plugins = self.table.get("plugins")?;
        match self.version() < NEW_FORMAT {
            true => plugins.get(CRI)?.get("containerd")?.get(key),
            false => plugins.get(CRI_IMAGES)?.get(key),
        }
    }

    /// The snapshotter that CRI uses.
    pub fn cri_snapshotter(&self) -> &str {
        self.cri("snapshotter").and_then(Value::as_str).unwrap_or("overlayfs")
    }

    /// Whether CRI tells the snapshotter which layer it pulls. Not by default.
    pub fn cri_annotates(&self) -> bool {
        self.cri("disable_snapshot_annotations").and_then(Value::as_bool) == Some(false)
    }

    /// Whether the transfer service may unpack into that snapshotter: a list of our own replaces
    /// containerd's.
    pub fn transfers_to(&self, snapshotter: &str) -> bool {
        let plugins = self.table.get("plugins");
        let list = plugins.and_then(|plugins| plugins.get(TRANSFER)?.get("unpack_config"));
        let mut entries = list.and_then(Value::as_array).into_iter().flatten();
        entries.any(|entry| entry.get("snapshotter").and_then(Value::as_str) == Some(snapshotter))
    }

    /// containerd's own socket.
    pub fn address(&self) -> PathBuf {
        let address = self.table.get("grpc").and_then(|grpc| grpc.get("address")?.as_str());
        match address {
            None | Some("") => PathBuf::from("/run/containerd/containerd.sock"),
            Some(address) => PathBuf::from(address),
        }
    }
}

/// The files of a configuration in the order in which containerd reads them; none if the main one
/// is not there.
///
/// # Errors
/// A file that can't be read or parsed, and too many of them.
pub fn files(main: &Path) -> Result<Vec<ConfigFile>, ContainerdError> {
    let mut pending = VecDeque::from([main.to_owned()]);
    let (mut seen, mut files) = (HashSet::new(), Vec::new());
    while let Some(path) = pending.pop_front() {
        if !seen.insert(path.clone()) {
            continue;
        }
        if files.len() == FILES_MAX {
            return Err(ContainerdError::TooMany { path: main.to_owned() });
        }
        let text = match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path == main => {
                return Ok(files);
            }
            read => read.map_err(|source| ContainerdError::Read { path: path.clone(), source })?,
        };
        let table = parse(&text, &path)?;
        for pattern in imports(&table) {
            pending.extend(resolve(&path, pattern)?);
        }
        files.push(ConfigFile { path, text, table });
    }
    Ok(files)
}

/// What a file imports, as it is written.
pub fn imports(table: &Table) -> impl Iterator<Item = &str> {
    let imports = table.get("imports").and_then(Value::as_array);
    imports.into_iter().flatten().filter_map(Value::as_str)
}

/// An import as a path or a pattern of paths, without `..` (Go's `filepath.Join`).
pub fn absolute(importer: &Path, import: &str) -> PathBuf {
    let joined = importer.parent().unwrap_or(Path::new("/")).join(import);
    let mut clean = PathBuf::new();
    for component in joined.components() {
        match component {
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean
}

/// Patterns are those with a star; what they match is read in the order of the names.
fn resolve(importer: &Path, import: &str) -> Result<Vec<PathBuf>, ContainerdError> {
    let path = absolute(importer, import);
    if !import.contains('*') {
        return Ok(vec![path]);
    }
    let bad = |message: String| ContainerdError::Syntax { path: importer.to_owned(), message };
    let pattern = path.to_str().ok_or_else(|| bad(format!("import {import:?} is not UTF-8")))?;
    let found = glob::glob(pattern).map_err(|error| bad(format!("import {import:?}: {error}")))?;
    Ok(found.flatten().collect())
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("a configuration is 1 MiB at the most"));
    }
    Ok(text)
}

fn parse(text: &str, path: &Path) -> Result<Table, ContainerdError> {
    toml::from_str(text).map_err(|error| ContainerdError::Syntax {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })
}

/// What files say together.
fn merged(files: &[ConfigFile]) -> Table {
    let mut sum = Table::new();
    let newest = files.first().and_then(|file| file.table.get("version")?.as_integer());
    let keywise = newest.is_some_and(|version| version >= NEW_FORMAT);
    for file in files {
        for (key, value) in &file.table {
            match (key.as_str(), sum.get_mut(key)) {
                ("plugins", Some(sum)) if keywise => add(sum, value),
                ("plugins" | "proxy_plugins", Some(Value::Table(sum))) => {
                    let tables = value.as_table().into_iter().flatten();
                    sum.extend(tables.map(|(id, table)| (id.clone(), table.clone())));
                }
                ("disabled_plugins", Some(Value::Array(sum))) => {
                    sum.extend(value.as_array().into_iter().flatten().cloned());
                }
                _ => drop(sum.insert(key.clone(), value.clone())),
            }
        }
    }
    sum
}

/// Adds a value to another: tables key by key, anything else in place of what was there.
fn add(sum: &mut Value, value: &Value) {
    match (sum, value) {
        (Value::Table(sum), Value::Table(value)) => {
            for (key, value) in value {
                match sum.get_mut(key) {
                    Some(sum) => add(sum, value),
                    None => drop(sum.insert(key.clone(), value.clone())),
                }
            }
        }
        (sum, value) => *sum = value.clone(),
    }
}

/// What a program said last: its error.
fn last_line(stderr: &[u8]) -> String {
    const CHARS_MAX: usize = 500;
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
    line.chars().take(CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(files: &[(&str, &str)]) -> Settings {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::create_dir_all(dir.path().join("d")).unwrap();
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let files = super::files(&dir.path().join("config.toml")).unwrap();
        Settings { by: By::Files, table: merged(&files) }
    }

    const PLUGIN: &str = "[proxy_plugins.weightfs]\ntype = \"snapshot\"\naddress = \"/w.sock\"\n";

    #[test]
    fn up_to_1_7_an_import_replaces_a_plugins_settings() {
        let main = "version = 2\nimports = [\"d/*.toml\"]\n\
            [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
            snapshotter = \"weightfs\"\ndisable_snapshot_annotations = false\n";
        let import = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
            default_runtime_name = \"x\"\n";
        let settings = settings(&[
            ("config.toml", main),
            ("d/a.toml", import),
            ("d/b.toml", &format!("version = 2\n{PLUGIN}")),
        ]);
        assert_eq!(settings.cri_snapshotter(), "overlayfs");
        assert!(!settings.cri_annotates());
        assert_eq!(settings.proxies()[0].address, "/w.sock");
    }

    #[test]
    fn from_2_0_on_an_import_adds_to_a_plugins_settings() {
        let main = format!(
            "version = 3\nimports = [\"d/*.toml\"]\n{PLUGIN}\
             [plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"weightfs\"\n"
        );
        let import = "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n\
            disable_snapshot_annotations = false\n\
            [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
            snapshotter = \"weightfs\"\n";
        let settings = settings(&[("config.toml", &main), ("d/a.toml", import)]);
        assert_eq!(settings.cri_snapshotter(), "weightfs");
        assert!(settings.cri_annotates() && settings.transfers_to("weightfs"));
        assert!(!settings.transfers_to("other"));
    }

    #[test]
    fn imports_are_bounded_and_never_read_twice() {
        let circle = settings(&[
            ("config.toml", "version = 2\nimports = [\"d/a.toml\"]"),
            ("d/a.toml", "imports = [\"../d/a.toml\", \"a.toml\"]"),
        ]);
        assert_eq!(circle.version(), 2);
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        std::fs::write(&main, "imports = [\"*.toml\"]").unwrap();
        for number in 0..FILES_MAX {
            std::fs::write(dir.path().join(format!("{number}.toml")), "").unwrap();
        }
        assert!(matches!(files(&main), Err(ContainerdError::TooMany { .. })));
        std::fs::write(&main, "imports = [\"missing.toml\"]").unwrap();
        assert!(matches!(files(&main), Err(ContainerdError::Read { .. })));
        assert_eq!(files(&dir.path().join("none/config.toml")).unwrap(), []);
    }

    #[test]
    fn fuzz_configurations_of_containerd_are_read_or_refused() {
        let sample = format!("version = 2\nimports = []\n{PLUGIN}");
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[sample.as_bytes()], input);
            let text = String::from_utf8_lossy(&bytes);
            let Ok(table) = parse(&text, Path::new("x")) else { return };
            let file = ConfigFile { path: "x".into(), text: text.to_string(), table };
            let settings = Settings { by: By::Files, table: merged(&[file.clone(), file]) };
            let _ = (settings.has_cri(), settings.cri_annotates(), settings.address());
            let named = |name: &String| settings.table["proxy_plugins"].get(name).is_some();
            assert!(settings.proxies().iter().all(|proxy| named(&proxy.name)));
        });
    }

    #[tokio::test]
    async fn without_the_program_the_files_say_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        std::fs::write(&config, format!("version = 2\n{PLUGIN}")).unwrap();
        let place = Place { program: dir.path().join("none"), config };
        assert_eq!(place.major_version().await.unwrap(), None);
        let settings = place.settings().await.unwrap();
        assert_eq!((settings.by, settings.proxies().len()), (By::Files, 1));
    }

    #[tokio::test]
    async fn what_containerd_refuses_is_told_in_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("containerd");
        let script = "#!/bin/sh\ncase \"$*\" in *version*) echo a b v2.1.9;; *)\
            echo first >&2; echo 'no good' >&2; exit 1;; esac\n";
        std::fs::write(&program, script).unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let place = Place { program, config: dir.path().join("config.toml") };
        assert_eq!(place.major_version().await.unwrap(), Some(2));
        let error = place.settings().await.unwrap_err().to_string();
        assert!(error.contains("no good") && !error.contains("first"), "{error}");
    }
}
