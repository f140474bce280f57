//! containerd: whether it is told of the snapshotter, sends it the labels without which nothing is
//! lazy, and has loaded it.

use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;

use super::{At, Finding};
use crate::config::Config;
use crate::node::containerd::{By, CRI, CRI_IMAGES, NEW_FORMAT, Place, Proxy, Settings, TRANSFER};

/// How long containerd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How most of it is mended.
const INSTALL: &str = "weightfs node install, then systemctl restart containerd";

/// Looks at what it is told, and at what it does.
pub(super) async fn examine(config: &Config, place: &Place) -> Vec<Finding> {
    let (known, mut findings) = configured(config, place).await;
    if let Some((settings, name)) = known {
        findings.push(loaded(&settings.address(), &name).await);
    }
    findings
}

/// Looks at what it is told; gives also the settings, and the snapshotter's name in them.
pub(super) async fn configured(
    config: &Config,
    place: &Place,
) -> (Option<(Settings, String)>, Vec<Finding>) {
    let at = At::new("containerd", place.config.display());
    let settings = match place.settings().await {
        Ok(settings) => settings,
        Err(error) => return (None, vec![at.mend(error, "mend containerd's configuration")]),
    };
    let mut findings = Vec::new();
    if settings.by == By::Files {
        let program = place.program.display();
        let found = format!("read from its files: {program} is not here, which would know better");
        findings.push(at.note(found, "set containerd.program"));
    }
    let wanted = config.snapshotter.address.to_string_lossy();
    let mut proxies = settings.proxies();
    let Some(position) = proxies.iter().position(|proxy| proxy.address == wanted) else {
        findings.push(no_proxy(&at, &proxies, &wanted));
        return (None, findings);
    };
    let proxy = proxies.swap_remove(position);
    findings.push(at.fine(format!("knows the snapshotter as {}", proxy.name)));
    findings.extend(labels(&at, &settings, &proxy, &config.root));
    (Some((settings, proxy.name)), findings)
}

fn no_proxy(at: &At, proxies: &[Proxy], wanted: &str) -> Finding {
    match proxies.iter().find(|proxy| proxy.name == "weightfs") {
        Some(other) => at.mend(
            format!(
                "[proxy_plugins.weightfs] has the address {}, the daemon listens at {wanted}",
                other.address
            ),
            format!("make one like the other: {INSTALL}"),
        ),
        None => at.mend(format!("no [proxy_plugins] of it has the address {wanted}"), INSTALL),
    }
}

/// Without labels nothing can be lazy.
fn labels(at: &At, settings: &Settings, proxy: &Proxy, root: &Path) -> Vec<Finding> {
    let name = &proxy.name;
    let new = settings.version() >= NEW_FORMAT;
    let mut findings = Vec::new();
    let table = match new {
        true => format!("[plugins.\"{CRI_IMAGES}\"]"),
        false => format!("[plugins.\"{CRI}\".containerd]"),
    };
    if settings.has_cri() {
        findings.push(match (settings.cri_snapshotter(), settings.cri_annotates()) {
            (snapshotter, _) if snapshotter != name => at.note(
                format!("CRI pulls with {snapshotter}: Kubernetes' images are not lazy"),
                format!("{INSTALL} (snapshotter = \"{name}\" in {table})"),
            ),
            (_, false) => at.mend(
                "CRI does not say which layer it pulls: nothing is lazy",
                format!("{INSTALL} (disable_snapshot_annotations = false in {table})"),
            ),
            (_, true) => at.fine("CRI pulls with it, and says which layer it pulls"),
        });
    }
    if new {
        findings.extend(exports(at, settings, proxy, root));
    }
    findings
}

/// What only 2.0 and later have to be told.
fn exports(at: &At, settings: &Settings, proxy: &Proxy, root: &Path) -> Vec<Finding> {
    let name = &proxy.name;
    let table = format!("[proxy_plugins.{name}.exports]");
    let mut findings = Vec::new();
    if !proxy.annotations {
        let key = "enable_remote_snapshot_annotations = \"true\"";
        findings.push(at.mend(
            "the transfer service does not say which layer it pulls: nothing is lazy",
            format!("{INSTALL} ({key} in {table})"),
        ));
    }
    if !settings.transfers_to(name) {
        let list = format!("[[plugins.\"{TRANSFER}\".unpack_config]]");
        findings.push(at.mend(
            format!("the transfer service may not unpack into {name}: `ctr` can't pull with it"),
            format!("{INSTALL} ({list}, one for {name} and one for overlayfs)"),
        ));
    }
    if proxy.root.as_deref().map(Path::new) != Some(root) {
        findings.push(at.note(
            "the kubelet is told of another image file system than the cache's",
            format!("{INSTALL} (root = \"{}\" in {table})", root.display()),
        ));
    }
    findings
}

/// Whether the containerd that runs has the plugin.
async fn loaded(address: &Path, name: &str) -> Finding {
    let at = At::new("containerd runs", address.display());
    let ask = async {
        let channel = containerd_client::connect(address).await.ok()?;
        let request = PluginsRequest { filters: vec![format!("id=={name}")] };
        let answer = IntrospectionClient::new(channel).plugins(request).await.ok()?;
        Some(answer.into_inner().plugins)
    };
    match tokio::time::timeout(PATIENCE, ask).await.ok().flatten() {
        None => at.note("it does not answer", "systemctl start containerd"),
        Some(plugins) => match plugins.first() {
            Some(plugin) if plugin.init_err.is_none() => at.fine(format!("with {name}")),
            Some(_) => at.mend(format!("it could not load {name}"), "see its log"),
            None => at.mend(
                format!("without {name}: it was started before its configuration was changed"),
                "systemctl restart containerd",
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    /// The levels that are found with a configuration, and all that is found.
    async fn found(text: &str) -> (Vec<Level>, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let place = Place { program: dir.path().join("none"), config: path };
        let (_, findings) = configured(&Config::default(), &place).await;
        // The first one says that the files were read.
        let levels = findings[1..].iter().map(|finding| finding.level).collect();
        (levels, findings.into_iter().map(|finding| finding.found + &finding.mend).collect())
    }

    const OLD: &str = include_str!("../../../../packaging/containerd/config-v2.toml");
    const NEW: &str = include_str!("../../../../packaging/containerd/config-v3.toml");

    #[tokio::test]
    async fn the_snippets_that_come_with_it_are_fine() {
        use Level::Fine;
        assert_eq!(found(OLD).await.0, [Fine, Fine]);
        assert_eq!(found(NEW).await.0, [Fine, Fine]);
    }

    #[tokio::test]
    async fn what_is_missing_is_named() {
        use Level::{Fine, Mend, Note};
        let (levels, text) = found("version = 2").await;
        assert_eq!(levels, [Mend]);
        assert!(text.contains("weightfs node install"), "{text}");
        let (levels, text) = found(&OLD.replace("snapshotter.sock", "other.sock")).await;
        assert_eq!(levels, [Mend]);
        assert!(text.contains("/run/weightfs/other.sock"), "{text}");
        let (levels, text) = found(&OLD.replace("= false", "= true")).await;
        assert_eq!(levels, [Fine, Mend]);
        assert!(text.contains("disable_snapshot_annotations"), "{text}");
        let (levels, _) = found(&OLD.replace("snapshotter = ", "other = ")).await;
        assert_eq!(levels, [Fine, Note]);
        let (levels, text) = found(&NEW.replace("\"true\"", "\"false\"")).await;
        assert_eq!(levels, [Fine, Fine, Mend]);
        assert!(text.contains("enable_remote_snapshot_annotations"), "{text}");
        let (levels, text) = found(&NEW.replace("/var/lib/weightfs", "/elsewhere")).await;
        assert_eq!(levels, [Fine, Fine, Note]);
        assert!(text.contains("/var/lib/weightfs"), "{text}");
        let (levels, text) = found(&NEW.replace("unpack_config", "unpack")).await;
        assert_eq!(levels, [Fine, Fine, Mend]);
        assert!(text.contains("ctr"), "{text}");
    }

    #[tokio::test]
    async fn what_is_no_configuration_is_to_be_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "version = ").unwrap();
        let place = Place { program: dir.path().join("none"), config: path };
        let (known, findings) = configured(&Config::default(), &place).await;
        assert!(known.is_none());
        assert_eq!(findings[0].level, Level::Mend);
    }
}
