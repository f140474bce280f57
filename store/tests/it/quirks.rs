//! Registries that have a way of their own: hosts that know no ranges, that are slow, that are busy,
//! that sign what they redirect to; several hosts, of which one is like that.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::future::join_all;
use weightfs_store::Urgency;
use weightfs_store::{
    AccessOptions, Blob, CredentialOptions, Digest, Layout, Registries, Repository, SourceError,
    Store, Trust,
};

use super::server::{Ending, Gate, Reply, Request, Server};
use super::{MIB, id, judged, noise, open, read};

/// A registry that nobody knows by name; its hosts.toml says who answers.
const REGISTRY: &str = "registry.invalid";

fn repository() -> Repository {
    Repository { registry: REGISTRY.into(), name: "org/model".into() }
}

/// Says that these hosts answer for the registry, in that order.
fn name_hosts(dir: &Path, hosts: &[&Server]) {
    let own = dir.join(REGISTRY);
    std::fs::create_dir_all(&own).unwrap();
    let (last, mirrors) = hosts.split_last().unwrap();
    let mirror = |host: &&Server| format!("[host.\"http://{}\"]\n", host.address);
    let mirrors: String = mirrors.iter().map(mirror).collect();
    let text = format!("server = \"http://{}\"\n{mirrors}", last.address);
    std::fs::write(own.join("hosts.toml"), text).unwrap();
}

struct Bed {
    dir: tempfile::TempDir,
    registries: Arc<Registries>,
}

impl Bed {
    fn new(hosts: &[&Server]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        name_hosts(dir.path(), hosts);
        let registries = Registries::new(AccessOptions {
            hosts_dir: Some(dir.path().to_owned()),
            credentials: CredentialOptions { sources: vec![], ..CredentialOptions::default() },
            ..AccessOptions::default()
        });
        let registries = registries.unwrap();
        Self { dir, registries }
    }

    /// The store goes last.
    fn blob(&self, data: &[u8]) -> (Arc<Blob>, Arc<Store>) {
        let store = open(&self.dir.path().join("store"));
        let size = data.len() as u64;
        let blob = store.blob(id(data), &Layout::whole(size)).unwrap();
        blob.add_source(self.registries.source(&repository(), id(data).digest, size));
        (blob, store)
    }

    /// Reads all of a blob, checks it, and waits until it is verified.
    async fn assert_loads(&self, data: &[u8]) {
        let (blob, _store) = self.blob(data);
        assert!(*read(&blob, 0..data.len() as u64).await.unwrap() == *data);
        assert_eq!(judged(&blob).await, Trust::Verified);
    }

    /// The first byte of a range, or why it can't be had.
    async fn first_byte(&self, size: u64, range: std::ops::Range<u64>) -> Result<u8, SourceError> {
        let source = self.registries.source(&repository(), Digest::of(b"x"), size);
        let piece = source.fetch(range, Urgency::Demand).await?.next().await.unwrap();
        piece.map(|piece| piece.bytes[0])
    }
}

/// As a registry should.
fn good(data: &[u8], request: &Request) -> Reply {
    match request.header("range").strip_prefix("bytes=") {
        None => Reply::new(200, data),
        Some(range) => {
            let (first, last) = range.split_once('-').unwrap();
            let (first, last) = (first.parse().unwrap(), last.parse::<usize>().unwrap());
            let value = format!("bytes {first}-{last}/{}", data.len());
            Reply::new(206, &data[first..=last]).with("Content-Range", value)
        }
    }
}

async fn good_server(data: &[u8]) -> Server {
    let data = data.to_owned();
    Server::start(move |request| good(&data, request)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_always_cut_after_less_than_a_chunk_still_make_a_whole() {
    let data = noise(3 * MIB + 17, 1);
    let server = Server::start({
        let data = data.clone();
        move |request| {
            let reply = good(&data, request);
            let beyond = reply.body.len().saturating_sub(300_000);
            reply.ending(Ending::Cut(beyond))
        }
    })
    .await;
    Bed::new(&[&server]).assert_loads(&data).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_satisfies_no_range_at_all_is_read_as_a_whole() {
    let data = noise(9 * MIB, 2);
    for says_the_size in [false, true] {
        let server = Server::start({
            let data = data.clone();
            move |request| match request.header("range") {
                "" => Reply::new(200, &data[..]),
                _ if says_the_size => {
                    Reply::new(416, "").with("Content-Range", format!("bytes */{}", data.len()))
                }
                _ => Reply::new(416, ""),
            }
        })
        .await;
        Bed::new(&[&server]).assert_loads(&data).await;
    }
}

#[tokio::test]
async fn what_is_compressed_on_its_way_is_refused() {
    for (name, value) in [
        ("Content-Encoding", "gzip"),
        ("Content-Encoding", "identity, br"),
        ("Transfer-Encoding", "gzip, chunked"),
    ] {
        let server = Server::start(move |_| {
            let reply = Reply::new(200, "0\r\n\r\n").ending(Ending::Unannounced);
            reply.with(name, value)
        })
        .await;
        let bed = Bed::new(&[&server]);
        let error = bed.first_byte(5, 0..5).await.unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        let error =
            bed.registries.small_blob(&repository(), Digest::of(b"x"), 9).await.unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        let requests = server.take_requests();
        assert!(requests.iter().all(|request| request.header("accept-encoding") == "identity"));
    }
}

#[tokio::test]
async fn a_mirror_without_ranges_is_asked_for_one_once() {
    let data = noise(1000, 3);
    let whole = Server::start({
        let data = data.clone();
        move |_| Reply::new(200, &data[..])
    })
    .await;
    let registry = good_server(&data).await;
    let bed = Bed::new(&[&whole, &registry]);
    let source = bed.registries.source(&repository(), Digest::of(b"x"), 1000);
    for at in 1..10 {
        let piece =
            source.fetch(at..at + 1, Urgency::Demand).await.unwrap().next().await.unwrap().unwrap();
        assert_eq!(piece.bytes, data[at as usize..=at as usize]);
    }
    assert_eq!((whole.take_requests().len(), registry.take_requests().len()), (1, 9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_without_ranges_serves_alone_while_the_registry_is_away() {
    let data = noise(5 * MIB, 4);
    let whole = Server::start({
        let data = data.clone();
        move |_| Reply::new(200, &data[..])
    })
    .await;
    let away = Server::start(|_| Reply::new(502, "")).await;
    let bed = Bed::new(&[&whole, &away]);
    let (blob, _store) = bed.blob(&data);
    assert_eq!(*read(&blob, 4 * MIB..4 * MIB + 1).await.unwrap(), data[4 << 20..=4 << 20]);
    assert_eq!(*read(&blob, 0..5 * MIB).await.unwrap(), data[..]);
}

#[tokio::test]
async fn a_mirror_that_lacks_a_blob_is_not_asked_for_each_range_of_it() {
    let data = noise(1000, 5);
    let empty = Server::start(|_| Reply::new(404, "")).await;
    let registry = good_server(&data).await;
    let bed = Bed::new(&[&empty, &registry]);
    let source = bed.registries.source(&repository(), Digest::of(b"x"), 1000);
    for at in 0..10 {
        drop(source.fetch(at..at + 1, Urgency::Demand).await.unwrap());
    }
    assert_eq!(empty.take_requests().len(), 1);
    // Alone it is asked each time: what is not there may come.
    let alone = Bed::new(&[&empty]);
    for _ in 0..3 {
        let error = alone.first_byte(1000, 0..1).await.unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    }
    assert_eq!(empty.take_requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_gives_a_little_at_a_time_is_given_up_for_the_registry() {
    let data = noise(MIB, 6);
    let slow = Server::start({
        let data = data.clone();
        move |request| good(&data, request).ending(Ending::Trickle(100))
    })
    .await;
    let registry = good_server(&data).await;
    Bed::new(&[&slow, &registry]).assert_loads(&data).await;
    assert!(!slow.take_requests().is_empty());
}

#[tokio::test]
async fn a_host_that_asks_for_time_is_left_alone_by_all() {
    let data = noise(1000, 7);
    let count = AtomicUsize::new(0);
    let server = Server::start({
        let data = data.clone();
        move |request| match count.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::new(429, "").with("Retry-After", 3000),
            _ => good(&data, request),
        }
    })
    .await;
    let bed = Bed::new(&[&server]);
    for _ in 0..5 {
        let error = bed.first_byte(1000, 0..1).await.unwrap_err();
        assert!(matches!(error, SourceError::Status { status: 429, .. }), "{error}");
    }
    assert_eq!(server.take_requests().len(), 1, "only the first was sent");
    let error = bed.registries.small_blob(&repository(), Digest::of(&data), 1000).await;
    assert!(error.unwrap_err().to_string().contains("429"), "nor anything else, at once");
    // What it asked for is more than can be meant.
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(60)).await;
    tokio::time::resume();
    assert_eq!(bed.first_byte(1000, 0..1).await.unwrap(), data[0]);
}

#[tokio::test]
async fn another_host_is_asked_while_one_asks_for_time() {
    let data = noise(1000, 8);
    let busy = Server::start(|_| Reply::new(503, "").with("Retry-After", 3000)).await;
    let registry = good_server(&data).await;
    let bed = Bed::new(&[&busy, &registry]);
    for _ in 0..5 {
        assert_eq!(bed.first_byte(1000, 0..1).await.unwrap(), data[0]);
    }
    assert_eq!(busy.take_requests().len(), 1);
}

#[tokio::test]
async fn a_manifest_is_asked_for_as_often_as_the_registry_says_come_again() {
    let date = |seconds| httpdate(SystemTime::now() + Duration::from_secs(seconds));
    let count = AtomicUsize::new(0);
    let server = Server::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        // By its own clock, which is years away.
        0 => Reply::new(429, "")
            .with("Date", "Sun, 06 Nov 1994 08:49:37 GMT")
            .with("Retry-After", "Sun, 06 Nov 1994 08:49:38 GMT"),
        1..8 => Reply::new(429, "").with("Retry-After", date(0)),
        _ => Reply::new(200, "{}"),
    })
    .await;
    let bed = Bed::new(&[&server]);
    bed.registries.manifest(&repository(), Digest::of(b"{}")).await.unwrap();
    assert_eq!(server.take_requests().len(), 9);
}

/// As HTTP writes a time.
fn httpdate(time: SystemTime) -> String {
    let time: jiff::Timestamp = time.try_into().unwrap();
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_mounts_at_once_ask_for_few_manifests_at_once() {
    const MANY: usize = 60;
    let gate = Gate::default();
    let server = Server::start({
        let gate = gate.clone();
        move |_| Reply::new(200, "{}").ending(Ending::Held(gate.clone()))
    })
    .await;
    let bed = Bed::new(&[&server]);
    let ask = |at: usize| {
        let registries = Arc::clone(&bed.registries);
        let name = format!("org/model-{at}");
        let from = Repository { registry: REGISTRY.into(), name };
        tokio::spawn(async move { registries.manifest(&from, Digest::of(b"{}")).await })
    };
    let asking: Vec<_> = (0..MANY).map(ask).collect();
    while server.held() < 8 {
        tokio::task::yield_now().await;
    }
    // All others have had the time to come as well, if they were let.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    // Later the server may still count one whose answer is read already.
    assert_eq!(server.most_held(), 8);
    gate.open();
    assert!(join_all(asking).await.into_iter().all(|got| got.unwrap().is_ok()));
    assert_eq!(server.take_requests().len(), MANY);
}

#[tokio::test]
async fn a_mirror_may_have_its_repositories_below_a_path_and_learns_which_registry_is_meant() {
    let data = noise(1000, 11);
    let (mirror, registry) = (good_server(&data).await, good_server(&data).await);
    let bed = Bed::new(&[&registry]);
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}/v2/hub-cache\"]\noverride_path = true\n",
        registry.address, mirror.address
    );
    std::fs::write(bed.dir.path().join(REGISTRY).join("hosts.toml"), text).unwrap();
    assert_eq!(bed.first_byte(1000, 0..1).await.unwrap(), data[0]);
    let path = mirror.take_requests().pop().unwrap().path;
    let blob = Digest::of(b"x").to_string();
    assert_eq!(path, format!("/v2/hub-cache/org/model/blobs/{blob}?ns={REGISTRY}"));
}

#[tokio::test]
async fn hosts_that_change_are_asked_without_a_restart_and_nonsense_changes_nothing() {
    let data = noise(1000, 9);
    let (first, second) = (good_server(&data).await, good_server(&data).await);
    let bed = Bed::new(&[&first]);
    let after_a_while = async || {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(6)).await;
        tokio::time::resume();
        bed.first_byte(1000, 0..1).await.unwrap();
        (first.take_requests().len(), second.take_requests().len())
    };
    assert_eq!(after_a_while().await, (1, 0));
    name_hosts(bed.dir.path(), &[&second]);
    assert_eq!(after_a_while().await, (0, 1));
    let file = bed.dir.path().join(REGISTRY).join("hosts.toml");
    std::fs::write(file, "server = 3").unwrap();
    assert_eq!(after_a_while().await, (0, 1));
}

#[tokio::test]
async fn a_signed_url_that_has_ended_when_it_comes_is_asked_for_again_once() {
    let data = noise(1000, 10);
    let storage = Server::start({
        let data = data.clone();
        move |request| match request.path.as_str() {
            "/signed?number=1" => good(&data, request),
            _ => Reply::new(403, ""),
        }
    })
    .await;
    for (numbers, comes) in [([0, 1, 2], true), ([2, 3, 1], false)] {
        let (count, target) = (AtomicUsize::new(0), storage.address.clone());
        let server = Server::start(move |_| {
            let number = numbers[count.fetch_add(1, Ordering::SeqCst).min(2)];
            Reply::new(307, "").with("Location", format!("http://{target}/signed?number={number}"))
        })
        .await;
        let got = Bed::new(&[&server]).first_byte(1000, 5..6).await;
        assert_eq!(got.is_ok_and(|byte| byte == data[5]), comes);
        assert_eq!(server.take_requests().len(), 2);
    }
}

#[tokio::test]
async fn a_redirect_leads_to_a_web_server_or_nowhere() {
    for place in ["ftp://storage/x", "file:///etc/passwd", "data:,x", "http://"] {
        let server = Server::start(move |_| Reply::new(307, "").with("Location", place)).await;
        let error = Bed::new(&[&server]).first_byte(10, 0..1).await.unwrap_err();
        assert!(matches!(error, SourceError::BadAnswer { .. }), "{place}: {error}");
    }
}

fn referrer(seed: u8) -> serde_json::Value {
    serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": Digest::of(&[seed]), "size": 1, "artifactType": "application/x",
    })
}

fn list(seeds: &[u8]) -> String {
    let manifests: Vec<_> = seeds.iter().map(|seed| referrer(*seed)).collect();
    serde_json::json!({ "schemaVersion": 2, "mediaType": "x", "manifests": manifests }).to_string()
}

#[tokio::test]
async fn a_list_of_referrers_goes_on_page_by_page_but_not_for_ever() {
    let server = Server::start(|request| {
        let query = request.path.split_once('?').map_or("", |(_, query)| query);
        match (request.path.contains("/referrers/"), query) {
            (false, _) => Reply::new(404, ""),
            (true, query) if query.contains("page=2") => Reply::new(200, list(&[3])),
            (true, query) if query.contains("loop") => {
                Reply::new(200, list(&[4])).with("Link", "<?loop=1>; rel=next")
            }
            (true, _) => Reply::new(200, list(&[1, 2]))
                .with("Link", "<https://elsewhere.invalid/v2/x?page=2>; rel=\"next\""),
        }
    })
    .await;
    let bed = Bed::new(&[&server]);
    let subject = Digest::of(b"subject");
    let found = bed.registries.referrers(&repository(), subject, "application/x").await.unwrap();
    assert_eq!(found.len(), 3);
    let looping = bed.registries.referrers(&repository(), subject, "application/x&loop").await;
    assert!(looping.is_ok());
    assert!(server.take_requests().len() < 50);
}

#[tokio::test]
async fn registries_that_know_no_referrers_have_them_under_a_tag() {
    for status in [400, 404, 405, 406, 501] {
        let server =
            Server::start(move |request| match request.path.contains("/manifests/sha256-") {
                true => Reply::new(200, list(&[1])),
                false => Reply::new(status, ""),
            })
            .await;
        let bed = Bed::new(&[&server]);
        let subject = Digest::of(b"subject");
        let found = bed.registries.referrers(&repository(), subject, "application/x").await;
        assert_eq!(found.unwrap().len(), 1, "{status}");
    }
}
