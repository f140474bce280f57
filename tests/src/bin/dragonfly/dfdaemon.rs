//! Dragonfly's daemon, the real one, as on a node of its own: with an address of its own of the loopback
//! network, where its usual ports are free.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Sub;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use weightfs_tests::Area;
use weightfs_tests::metrics;
use weightfs_tests::process::Service;

/// The port of the proxy that WeightFS asks.
const PROXY_PORT: u16 = 4001;
/// The port that its metrics are at.
const METRICS_PORT: u16 = 4002;

/// A running dfdaemon, which ends with this guard.
pub struct Dfdaemon {
    service: Service,
    ip: Ipv4Addr,
}

/// What a dfdaemon has downloaded, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Downloaded {
    /// From the registry.
    pub registry: u64,
    /// From other dfdaemons.
    pub peers: u64,
}

impl Dfdaemon {
    /// Starts one and waits until it takes requests.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start(area: &Area, binary: &Path, ip: Ipv4Addr, scheduler: SocketAddr) -> Self {
        let name = format!("dfdaemon-{ip}");
        let home = area.dir(&name);
        let server = json!({ "ip": ip });
        // JSON is YAML, too. There is no manager: the scheduler is named in a file of its own.
        let config = json!({
            "host": { "hostname": name, "ip": ip },
            "server": { "pluginDir": home.join("plugins"), "cacheDir": home.join("cache") },
            "download": { "server": { "socketPath": home.join("dfdaemon.sock") } },
            "upload": { "server": server },
            "storage": { "dir": home.join("storage"), "server": server },
            "proxy": { "server": server },
            "health": { "server": server },
            "metrics": { "server": server },
            "stats": { "server": server },
        });
        let schedulers = json!({ "scheduler": { "addrs": [scheduler] } });
        let mut command = Command::new(binary);
        command
            .arg("--config")
            .arg(area.file(&format!("{name}/config.yaml"), config.to_string()))
            .arg("--dynconfig")
            .arg(area.file(&format!("{name}/schedulers.yaml"), schedulers.to_string()))
            .arg("--log-dir")
            .arg(area.dir(&format!("{name}/log")))
            .arg("--console");
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        let mut service = Service::start(area, &name, command);
        service.wait_ready(|_| TcpStream::connect((ip, PROXY_PORT)).ok());
        Self { service, ip }
    }

    /// What `dragonfly.endpoint` is on its node.
    pub fn endpoint(&self) -> String {
        format!("http://{}:{PROXY_PORT}", self.ip)
    }

    /// What it has downloaded so far.
    pub fn downloaded(&self) -> Downloaded {
        let (_, _, text) = metrics::get(&format!("{}:{METRICS_PORT}", self.ip), "/metrics");
        let of = |kind: &str| {
            let series = format!("dragonfly_client_download_traffic{{type=\"{kind}\"}} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&series));
            value.map_or(0, |value| value.parse().unwrap())
        };
        Downloaded { registry: of("BACK_TO_SOURCE"), peers: of("REMOTE_PEER") }
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        self.service.kill();
    }
}

impl Sub for Downloaded {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { registry: self.registry - before.registry, peers: self.peers - before.peers }
    }
}
