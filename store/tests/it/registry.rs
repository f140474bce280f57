//! The registry client against a server that does what registries do, well and badly.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use weightfs_store::Urgency;
use weightfs_store::{
    AccessOptions, CredentialOptions, Credentials, Digest, Layout, MAX_MANIFEST_BYTES, Reference,
    Registries, RegistryOptions, Repository, Secret, SourceError, Trust,
};

use super::server::{Ending, Reply, Request, Server};
use super::{MIB, id, judged, noise, open, read};

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

/// Knows no credentials.
fn anonymous() -> Arc<Registries> {
    registries(Path::new("/nonexistent"))
}

fn registries(docker_config: &Path) -> Arc<Registries> {
    let (credentials, timeout) = (docker(docker_config), Duration::from_secs(20));
    let options = AccessOptions { credentials, timeout, ..AccessOptions::default() };
    Registries::new(options).unwrap()
}

fn docker(config: &Path) -> CredentialOptions {
    let docker_config = Some(config.to_owned());
    CredentialOptions { docker_config, ..CredentialOptions::default() }
}

fn reference(server: &Server, rest: &str) -> Reference {
    format!("{}/{rest}", server.address).parse().unwrap()
}

fn repository(server: &Server) -> Repository {
    Repository { registry: server.address.clone(), name: "org/model".into() }
}

/// The range that a request asks for.
fn asked(request: &Request) -> Range<usize> {
    let range = request.header("range").strip_prefix("bytes=").expect("no range");
    let (first, last) = range.split_once('-').unwrap();
    first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
}

fn partial(data: &[u8], request: &Request) -> Reply {
    if request.header("range").is_empty() {
        return Reply::new(200, data);
    }
    let range = asked(request);
    let content_range = format!("bytes {}-{}/{}", range.start, range.end - 1, data.len());
    Reply::new(206, &data[range]).with("Content-Range", content_range)
}

async fn fetch(server: &Server, size: u64, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
    let source = anonymous().source(&repository(server), Digest::of(b"x"), size);
    let mut body = source.fetch(range, Urgency::Demand).await?;
    let mut bytes = vec![];
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?.bytes);
    }
    Ok(bytes)
}

#[tokio::test]
async fn a_manifest_is_found_by_tag_and_by_digest() {
    let server = Server::start(|_| {
        Reply::new(200, "{}")
            .with("Content-Type", "Application/vnd.OCI.image.manifest.v1+json; x=y")
    })
    .await;
    let found = anonymous().resolve(&reference(&server, "org/model:v1")).await.unwrap();
    assert_eq!((found.digest, &*found.media_type), (Digest::of(b"{}"), OCI));
    assert_eq!((&found.bytes[..], &found.repository), (&b"{}"[..], &repository(&server)));
    let request = server.take_requests().pop().unwrap();
    assert_eq!(request.path, "/v2/org/model/manifests/v1");
    assert!(request.header("user-agent").starts_with("weightfs/"));
    for accepted in [OCI, "image.index.v1+json", "manifest.v2+json", "manifest.list.v2+json"] {
        assert!(request.header("accept").contains(accepted), "{accepted}");
    }
    let pinned = reference(&server, &format!("org/model:v1@{}", Digest::of(b"{}")));
    anonymous().resolve(&pinned).await.unwrap();
    let path = server.take_requests().pop().unwrap().path;
    assert_eq!(path, format!("/v2/org/model/manifests/{}", Digest::of(b"{}")));
    let error = anonymous().manifest(&repository(&server), Digest::of(b"other")).await.unwrap_err();
    assert!(error.to_string().contains("it hashes to"), "{error}");
}

#[tokio::test]
async fn a_manifest_without_a_useful_content_type_says_itself_what_it_is() {
    let server = Server::start(|_| {
        let body = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI}"}}"#);
        Reply::new(200, body).with("Content-Type", "text/plain; charset=utf-8")
    })
    .await;
    let found = anonymous().resolve(&reference(&server, "org/model")).await.unwrap();
    assert_eq!(found.media_type, OCI);
}

#[tokio::test]
async fn a_manifest_over_the_limit_is_refused_announced_or_not() {
    for ending in [Ending::Whole, Ending::Unannounced] {
        let server = Server::start(move |request| {
            let more = u64::from(request.path.ends_with("large"));
            let body = vec![b' '; (MAX_MANIFEST_BYTES + more) as usize];
            Reply::new(200, body).ending(ending.clone())
        })
        .await;
        anonymous().resolve(&reference(&server, "org/model:fits")).await.unwrap();
        let error = anonymous().resolve(&reference(&server, "org/model:large")).await.unwrap_err();
        assert!(matches!(error, SourceError::BadAnswer { .. }), "{error}");
        assert!(error.to_string().contains("limit of 4194304"), "{error}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_by_name() {
    let server = Server::start(|_| Reply::new(404, "")).await;
    let error = anonymous().resolve(&reference(&server, "org/model:gone")).await.unwrap_err();
    let text = format!("{}/org/model: manifest gone is not there", server.address);
    assert_eq!(error.to_string(), text);
    assert_eq!(server.take_requests().len(), 1, "not asked again");
}

#[tokio::test]
async fn a_registry_that_is_busy_is_asked_again() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(503, ""),
        1 => Reply::new(200, "{}").ending(Ending::Cut(1)),
        _ => Reply::new(200, "{}"),
    })
    .await;
    anonymous().resolve(&reference(&server, "org/model")).await.unwrap();
    assert_eq!(server.take_requests().len(), 3);
}

#[tokio::test]
async fn a_registry_that_hangs_or_refuses_connections_is_unreachable() {
    let server = Server::start(|_| Reply::default().ending(Ending::Silence)).await;
    let credentials = docker("/nonexistent".as_ref());
    let timeout = Duration::from_millis(200);
    let options = AccessOptions { credentials, timeout, ..AccessOptions::default() };
    let registries = Registries::new(options).unwrap();
    let error = registries.resolve(&reference(&server, "org/model")).await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
    let address = server.address.clone();
    drop(server);
    let gone: Reference = format!("{address}/org/model").parse().unwrap();
    let error = registries.resolve(&gone).await.unwrap_err();
    assert!(error.to_string().starts_with(&address), "{error}");
}

#[tokio::test]
async fn a_small_blob_is_checked_and_bounded() {
    let server = Server::start(|_| Reply::new(200, "config")).await;
    let (registries, from) = (anonymous(), repository(&server));
    let digest = Digest::of(b"config");
    assert_eq!(&*registries.small_blob(&from, digest, 6).await.unwrap(), b"config");
    assert_eq!(server.take_requests()[0].path, format!("/v2/org/model/blobs/{digest}"));
    let error = registries.small_blob(&from, digest, 5).await.unwrap_err();
    assert!(error.to_string().contains("limit of 5"), "{error}");
    let error = registries.small_blob(&from, Digest::of(b"x"), 6).await.unwrap_err();
    assert!(matches!(error, SourceError::BadAnswer { .. }), "{error}");
}

#[tokio::test]
async fn a_range_gives_exactly_what_was_asked_for() {
    let data = noise(100_000, 1);
    let expected = data.clone();
    let server = Server::start(move |request| partial(&data, request)).await;
    for range in [0..1, 99_999..100_000, 0..100_000, 12_345..67_890] {
        let got = fetch(&server, 100_000, range.clone()).await.unwrap();
        assert_eq!(got, expected[range.start as usize..range.end as usize]);
    }
    assert_eq!(fetch(&server, 100_000, 5..5).await.unwrap(), b"");
}

#[tokio::test]
async fn a_layer_that_is_not_as_long_as_its_descriptor_says_is_told_with_both_lengths() {
    let data = noise(1000, 2);
    let ranged = Server::start({
        let data = data.clone();
        move |request| match asked(request) {
            range if range.start >= data.len() => {
                Reply::new(416, "").with("Content-Range", format!("bytes */{}", data.len()))
            }
            range => {
                let end = range.end.min(data.len());
                let value = format!("bytes {}-{}/{}", range.start, end - 1, data.len());
                Reply::new(206, &data[range.start..end]).with("Content-Range", value)
            }
        }
    })
    .await;
    let whole = Server::start(move |_| Reply::new(200, &data[..])).await;
    for (server, size, range) in [
        (&ranged, 2000, 0..10),
        (&ranged, 2000, 900..1100),
        (&ranged, 2000, 1500..1600),
        (&ranged, 999, 0..10),
        (&whole, 2000, 0..10),
        (&whole, 999, 0..999),
    ] {
        let error = fetch(server, size, range).await.unwrap_err();
        assert!(matches!(error, SourceError::BadAnswer { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("1000") && text.contains(&size.to_string()), "{text}");
    }
}

#[tokio::test]
async fn a_server_without_ranges_serves_the_beginning_only() {
    let data = noise(1000, 3);
    let expected = data.clone();
    let server = Server::start(move |_| Reply::new(200, &data[..])).await;
    assert_eq!(fetch(&server, 1000, 0..1000).await.unwrap(), expected);
    assert_eq!(fetch(&server, 1000, 0..10).await.unwrap(), expected[..10]);
    let error = fetch(&server, 1000, 1..10).await.unwrap_err();
    assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");
}

#[tokio::test]
async fn another_range_than_the_one_asked_for_is_refused() {
    for value in ["bytes 0-9/1000", "bytes 10-18/1000", "bytes 10-20/1000", "nonsense", ""] {
        let reply = Reply::new(206, [0; 10]).with("Content-Range", value);
        let server = Server::start(move |_| reply.clone()).await;
        let error = fetch(&server, 1000, 10..20).await.unwrap_err();
        assert!(matches!(error, SourceError::BadAnswer { .. }), "{value}: {error}");
    }
}

#[tokio::test]
async fn a_busy_server_s_wish_is_handed_on() {
    let server = Server::start(|_| Reply::new(429, "").with("Retry-After", 7)).await;
    match fetch(&server, 10, 0..1).await.unwrap_err() {
        SourceError::Status { status: 429, retry_after: Some(rest), .. } => {
            assert_eq!(rest, Duration::from_secs(7));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_cut_body_is_an_error_after_the_bytes_that_came() {
    let data = noise(1000, 4);
    let server = Server::start({
        let data = data.clone();
        move |request| partial(&data, request).ending(Ending::Cut(400))
    })
    .await;
    let source = anonymous().source(&repository(&server), Digest::of(b"x"), 1000);
    let mut body = source.fetch(0..1000, Urgency::Demand).await.unwrap();
    let (mut bytes, mut error) = (vec![], None);
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => bytes.extend_from_slice(&piece.bytes),
            Err(cut) => error = Some(cut),
        }
    }
    assert_eq!(bytes, data[..600]);
    assert!(matches!(error, Some(SourceError::Unreachable { .. })), "{error:?}");
}

/// A docker config.json with one user for `registry`.
fn login(dir: &Path, registry: &str, user: &str, password: &str) -> PathBuf {
    let auths = serde_json::json!({ registry: { "username": user, "password": password } });
    let config = serde_json::json!({ "auths": auths });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    dir.to_owned()
}

/// "joe" and "secret", as HTTP has it (RFC 7617).
const JOE: &str = "Basic am9lOnNlY3JldA==";

/// A registry that wants a token, which its own `/token` gives to joe. `valid` counts how often
/// each token may be used.
async fn token_registry(data: Vec<u8>, uses: usize) -> Server {
    let (issued, used) = (AtomicUsize::new(0), AtomicUsize::new(0));
    Server::start(move |request| {
        let host = request.header("host");
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="test""#);
        if request.path.starts_with("/token") {
            if request.header("authorization") != JOE {
                return Reply::new(401, "no such user");
            }
            used.store(0, Ordering::SeqCst);
            let token = issued.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200, format!(r#"{{"token":"token-{token}"}}"#));
        }
        let current = format!("Bearer token-{}", issued.load(Ordering::SeqCst));
        let good = request.header("authorization") == current
            && used.fetch_add(1, Ordering::SeqCst) < uses;
        if request.path == "/v2/" || !good {
            return Reply::new(401, "").with("WWW-Authenticate", challenge);
        }
        partial(&data, request)
    })
    .await
}

fn tokens_asked_for(requests: &[Request]) -> usize {
    requests.iter().filter(|request| request.path.starts_with("/token")).count()
}

#[tokio::test]
async fn a_token_is_had_once_and_used_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(1000, 5);
    let server = token_registry(data, usize::MAX).await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
    let source = registries.source(&repository(&server), Digest::of(b"x"), 1000);
    let many =
        futures::future::join_all((0..20).map(|at| source.fetch(at..at + 1, Urgency::Demand)))
            .await;
    assert!(many.into_iter().all(|answer| answer.is_ok()));
    let requests = server.take_requests();
    assert_eq!(tokens_asked_for(&requests), 1, "one renewal, whoever noticed");
    let token = requests.iter().find(|request| request.path.starts_with("/token")).unwrap();
    assert!(token.path.contains("scope=repository%3Aorg%2Fmodel%3Apull"), "{}", token.path);
}

#[tokio::test]
async fn a_token_that_expires_in_the_middle_is_renewed_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    let server = token_registry(noise(1000, 6), 3).await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
    let source = registries.source(&repository(&server), Digest::of(b"x"), 1000);
    for at in 0..10 {
        drop(source.fetch(at..at + 1, Urgency::Demand).await.unwrap());
    }
    assert_eq!(tokens_asked_for(&server.take_requests()), 4);
}

#[tokio::test]
async fn a_token_that_is_refused_with_400_or_403_is_renewed_unnoticed() {
    for status in [400, 403] {
        let dir = tempfile::tempdir().unwrap();
        let (data, issued) = (noise(1000, 6), AtomicUsize::new(0));
        let server = Server::start(move |request| {
            let challenge = format!(r#"Bearer realm="http://{}/token""#, request.header("host"));
            if request.path.starts_with("/token") {
                let token = issued.fetch_add(1, Ordering::SeqCst) + 1;
                return Reply::new(200, format!(r#"{{"access_token":"token-{token}"}}"#));
            }
            match request.header("authorization") {
                "" => Reply::new(401, "").with("WWW-Authenticate", challenge),
                // The first token ends after its first use, and nothing says why.
                "Bearer token-1" if request.header("range") != "bytes=0-0" => {
                    Reply::new(status, "")
                }
                _ => partial(&data, request),
            }
        })
        .await;
        let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
        let source = registries.source(&repository(&server), Digest::of(b"x"), 1000);
        for at in 0..4 {
            drop(source.fetch(at..at + 1, Urgency::Demand).await.unwrap());
        }
        assert_eq!(tokens_asked_for(&server.take_requests()), 2, "{status}");
    }
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends_and_no_request_is_refused_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (data, issued) = (noise(1000, 6), AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let challenge = format!(r#"Bearer realm="http://{}/token""#, request.header("host"));
        if request.path.starts_with("/token") {
            let token = issued.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200, format!(r#"{{"token":"{token}","expires_in":0.5}}"#));
        }
        match request.header("authorization") {
            "" => Reply::new(401, "").with("WWW-Authenticate", challenge),
            _ => partial(&data, request),
        }
    })
    .await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
    let source = registries.source(&repository(&server), Digest::of(b"x"), 1000);
    let mut requests = vec![];
    while tokens_asked_for(&requests) < 3 {
        drop(source.fetch(0..1, Urgency::Demand).await.unwrap());
        requests.extend(server.take_requests());
    }
    let unknown = requests.iter().filter(|request| {
        !request.path.starts_with("/token") && request.header("authorization").is_empty()
    });
    assert_eq!(unknown.count(), 1, "the first one only");
}

#[tokio::test]
async fn what_the_sources_have_is_tried_in_order_and_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = token_registry(noise(10, 3), usize::MAX).await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
    let wrong = |user: &str| Credentials::Password {
        user: user.into(),
        password: Secret::new("guessed".into()),
    };
    let secrets = registries.pull_secrets();
    secrets.feed();
    secrets.note(&repository(&server), wrong("jim"));
    secrets.note(&repository(&server), wrong("jane"));
    let source = registries.source(&repository(&server), Digest::of(b"x"), 10);
    drop(source.fetch(0..1, Urgency::Demand).await.unwrap());
    assert_eq!(tokens_asked_for(&server.take_requests()), 3);
    // A repository that nobody has spoken of.
    let other = Repository { name: "org/other".into(), ..repository(&server) };
    drop(
        registries.source(&other, Digest::of(b"x"), 10).fetch(0..1, Urgency::Demand).await.unwrap(),
    );
    assert_eq!(tokens_asked_for(&server.take_requests()), 1);
}

#[tokio::test]
async fn an_identity_token_is_exchanged_and_a_registry_token_is_shown_as_it_is() {
    let server = Server::start(|request| {
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="s",scope="repository:a/b:pull""#,
            request.header("host")
        );
        match (request.path.starts_with("/token"), request.header("authorization")) {
            // By POST; without OAuth 2 there would be a query.
            (true, "") if !request.path.contains('?') => {
                Reply::new(200, r#"{"access_token":"exchanged"}"#)
            }
            (false, "Bearer exchanged" | "Bearer taken") => Reply::new(200, "{}"),
            _ => Reply::new(401, "").with("WWW-Authenticate", challenge),
        }
    })
    .await;
    for (field, asked) in [("identitytoken", 1), ("registrytoken", 0)] {
        let dir = tempfile::tempdir().unwrap();
        let value = if field == "identitytoken" { "refresh" } else { "taken" };
        let config = serde_json::json!({ "auths": { server.address.clone(): { field: value } } });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let registries = registries(dir.path());
        registries.resolve(&reference(&server, "org/model")).await.unwrap();
        assert_eq!(tokens_asked_for(&server.take_requests()), asked, "{field}");
    }
}

#[tokio::test]
async fn credentials_that_change_are_found_and_wrong_ones_are_not_tried_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = token_registry(noise(10, 3), usize::MAX).await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "old"));
    let model = reference(&server, "org/model:v1");
    let resolve = || registries.resolve(&model);
    let first = resolve().await.unwrap_err().to_string();
    server.take_requests();
    assert_eq!(resolve().await.unwrap_err().to_string(), first);
    assert_eq!(tokens_asked_for(&server.take_requests()), 0, "asked again with the same");
    login(dir.path(), &server.address, "joe", "secret");
    let source = registries.source(&repository(&server), Digest::of(b"x"), 10);
    drop(source.fetch(0..1, Urgency::Demand).await.unwrap());
}

#[tokio::test]
async fn wrong_or_missing_credentials_are_named_without_the_secret() {
    let dir = tempfile::tempdir().unwrap();
    let server = token_registry(vec![0; 10], usize::MAX).await;
    let registries = registries(&login(dir.path(), &server.address, "jim", "guessed"));
    let error = registries.resolve(&reference(&server, "org/model:v1")).await.unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("\"jim\"") && text.contains("config.json"), "{text}");
    assert!(text.contains(&server.address) && text.contains("org/model"), "{text}");
    assert!(!text.contains("guessed"), "{text}");
    let error = anonymous().resolve(&reference(&server, "org/model:v1")).await.unwrap_err();
    assert!(error.to_string().contains("no credentials"), "{error}");
}

#[tokio::test]
async fn a_registry_that_wants_a_password_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|request| match request.header("authorization") {
        JOE => Reply::new(200, "{}"),
        _ => Reply::new(401, "").with("WWW-Authenticate", r#"Basic realm="test""#),
    })
    .await;
    let good = registries(&login(dir.path(), &server.address, "joe", "secret"));
    good.resolve(&reference(&server, "org/model")).await.unwrap();
    let bad = registries(&login(dir.path(), &server.address, "joe", "guessed"));
    let error = bad.resolve(&reference(&server, "org/model")).await.unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
}

#[tokio::test]
async fn a_redirect_is_followed_and_its_host_never_sees_who_we_are() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(1000, 7);
    let storage = Arc::new(Server::start(move |request| partial(&data, request)).await);
    let target = format!("http://{}/signed?secret=1", storage.address);
    let server = Server::start(move |request| match request.header("authorization") {
        JOE => Reply::new(307, "").with("Location", &target),
        _ => Reply::new(401, "").with("WWW-Authenticate", r#"Basic realm="test""#),
    })
    .await;
    let registries = registries(&login(dir.path(), &server.address, "joe", "secret"));
    let source = registries.source(&repository(&server), Digest::of(b"x"), 1000);
    drop(source.fetch(10..20, Urgency::Demand).await.unwrap());
    let seen = storage.take_requests().pop().unwrap();
    assert_eq!((seen.header("range"), seen.header("authorization")), ("bytes=10-19", ""));
    drop(storage);
    let Err(error) = source.fetch(10..20, Urgency::Demand).await else { panic!("nobody is there") };
    assert!(!error.to_string().contains("secret"), "{error}");
}

#[tokio::test]
async fn a_ca_file_that_can_t_be_used_is_told_at_the_start() {
    let missing = PathBuf::from("/nonexistent/ca.pem");
    let options = RegistryOptions { plain_http: None, ca_file: Some(missing) };
    let registries = BTreeMap::from([("example.com".to_owned(), options)]);
    let options = AccessOptions { registries, ..AccessOptions::default() };
    let error = Registries::new(options).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_is_read_through_a_registry_that_cuts_every_third_body() {
    let data = noise(9 * MIB + 17, 8);
    let count = AtomicUsize::new(0);
    let server = Server::start({
        let data = data.clone();
        move |request| {
            let cut = count.fetch_add(1, Ordering::SeqCst).is_multiple_of(3);
            let reply = partial(&data, request);
            let half = reply.body.len() / 2;
            reply.ending(if cut { Ending::Cut(half) } else { Ending::Whole })
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let size = data.len() as u64;
    let blob = store.blob(id(&data), &Layout::whole(size)).unwrap();
    blob.add_source(anonymous().source(&repository(&server), id(&data).digest, size));
    assert_eq!(*read(&blob, 0..size).await.unwrap(), data[..]);
    assert_eq!(judged(&blob).await, Trust::Verified);
}
