//! Putting WeightFS in place on a node, and taking it away again: containerd's configuration and
//! systemd's units.
//!
//! A file is changed in place, with a copy of it beside. Where a plugin of containerd has settings
//! already, ours go to the same file, since up to 1.7 the last file with a plugin's table replaces
//! all others; else to a file of our own in a directory that is imported, if there is one.
//!
//! Invariants: what was installed is recorded before anything is changed, so that it can be taken
//! away from any point on; a file that nobody has changed since is afterwards, byte for byte, what
//! it was; of one that was changed, only our keys are taken out.

mod edit;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use toml_edit::DocumentMut;

use self::edit::{Setting, Wanted};
use super::containerd::{ConfigFile, ContainerdError, Place, absolute, files, imports};
use crate::config::Config;

/// What is installed, below the prefix.
const RECORD: &str = "etc/weightfs/installed.json";
/// Where units of the administrator are, below the prefix.
const UNITS: &str = "etc/systemd/system";
/// Where units of packages are: then none are needed.
const PACKAGED_UNITS: [&str; 2] = ["usr/lib/systemd/system", "lib/systemd/system"];
/// Name of our own file in a directory that is imported.
const DROP_IN: &str = "weightfs.toml";
/// Ending of the copy of a file that was changed.
const COPY: &str = "before-weightfs";

const DROP_IN_HEAD: &str = "# Written by `weightfs node install`; `uninstall` takes it away.\n";

/// The units, as the packages have them.
const UNIT_FILES: [(&str, &str); 3] = [
    ("weightfs.service", include_str!("../../../packaging/systemd/weightfs.service")),
    ("weightfs.socket", include_str!("../../../packaging/systemd/weightfs.socket")),
    ("weightfs-control.socket", include_str!("../../../packaging/systemd/weightfs-control.socket")),
];
/// What stands for the program in the units.
const UNIT_PROGRAM: &str = "/usr/bin/weightfs";

/// Why it can't be put in place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// containerd's configuration can't be read.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// There is no program to ask which containerd it is.
    #[error("{} is not here: name containerd's program (containerd.program)", .0.display())]
    NoContainerd(PathBuf),
    /// A format in which plugins have other names.
    #[error(
        "{} is of version {version}; rewrite it as version 2 (containerd 2 does it by `containerd \
         config migrate`)",
        path.display()
    )]
    OldFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: i64,
    },
    /// The configuration has something else there.
    #[error("`{key}` in containerd's configuration is no table")]
    NotATable {
        /// The key.
        key: String,
    },
    /// A file can't be edited.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// containerd reads its configuration otherwise than was meant.
    #[error("containerd does not take it, so it was taken back: {0}")]
    NotTaken(String),
}

/// What becomes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The file.
    pub path: PathBuf,
    /// What is in it now; `None`: it is not there.
    pub now: Option<String>,
    /// What is in it without us.
    before: Option<String>,
    /// What shall be in it.
    pub after: Option<String>,
}

/// Where things go.
#[derive(Debug, Clone)]
pub struct Target {
    /// containerd.
    pub place: Place,
    /// What `/etc` is in, `/` but for tests and images.
    pub prefix: PathBuf,
    /// The program that the units start.
    pub program: PathBuf,
}

/// What was installed.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Installed {
    files: BTreeMap<PathBuf, InstalledFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct InstalledFile {
    /// Copy of what was there; `None`: nothing was.
    copy: Option<PathBuf>,
    /// sha256 of what was written.
    written: String,
}

/// What has to be changed to put it in place; nothing if it is.
///
/// # Errors
/// A configuration that can't be read or edited, and no containerd.
pub async fn plan(config: &Config, target: &Target) -> Result<Vec<Change>, InstallError> {
    let major = target.place.major_version().await?;
    let major = major.ok_or_else(|| InstallError::NoContainerd(target.place.program.clone()))?;
    let wanted = Wanted {
        address: config.snapshotter.address.display().to_string(),
        root: config.root.display().to_string(),
        major,
    };
    let installed = target.installed()?;
    let mut texts = target.containerd(&wanted, &installed)?;
    texts.extend(target.units(&installed)?);
    let mut changes = Vec::new();
    for (path, (before, after)) in texts {
        let now = read(&path)?;
        changes.push(Change { path, now, before, after: Some(after) });
    }
    // What was put elsewhere when the configuration was another one.
    let stale = plan_removal(target)?.into_iter();
    let is_stale = |change: &Change| changes.iter().all(|wanted| wanted.path != change.path);
    let stale: Vec<_> = stale.filter(is_stale).collect();
    changes.extend(stale);
    Ok(changes)
}

/// What has to be changed to take it away; nothing if nothing is installed.
///
/// # Errors
/// Files that can't be read.
pub fn plan_removal(target: &Target) -> Result<Vec<Change>, InstallError> {
    let installed = target.installed()?;
    let change = |(path, file): (&PathBuf, &InstalledFile)| {
        let before = file.before(path)?;
        Ok(Change { path: path.clone(), now: read(path)?, before: before.clone(), after: before })
    };
    installed.files.iter().map(change).collect()
}

/// Puts it in place.
///
/// # Errors
/// Files that can't be written.
pub fn install(target: &Target, changes: &[Change]) -> Result<(), InstallError> {
    let mut record = Installed::default();
    for Change { path, before, after, .. } in changes {
        let copy = match before {
            None => None,
            Some(text) => {
                let copy = beside(path, COPY);
                write(&copy, text, Some(path))?;
                Some(copy)
            }
        };
        let written = sum(after.as_deref().unwrap_or_default());
        record.files.insert(path.clone(), InstalledFile { copy, written });
    }
    let text = serde_json::to_string_pretty(&record).unwrap_or_default();
    write(&target.prefix.join(RECORD), &text, None)?;
    changes.iter().try_for_each(Change::carry_out)
}

/// Takes it away.
///
/// # Errors
/// Files that can't be written.
pub fn uninstall(target: &Target, changes: &[Change]) -> Result<(), InstallError> {
    changes.iter().try_for_each(Change::carry_out)?;
    for file in target.installed()?.files.values() {
        file.copy.as_deref().map_or(Ok(()), remove)?;
    }
    for (name, _) in UNIT_FILES {
        // What `systemctl enable` has made.
        for wants in ["multi-user.target.wants", "sockets.target.wants"] {
            let link = target.prefix.join(UNITS).join(wants).join(name);
            if link.is_symlink() {
                remove(&link)?;
            }
        }
    }
    remove(&target.prefix.join(RECORD))
}

impl Change {
    /// Whether there is something to do.
    pub fn is_due(&self) -> bool {
        self.now != self.after
    }

    fn carry_out(&self) -> Result<(), InstallError> {
        match &self.after {
            _ if !self.is_due() => Ok(()),
            Some(text) => write(&self.path, text, None),
            None => remove(&self.path),
        }
    }
}

impl InstalledFile {
    /// What the file is without us.
    fn before(&self, path: &Path) -> Result<Option<String>, InstallError> {
        let copy = match &self.copy {
            Some(copy) => read(copy)?,
            None => None,
        };
        let Some(now) = read(path)? else { return Ok(None) };
        let is_toml = path.extension().is_some_and(|extension| extension == "toml");
        if sum(&now) == self.written || !is_toml {
            return Ok(copy);
        }
        let (mut document, before) =
            (document(path, &now)?, document(path, copy.as_deref().unwrap_or_default())?);
        let everything = Wanted { address: String::new(), root: String::new(), major: 2 };
        for setting in everything.settings(2).iter().rev() {
            setting.undo(&mut document, &before);
        }
        let is_empty = document.iter().all(|(key, _)| key == "version");
        Ok((copy.is_some() || !is_empty).then(|| document.to_string()))
    }
}

/// For each file what is in it without us, and what shall be.
type Texts = BTreeMap<PathBuf, (Option<String>, String)>;

impl Target {
    fn installed(&self) -> Result<Installed, InstallError> {
        let path = self.prefix.join(RECORD);
        let Some(text) = read(&path)? else { return Ok(Installed::default()) };
        serde_json::from_str(&text)
            .map_err(|error| InstallError::Syntax { path, message: error.to_string() })
    }

    fn containerd(&self, wanted: &Wanted, installed: &Installed) -> Result<Texts, InstallError> {
        let main = &self.place.config;
        let files = self.files_without_us(installed)?;
        let version = version(&files, wanted)?;
        let mut documents = BTreeMap::new();
        for setting in wanted.settings(version) {
            let path = file_of(&setting, &files, main);
            let before = files.iter().find(|file| file.path == path);
            if !documents.contains_key(&path) {
                // As it is now: what is in place stays where it is.
                let text = match read(&path)? {
                    Some(text) => text,
                    None => format!("{DROP_IN_HEAD}version = {version}\n"),
                };
                let mut document = document(&path, &text)?;
                if document.get("version").is_none() && path == *main {
                    document.insert("version", toml_edit::value(version));
                }
                let before = before.map(|file| file.text.clone());
                documents.insert(path.clone(), (before, document));
            }
            if let Some((_, document)) = documents.get_mut(&path) {
                setting.apply(document)?;
            }
        }
        let text = |(path, (before, document)): (PathBuf, (Option<String>, DocumentMut))| {
            (path, (before, document.to_string()))
        };
        Ok(documents.into_iter().map(text).collect())
    }

    /// containerd's files as they would be if nothing were installed.
    fn files_without_us(&self, installed: &Installed) -> Result<Vec<ConfigFile>, InstallError> {
        let mut files = files(&self.place.config)?;
        let mut without = Vec::new();
        for file in files.drain(..) {
            match installed.files.get(&file.path) {
                None => without.push(file),
                Some(ours) => {
                    if let Some(text) = ours.before(&file.path)? {
                        let table =
                            toml::from_str(&text).map_err(|error| InstallError::Syntax {
                                path: file.path.clone(),
                                message: error.to_string(),
                            })?;
                        without.push(ConfigFile { text, table, path: file.path });
                    }
                }
            }
        }
        Ok(without)
    }

    /// The units, unless a package has brought them.
    fn units(&self, installed: &Installed) -> Result<Texts, InstallError> {
        let packaged = |dir: &str| self.prefix.join(dir).join("weightfs.service").exists();
        if PACKAGED_UNITS.into_iter().any(packaged) {
            return Ok(Texts::new());
        }
        let program = self.program.display().to_string();
        let unit = |(name, text): &(&str, &str)| {
            let path = self.prefix.join(UNITS).join(name);
            let before = match installed.files.get(&path) {
                Some(ours) => ours.before(&path)?,
                None => read(&path)?,
            };
            Ok((path, (before, text.replace(UNIT_PROGRAM, &program))))
        };
        UNIT_FILES.iter().map(unit).collect()
    }
}

/// The version of the format that is written.
fn version(files: &[ConfigFile], wanted: &Wanted) -> Result<i64, InstallError> {
    let newest = if wanted.major >= 2 { 3 } else { 2 };
    let Some(main) = files.first().filter(|main| !main.table.is_empty()) else {
        return Ok(newest);
    };
    match main.table.get("version").and_then(toml::Value::as_integer).unwrap_or(1) {
        version if version >= 2 => Ok(version),
        version => Err(InstallError::OldFormat { path: main.path.clone(), version }),
    }
}

/// The file that a setting goes to: the last one that has its section, else one of our own where a
/// directory is imported. 1.6 takes a pattern that is not absolute from its working directory.
fn file_of(setting: &Setting, files: &[ConfigFile], main: &Path) -> PathBuf {
    let has = |file: &&ConfigFile| {
        let mut section = setting.section().iter();
        let first = section.next().and_then(|name| file.table.get(*name));
        section
            .try_fold(first, |table, name| table.map(|table| table.get(name)))
            .flatten()
            .is_some()
    };
    if let Some(file) = files.iter().rfind(has) {
        return file.path.clone();
    }
    let own = files.first().and_then(|main| {
        imports(&main.table).find_map(|import| {
            let pattern = absolute(&main.path, import);
            let own = pattern.parent()?.join(DROP_IN);
            let matches = glob::Pattern::new(pattern.to_str()?).ok()?.matches_path(&own);
            let absolute = Path::new(import).is_absolute();
            (matches && absolute && import.contains('*') && own.parent()?.is_dir()).then_some(own)
        })
    });
    own.unwrap_or_else(|| main.to_owned())
}

fn document(path: &Path, text: &str) -> Result<DocumentMut, InstallError> {
    text.parse().map_err(|error: toml_edit::TomlError| InstallError::Syntax {
        path: path.to_owned(),
        message: error.to_string(),
    })
}

fn sum(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    |source| InstallError::Io { path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<Option<String>, InstallError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path)(error)),
    }
}

fn remove(path: &Path) -> Result<(), InstallError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

/// Replaces a file as a whole; its mode is that of `like`, else its own, if it is there.
fn write(path: &Path, text: &str, like: Option<&Path>) -> Result<(), InstallError> {
    use std::io::Write as _;
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).map_err(at(directory))?;
    let mut new = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(at(directory))?;
    let written = new.write_all(text.as_bytes()).and_then(|()| new.as_file().sync_all());
    written.map_err(at(path))?;
    if let Ok(found) = std::fs::metadata(like.unwrap_or(path)) {
        std::fs::set_permissions(new.path(), found.permissions()).map_err(at(path))?;
    }
    new.persist(path).map_err(|error| at(path)(error.error))?;
    Ok(())
}
