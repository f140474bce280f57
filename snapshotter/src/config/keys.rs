//! The keys of the configuration: what each means, how they are printed, and what was probably
//! meant by one that does not exist.

use toml::{Table, Value};

use super::Config;

/// Every key with what it means; `*` stands for a name of the user's choice.
pub(super) const KEYS: &[(&str, &str)] = &[
    ("root", "State directory: a local file system (ext4, xfs), one owner at a time."),
    ("snapshotter.address", "Unix socket on which containerd reaches the snapshotter."),
    (
        "snapshotter.min_layer_size",
        "Image layers in plain tar from this size on are mounted lazily; smaller ones are pulled.",
    ),
    ("control.address", "Unix socket on which this command line reaches the daemon."),
    (
        "metrics.address",
        "Prometheus metrics, by HTTP: a port of this machine (\"9478\"), or an address (\"0.0.0.0:9478\"). Unset: none.",
    ),
    ("containerd.config", "containerd's configuration, for `doctor` and `node install`."),
    ("containerd.program", "containerd's program, which knows what it is told."),
    (
        "cache.limit",
        "Disk space that the cache may take (\"500GiB\", \"80%\" of the file system). Unset: all but min_free.",
    ),
    (
        "cache.min_free",
        "What the cache leaves free of its file system (\"50GiB\", \"15%\"), whoever fills the rest.",
    ),
    (
        "cache.checkpoint_interval",
        "How long what was fetched may wait until it is synced and recorded (it survives a crash).",
    ),
    (
        "cache.recheck",
        "When what is cached is hashed again: \"after-crash\" of the machine, \"always\", \"never\".",
    ),
    (
        "cache.verify",
        "\"background\": serve what comes over a trusted transport, hash the whole when it is here; \"strict\": serve nothing of a blob before all of it is here and verified.",
    ),
    (
        "verify.referrers",
        "Which indexes beside an artifact are believed: those of the \"same-repository\", those that are \"signed\", none (\"off\"). One that the manifest names by its digest, or a file that is given, is believed in any case.",
    ),
    (
        "verify.keys",
        "Public keys (PEM files, as cosign makes them) of which one must have signed an index.",
    ),
    (
        "index.publish",
        "Make and push the index of an artifact that was loaded and verified here and has none.",
    ),
    ("fetch.deadline", "A read that no source has served within this time fails with EIO."),
    ("fetch.connections", "Requests in flight for one blob at the most."),
    (
        "fetch.connections_per_host",
        "Requests in flight to one host at the most; as many are sent as bring throughput.",
    ),
    ("fetch.request_size", "Bytes of one ranged request at the most."),
    ("fetch.read_ahead_min", "First read-ahead window of a sequential reader."),
    ("fetch.read_ahead_max", "Largest read-ahead window of a sequential reader."),
    (
        "fetch.background",
        "What is fetched unasked: the rest of \"touched-files\", \"everything\", or nothing (\"off\").",
    ),
    ("fetch.prefetch", "Fetch the headers, tokenizers and next shards that a loader will read."),
    (
        "credentials.sources",
        "Where credentials are looked for, in this order: what the kubelet tells the CRI proxy (\"pull-secrets\"), credentials.file (\"file\"), docker's config.json with its helpers (\"docker\"), and the kubelet's plugins (\"kubelet-plugins\").",
    ),
    (
        "credentials.docker_config",
        "Directory of docker's config.json. Unset: $DOCKER_CONFIG, else ~/.docker.",
    ),
    (
        "credentials.file",
        "A file in the format of docker's config.json, root's and with mode 0600. Unset: none.",
    ),
    (
        "credentials.plugin_config",
        "The kubelet's --image-credential-provider-config. Unset: its plugins are not asked.",
    ),
    ("credentials.plugin_dir", "The kubelet's --image-credential-provider-bin-dir."),
    (
        "cri.address",
        "Unix socket for the kubelet's --image-service-endpoint: all goes on to containerd, and the pull secrets are remembered (in memory) for lazy reads. Unset: none.",
    ),
    ("cri.containerd", "containerd's socket, which answers what comes to cri.address."),
    (
        "mirrors.hosts_dir",
        "containerd's directory of hosts.toml files, for registries that have no table here.",
    ),
    ("peers.listen", "Address and port at which other nodes reach this one. Unset: no peers."),
    (
        "peers.name",
        "This node among the members (\"host:port\"). Unset: the member that is an address of this machine.",
    ),
    ("peers.members", "All nodes, this one included: [\"host:port\", …]."),
    (
        "peers.dns",
        "Instead: a name whose addresses are the members (\"name:port\"), as of a headless service.",
    ),
    (
        "peers.service",
        "Instead: a service of Kubernetes whose endpoints are the members (\"namespace/name:port\"), for a daemon in a pod that may watch endpointslices, built with the feature endpoint-slices.",
    ),
    (
        "peers.trust",
        "\"digest\": bytes of peers are used where each chunk has a digest (an index); \"cluster\": always, and the whole is hashed when it is here.",
    ),
    ("peers.uploads", "Answers to other nodes at once; more are refused, and they ask elsewhere."),
    ("peers.ca_file", "PEM file of the authority that all peers' certificates are from."),
    ("peers.cert_file", "PEM file of this node's certificate, for servers and clients."),
    ("peers.key_file", "PEM file of its key. All three are read again when they change."),
    (
        "peers.server_name",
        "The name in all peers' certificates. Unset: each has the host that it is a member by.",
    ),
    ("peers.plaintext", "No TLS: between daemons on one machine, on loopback only."),
    (
        "dragonfly.endpoint",
        "The proxy of Dragonfly's daemon on this node (\"http://127.0.0.1:4001\"): blobs are fetched through it first. Unset: not used.",
    ),
    (
        "dragonfly.tag",
        "Keeps Dragonfly's tasks apart from those with another tag, or with none, on all nodes.",
    ),
    ("registry.*.plain_http", "Plain HTTP. Unset: only on loopback, as docker does it."),
    ("registry.*.ca_file", "PEM file of certificate authorities besides the system's."),
];

/// The tables, in the order in which they are printed; those of registries follow.
const SECTIONS: [&str; 13] = [
    "snapshotter",
    "control",
    "metrics",
    "containerd",
    "cri",
    "cache",
    "verify",
    "index",
    "fetch",
    "credentials",
    "mirrors",
    "peers",
    "dragonfly",
];

impl Config {
    /// The whole configuration as commented TOML; read again, it gives the same.
    pub fn to_commented_toml(&self) -> String {
        let values = Table::try_from(self).unwrap_or_default();
        let mut text = String::new();
        render(&mut text, &values, "");
        for section in SECTIONS {
            text.push_str(&format!("\n[{section}]\n"));
            if let Some(Value::Table(table)) = values.get(section) {
                render(&mut text, table, &format!("{section}."));
            }
        }
        text.push_str("\n# [registry.\"host:port\"]\n");
        let empty = Table::new();
        render(&mut text, &empty, "registry.*.");
        for (host, registry) in &self.registry {
            text.push_str(&format!("\n[registry.{}]\n", Value::String(host.clone())));
            text.push_str(&toml::to_string(registry).unwrap_or_default());
        }
        text
    }
}

/// The keys directly below `prefix`, with their values or, where they have none, as a comment.
fn render(text: &mut String, values: &Table, prefix: &str) {
    for (key, comment) in KEYS {
        let Some(name) = key.strip_prefix(prefix).filter(|name| !name.contains('.')) else {
            continue;
        };
        text.push_str(&format!("# {comment}\n"));
        match values.get(name) {
            Some(value) => text.push_str(&format!("{name} = {value}\n")),
            None => text.push_str(&format!("# {name} =\n")),
        }
    }
}

/// The first key of `table`, with its tables, that [`KEYS`] does not have.
pub(super) fn unknown_key(table: &Table, prefix: &str) -> Option<String> {
    table.iter().find_map(|(name, value)| {
        let known = match prefix {
            "registry." => format!("{prefix}*"),
            _ => format!("{prefix}{name}"),
        };
        let is_table = KEYS.iter().any(|(key, _)| key.starts_with(&format!("{known}.")));
        match value {
            Value::Table(inner) if is_table => unknown_key(inner, &format!("{known}.")),
            _ if is_table || KEYS.iter().any(|(key, _)| *key == known) => None,
            _ => Some(format!("{prefix}{name}")),
        }
    })
}

/// The key or table that is spelt most like it.
pub(super) fn nearest_key(unknown: &str) -> String {
    let distance = |key: &str| strsim::damerau_levenshtein(key, unknown);
    let tables = KEYS.iter().filter_map(|(key, _)| key.split_once('.').map(|(table, _)| table));
    let candidates = KEYS.iter().map(|(key, _)| *key).chain(tables);
    candidates.min_by_key(|key| distance(key)).unwrap_or("root").to_owned()
}
