//! `weightfs csi`.

use std::path::PathBuf;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use weightfs::cli::CsiArgs;
use weightfs::config::Config;
use weightfs::csi::{self, Plugin};

/// Where the kubelet's plugins have their directories.
const PLUGINS: &str = "/var/lib/kubelet/plugins";

/// Serves the plugin's sockets until a signal. Volumes stay.
pub async fn run(config: &Config, arguments: CsiArgs) -> anyhow::Result<()> {
    let CsiArgs { endpoint, node_id, driver_name, registration_dir } = arguments;
    let endpoint = match endpoint {
        Some(endpoint) => PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(&endpoint)),
        None => PathBuf::from(PLUGINS).join(driver_name.to_string()).join("csi.sock"),
    };
    let endpoint = std::path::absolute(endpoint).context("--endpoint")?;
    let node_id = match node_id {
        Some(node_id) => node_id,
        None => nix::unistd::gethostname()
            .context("the host name")?
            .into_string()
            .map_err(|name| anyhow::anyhow!("the host name {name:?} is no text; give --node-id"))?,
    };
    let plugin = Plugin {
        driver: driver_name,
        node_id: node_id.parse().context("--node-id")?,
        control: config.control.address.clone(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(csi::serve(plugin, &endpoint, registration_dir.as_deref(), stop).await?)
}
