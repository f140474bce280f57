//! Hosts with links of their own: network namespaces joined by a bridge, shaped by the kernel's
//! token bucket.
//!
//! A namespace is a file below the area: unmounted with it, and gone with its last process. Nothing
//! of it is seen outside, so addresses and names are always free.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::area::Area;
use crate::process::run;

/// What a link's sender may be ahead of its rate: bytes that leave at once, and time in its queue.
const BURST_BYTES: u64 = 64 << 10;
const QUEUE_MILLISECONDS: u64 = 20;

/// A link's rate, in 10⁶ bits a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Megabits(pub f64);

impl Megabits {
    /// Bytes a second.
    pub fn bytes_per_second(self) -> f64 {
        self.0 * 1e6 / 8.0
    }
}

/// A bridge that hosts join.
#[derive(Debug)]
pub struct Network {
    hub: Namespace,
    dir: PathBuf,
    joined: AtomicU8,
}

impl Network {
    /// A bridge that nobody has joined.
    pub fn new(area: &Area) -> Self {
        let dir = area.dir("net");
        let hub = Namespace::new(&dir.join("hub"));
        hub.ip("link add hub type bridge");
        hub.ip("link set hub up");
        Self { hub, dir, joined: AtomicU8::new(0) }
    }

    /// A host with a link of that rate, both ways.
    pub fn join(&self, rate: Megabits) -> NetHost {
        let number = self.joined.fetch_add(1, Ordering::Relaxed) + 1;
        let namespace = Namespace::new(&self.dir.join(format!("host-{number}")));
        let address = Ipv4Addr::new(10, 0, 0, number);
        let port = format!("port{number}");
        let file = namespace.file.display();
        self.hub.ip(&format!("link add {port} type veth peer name eth0 netns {file}"));
        self.hub.ip(&format!("link set {port} master hub up"));
        namespace.ip("link set lo up");
        namespace.ip(&format!("addr add {address}/24 dev eth0"));
        namespace.ip("link set eth0 up");
        let host = NetHost { namespace, hub: self.hub.clone(), port, address };
        host.set_rate(rate);
        host
    }
}

/// A network namespace with one link.
#[derive(Debug)]
pub struct NetHost {
    namespace: Namespace,
    hub: Namespace,
    /// Its end of the link at the bridge.
    port: String,
    address: Ipv4Addr,
}

impl NetHost {
    /// Where the others reach it.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The link's rate from now on, both ways.
    pub fn set_rate(&self, rate: Megabits) {
        self.namespace.shape("eth0", rate);
        // What a host's own card has: three bands by the priority of a socket.
        self.namespace.tc("qdisc replace dev eth0 parent 1:1 pfifo_fast");
        self.hub.shape(&self.port, rate);
    }

    /// The link breaks, or works again.
    pub fn set_up(&self, up: bool) {
        let word = if up { "up" } else { "down" };
        self.hub.ip(&format!("link set {} {word}", self.port));
    }

    /// Runs something on a thread of this host: the sockets that it makes are the host's.
    pub fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        let file = File::open(&self.namespace.file).unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                what()
            });
            thread.join().unwrap()
        })
    }

    /// A program that will run on this host, without arguments.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = self.namespace.enter();
        command.arg(program);
        command
    }
}

/// A network namespace, held by a file that its inode is mounted on.
#[derive(Debug, Clone)]
struct Namespace {
    file: PathBuf,
}

impl Namespace {
    fn new(file: &Path) -> Self {
        fs::write(file, "").unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, as root");
                let own = Path::new("/proc/thread-self/ns/net");
                let none: Option<&str> = None;
                mount(Some(own), file, none, MsFlags::MS_BIND, none).expect("its inode is mounted");
            });
            thread.join().unwrap();
        });
        Self { file: file.to_owned() }
    }

    /// What runs a command here. Mounts stay those of the caller, unlike with `ip netns exec`.
    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.file.display())).arg("--");
        command
    }

    fn ip(&self, line: &str) {
        run(self.enter().arg("ip").args(line.split(' '))).ok();
    }

    fn shape(&self, device: &str, rate: Megabits) {
        let queue = rate.bytes_per_second() * QUEUE_MILLISECONDS as f64 / 1e3;
        let limit = BURST_BYTES + queue as u64;
        let bits = (rate.0 * 1e6) as u64;
        self.tc(&format!(
            "qdisc replace dev {device} root handle 1: \
             tbf rate {bits}bit burst {BURST_BYTES} limit {limit}"
        ));
    }

    fn tc(&self, line: &str) {
        run(self.enter().arg("tc").args(line.split(' '))).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    #[test]
    fn hosts_reach_each_other_at_the_rate_of_their_links_and_nobody_else() {
        const BYTES: usize = 2 << 20;
        let area = Area::new();
        let network = Network::new(&area);
        let [one, other] = [400.0, 40.0].map(|rate| network.join(Megabits(rate)));
        let listener = one.run(|| TcpListener::bind((one.address(), 7)).unwrap());
        let sender = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&vec![7; BYTES]).unwrap();
        });
        let start = Instant::now();
        let mut got = vec![];
        let mut stream = other.run(|| TcpStream::connect((one.address(), 7)).unwrap());
        stream.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        assert_eq!(got.len(), BYTES);
        // The kernel never gives more than the rate, whatever else the machine does.
        let least = (BYTES as u64 - 2 * BURST_BYTES) as f64 / Megabits(40.0).bytes_per_second();
        assert!(start.elapsed().as_secs_f64() >= least, "{:?}", start.elapsed());
        one.set_up(false);
        assert!(
            other
                .run(|| TcpStream::connect_timeout(
                    &(one.address(), 7).into(),
                    std::time::Duration::from_millis(100)
                ))
                .is_err()
        );
    }
}
