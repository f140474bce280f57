//! `weightfs peers`: the other nodes.

use anyhow::Context as _;
use serde_json::json;
use weightfs::config::Config;
use weightfs::{control, owner};
use weightfs_proto::control::{PeerState, PeersReply, PeersRequest};

use super::size;

/// Asks the daemon that owns the state directory.
pub async fn run(config: &Config, as_json: bool) -> anyhow::Result<()> {
    let root = config.root.display();
    let address = owner::control_address(&config.root)
        .with_context(|| format!("no daemon owns {root}; start one with `weightfs serve`"))?;
    let mut daemon = control::connect(&address)
        .await
        .with_context(|| format!("the daemon's control socket {}", address.display()))?;
    let peers = daemon.peers(PeersRequest {}).await;
    let peers = peers.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner();
    if as_json {
        println!("{}", serde_json::to_string_pretty(&to_json(&peers))?);
    } else {
        println!("{}\n{}", summary(&peers), now(&peers));
        print!("{}", table(&peers.peers));
    }
    Ok(())
}

pub fn to_json(reply: &PeersReply) -> serde_json::Value {
    let peer = |peer: &PeerState| {
        json!({
            "name": peer.name,
            "state": peer.state,
            "from": peer.from,
            "from_rate": peer.from_rate,
            "to": peer.to,
            "to_rate": peer.to_rate,
        })
    };
    json!({
        "name": reply.name,
        "from_registry": reply.from_registry,
        "from_peers": reply.from_peers,
        "to_peers": reply.to_peers,
        "from_registry_rate": reply.from_registry_rate,
        "from_peers_rate": reply.from_peers_rate,
        "to_peers_rate": reply.to_peers_rate,
        "lies": reply.lies,
        "fallbacks": reply.fallbacks,
        "peers": reply.peers.iter().map(peer).collect::<Vec<_>>(),
    })
}

/// What came from where, in one line.
pub fn summary(reply: &PeersReply) -> String {
    let PeersReply { from_registry, from_peers, to_peers, .. } = reply;
    let [registry, peers, given] = [from_registry, from_peers, to_peers].map(|bytes| size(*bytes));
    let well = reply.peers.iter().filter(|peer| peer.state == "ok").count();
    format!(
        "{well} of {} peers answer; {peers} came from them, {registry} from registries; \
         {given} given",
        reply.peers.len()
    )
}

/// What flows at this moment, in one line.
fn now(reply: &PeersReply) -> String {
    let PeersReply { from_registry_rate, from_peers_rate, to_peers_rate, .. } = reply;
    format!(
        "now: {} from peers, {} from registries, {} given",
        rate(*from_peers_rate),
        rate(*from_registry_rate),
        rate(*to_peers_rate)
    )
}

fn rate(bytes: u64) -> String {
    format!("{}/s", size(bytes))
}

fn table(peers: &[PeerState]) -> String {
    let width = peers.iter().map(|peer| peer.name.len()).max().unwrap_or(0).max(4);
    let row = |name: &str, state: &str, numbers: [String; 4]| {
        let [from, from_rate, to, to_rate] = numbers;
        format!("{name:<width$}  {state:<6}  {from:>9}  {from_rate:>11}  {to:>9}  {to_rate:>11}\n")
    };
    let mut text = String::from("\n");
    text += &row("PEER", "STATE", ["FROM", "NOW", "TO", "NOW"].map(str::to_owned));
    for PeerState { name, state, from, to, from_rate, to_rate } in peers {
        let numbers = [size(*from), rate(*from_rate), size(*to), rate(*to_rate)];
        text += &row(name, state, numbers);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_a_terminal_and_says_what_flows() {
        let (from, to) = (123_400_000_000, 567 << 20);
        let peer = PeerState {
            name: "10.255.255.255:9480".into(),
            state: "banned".into(),
            from,
            to,
            from_rate: 1_250_000_000,
            to_rate: 0,
        };
        let text = table(&[peer]);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let row = text.lines().last().unwrap();
        for part in ["10.255.255.255:9480", "banned", &size(from), &rate(1_250_000_000), &size(to)]
        {
            assert!(row.contains(part), "{part:?} in {row}");
        }
    }
}
