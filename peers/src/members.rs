//! Who the members are: a list, what a name resolves to, looked up again and again, or the endpoints
//! of a service of Kubernetes.

#[cfg(feature = "endpoint-slices")]
mod slices;

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
        let _new = peers.table.set_members(names.clone(), own);
    }
}

/// Looks members up until there are no peers any more.
pub(crate) async fn follow(peers: Weak<Peers>, members: Members, listen: SocketAddr) {
    match members {
        Members::Listed(_) => {}
        Members::Dns(name) => follow_name(peers, name, listen).await,
        #[cfg(feature = "endpoint-slices")]
        Members::Service(service) => slices::follow(peers, service, listen).await,
        #[cfg(not(feature = "endpoint-slices"))]
        Members::Service(_) => {}
    }
}

async fn follow_name(peers: Weak<Peers>, name: String, listen: SocketAddr) {
    loop {
        match tokio::net::lookup_host(name.as_str()).await {
            Ok(found) => {
                let Some(peers) = peers.upgrade() else { return };
                set(&peers, found.map(|address| address.to_string()).collect(), listen);
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

/// These are the members from now on.
fn set(peers: &Peers, mut found: Vec<String>, listen: SocketAddr) {
    found.sort_unstable();
    found.dedup();
    found.truncate(MAX_MEMBERS);
    let own = own_name(&found, listen);
    if peers.table.set_members(found, own) {
        debug!(members = peers.table.member_count(), "members changed");
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
