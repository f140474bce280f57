//! Who the members are: a list, or what a name resolves to, looked up again and again.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Weak;
use std::time::Duration;

use tracing::{debug, warn};

use crate::{Members, Peers};

/// Between two look-ups. A headless service of Kubernetes gives its records for about as long.
const LOOK_UP_EVERY: Duration = Duration::from_secs(5);

/// Members that are known at the most.
const MAX_MEMBERS: usize = 8192;

/// Sets what is known at once.
pub(crate) fn begin(peers: &Peers, members: &Members, listen: SocketAddr) {
    if let Members::Listed(names) = members {
        let own = own_name(names, listen);
        if peers.table.my_name().is_none() && own.is_none() {
            warn!("none of peers.members is this node: it asks others, and they don't know it");
        }
        peers.table.set_members(names.clone(), own);
    }
}

/// Looks members up until there are no peers any more.
pub(crate) async fn follow(peers: Weak<Peers>, members: Members, listen: SocketAddr) {
    let Members::Dns(name) = members else { return };
    let mut known: Vec<String> = vec![];
    loop {
        match tokio::net::lookup_host(name.as_str()).await {
            Ok(found) => {
                let mut found: Vec<_> = found.map(|address| address.to_string()).collect();
                found.sort_unstable();
                found.dedup();
                found.truncate(MAX_MEMBERS);
                if found != known {
                    debug!(name, members = found.len(), "members changed");
                    let Some(peers) = peers.upgrade() else { return };
                    let own = own_name(&found, listen);
                    peers.table.set_members(found.clone(), own);
                    known = found;
                }
            }
            // Who was known is asked on: they are set aside if they are gone.
            Err(error) => warn!(name, %error, "members can't be looked up"),
        }
        tokio::time::sleep(LOOK_UP_EVERY).await;
        if peers.strong_count() == 0 {
            return;
        }
    }
}

/// The member that is this node: it has the port that is listened on, and an address of this
/// machine.
fn own_name(names: &[String], listen: SocketAddr) -> Option<String> {
    let is_own = |address: SocketAddr| {
        let same = listen.ip().is_unspecified() || listen.ip() == address.ip();
        address.port() == listen.port() && same && is_local(address.ip())
    };
    names.iter().find(|name| name.parse().is_ok_and(is_own)).cloned()
}

fn is_local(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_finds_itself_among_the_members() {
        let names = ["192.0.2.1:7700", "127.0.0.1:7701", "127.0.0.1:7700"].map(str::to_owned);
        let own = |listen: &str| own_name(&names, listen.parse().unwrap());
        assert_eq!(own("0.0.0.0:7700").as_deref(), Some("127.0.0.1:7700"));
        assert_eq!(own("127.0.0.1:7701").as_deref(), Some("127.0.0.1:7701"));
        assert_eq!(own("0.0.0.0:7702"), None);
        assert_eq!(own("192.0.2.1:7700"), None, "it is no address of this machine");
    }
}
