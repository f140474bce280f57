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
        println!("{}", summary(&peers));
        print!("{}", table(&peers.peers));
    }
    Ok(())
}

pub fn to_json(reply: &PeersReply) -> serde_json::Value {
    let peer = |peer: &PeerState| json!({ "name": peer.name, "state": peer.state, "from": peer.from, "to": peer.to });
    json!({
        "name": reply.name,
        "from_registry": reply.from_registry,
        "from_peers": reply.from_peers,
        "to_peers": reply.to_peers,
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

fn table(peers: &[PeerState]) -> String {
    let width = peers.iter().map(|peer| peer.name.len()).max().unwrap_or(0).max(4);
    let [state, from, to] = ["STATE", "FROM", "TO"];
    let mut text = format!("\n{:<width$}  {state:<7}  {from:>10}  {to:>10}\n", "PEER");
    for peer in peers {
        let (from, to) = (size(peer.from), size(peer.to));
        text += &format!("{:<width$}  {:<7}  {from:>10}  {to:>10}\n", peer.name, peer.state);
    }
    text
}
