//! How registries let us in: credentials, tokens, TLS, redirects, and those that ignore ranges.

use std::fs::File;
use std::os::unix::fs::FileExt;

use weightfs_tests::layer::Compression;
use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::remote::Credentials;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Fault, Proxy, Registry, RegistryOptions, Target};

fn someone() -> Credentials {
    Credentials { user: "someone".into(), password: "pa:ss word".into() }
}

#[test]
fn credentials_of_docker_login_open_a_registry() {
    let bed = Bed::with_registry(RegistryOptions {
        credentials: Some(someone()),
        ..RegistryOptions::default()
    });
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    bed.weightfs.log_in(&bed.proxy.address(), "someone", "pa:ss word");
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn no_credentials_are_an_error_that_says_so() {
    let bed = Bed::with_registry(RegistryOptions {
        credentials: Some(someone()),
        ..RegistryOptions::default()
    });
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    bed.assert_refused(&reference, &["private/model", "no credentials"]);
}

#[test]
fn wrong_credentials_are_an_error_that_keeps_the_password() {
    let bed = Bed::with_registry(RegistryOptions {
        credentials: Some(someone()),
        ..RegistryOptions::default()
    });
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    bed.weightfs.log_in(&bed.proxy.address(), "someone", "guessed-wrong");
    let outcome = bed.assert_refused(&reference, &["private/model", "someone", "docker login"]);
    assert!(!outcome.stderr.contains("guessed-wrong"), "{outcome}");
}

#[test]
fn tokens_are_asked_for_and_renewed() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    bed.proxy.require_tokens(someone());
    bed.weightfs.log_in(&bed.proxy.address(), "someone", "pa:ss word");
    let mounted = bed.mount(&reference);
    std::fs::read(mounted.dir().join("config.json")).unwrap();
    // A token that ends in the middle of a load is nothing a reader should notice.
    bed.proxy.expire_tokens();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn wrong_credentials_for_a_token_are_an_error() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    bed.proxy.require_tokens(someone());
    bed.weightfs.log_in(&bed.proxy.address(), "someone", "guessed-wrong");
    let outcome = bed.assert_refused(&reference, &["private/model", "docker login"]);
    assert!(!outcome.stderr.contains("guessed-wrong"), "{outcome}");
}

#[test]
fn credentials_do_not_follow_a_redirect_to_another_host() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "private/model");
    bed.proxy.require_tokens(someone());
    bed.weightfs.log_in(&bed.proxy.address(), "someone", "pa:ss word");
    let store = Proxy::start(bed.registry.address());
    bed.proxy.fail(Target::Blobs, Fault::Redirect { to: store.address() });
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert!(store.bytes(Target::Blobs) >= artifact.layer_bytes());
    assert!(store.seen().iter().all(|seen| !seen.authorized()), "credentials went elsewhere");
    mounted.stop();
}

#[test]
fn storage_that_the_registry_names_is_asked_until_it_refuses() {
    let bed = Bed::new();
    let source = bed.model(&[Part { path: "model.safetensors", bytes: 96 << 20, mode: 0o644 }]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/redirected");
    let (first, second) =
        (Proxy::start(bed.registry.address()), Proxy::start(bed.registry.address()));
    bed.weightfs.configure(
        "[fetch]\nbackground = \"off\"\nread_ahead_max = \"1MiB\"\nread_ahead_min = \"1MiB\"\n",
    );
    bed.proxy.fail(Target::Blobs, Fault::Redirect { to: first.address() });
    let mounted = bed.mount(&reference);
    let file = File::open(mounted.dir().join("model.safetensors")).unwrap();
    let expected = std::fs::read(source.join("model.safetensors")).unwrap();
    let check = |mebibytes: std::ops::Range<usize>| {
        for at in mebibytes.map(|n| n << 20) {
            let mut bytes = [0; 4096];
            file.read_exact_at(&mut bytes, at as u64).unwrap();
            assert_eq!(bytes, expected[at..at + 4096]);
        }
    };
    check(0..1);
    bed.proxy.forget();
    check(1..12);
    assert_eq!(bed.proxy.requests(Target::Blobs), 0, "the registry was asked again");
    assert!(first.requests(Target::Blobs) > 1);
    // As storage does of a signature that has ended.
    first.fail(Target::All, Fault::Status(403));
    bed.proxy.heal();
    bed.proxy.fail(Target::Blobs, Fault::Redirect { to: second.address() });
    // Where nothing that was read before leads to.
    check(70..80);
    assert!(second.requests(Target::Blobs) > 0);
    mounted.stop();
}

#[test]
fn a_registry_with_its_own_authority_is_trusted_by_configuration() {
    let bed = Bed::with_registry(RegistryOptions { tls: true, ..RegistryOptions::default() });
    let source = bed.model(SMALL_MODEL);
    bed.pack_raw(&source, Dialect::Cncf).push(bed.registry.remote(), "tls/model", "v1");
    let reference = bed.registry.remote().reference("tls/model", "v1");
    let table = |more: &str| {
        format!("[registry.\"{}\"]\nplain_http = false\n{more}", bed.registry.address())
    };
    bed.weightfs.configure(&table(""));
    bed.assert_refused(&reference, &[bed.registry.address(), "certificate"]);
    let ca_file = bed.registry.ca_file().unwrap();
    let ca_file = ca_file.display();
    bed.weightfs.configure(&table(&format!("ca_file = \"{ca_file}\"\n")));
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

/// Bytes of blobs that the registry sent, as a multiple of the artifact's layers.
fn downloads(bed: &Bed, artifact: &Artifact) -> f64 {
    bed.proxy.bytes(Target::Blobs) as f64 / artifact.layer_bytes() as f64
}

#[test]
fn a_plain_registry_may_redirect_to_storage_that_speaks_tls() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/tls");
    let tls = RegistryOptions { tls: true, ..RegistryOptions::default() };
    let storage = Registry::start_with(&bed.area, tls);
    artifact.push(storage.remote(), "models/tls", "v1");
    let to = format!("https://{}", storage.address());
    bed.proxy.fail(Target::Blobs, Fault::Redirect { to });
    bed.assert_refused(&reference, &["certificate"]);
    let ca_file = storage.ca_file().unwrap();
    let ca_file = ca_file.display();
    let table = format!("[registry.\"{}\"]\nca_file = \"{ca_file}\"\n", bed.proxy.address());
    bed.weightfs.configure(&table);
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn a_registry_that_ignores_ranges_sends_a_blob_once_and_in_order() {
    let bed = Bed::new();
    let source = bed.model(&[Part { path: "model.safetensors", bytes: 96 << 20, mode: 0o644 }]);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/whole");
    bed.proxy.fail(Target::Blobs, Fault::IgnoreRange);
    let mounted = bed.mount(&reference);
    let file = File::open(mounted.dir().join("model.safetensors")).unwrap();
    let expected = std::fs::read(source.join("model.safetensors")).unwrap();
    // The middle first: it comes when the download gets there.
    for at in [50 << 20, 3 << 20, 95 << 20] {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, at as u64).unwrap();
        assert_eq!(bytes, expected[at..at + 4096]);
    }
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    // What was sent before it was noticed comes on top.
    assert!(downloads(&bed, &artifact) < 2.0, "{} downloads", downloads(&bed, &artifact));
    mounted.stop();
}

#[test]
fn tars_of_a_registry_that_ignores_ranges_mount_as_well() {
    for compression in [Compression::Plain, Compression::Gzip] {
        let bed = Bed::new();
        let source = bed.model(SMALL_MODEL);
        let files = SMALL_MODEL.iter().map(|part| part.path.to_owned()).collect();
        let artifact = bed.pack(&source, Dialect::Cncf, &[Plan::Tar(compression, files)]);
        let reference = bed.push(&artifact, "models/whole");
        bed.proxy.fail(Target::Blobs, Fault::IgnoreRange);
        let mounted = bed.mount(&reference);
        tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
    }
}

#[test]
fn a_whole_blob_that_is_cut_goes_on_from_the_start() {
    let bed = Bed::new();
    let source = bed.model(&[Part { path: "model.safetensors", bytes: 48 << 20, mode: 0o644 }]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/whole");
    bed.proxy.fail(Target::Blobs, Fault::Cut { after: 20 << 20 });
    bed.proxy.fail(Target::Blobs, Fault::IgnoreRange);
    let mounted = bed.mount(&reference);
    let file = File::open(mounted.dir().join("model.safetensors")).unwrap();
    file.read_exact_at(&mut [0; 4096], 10 << 20).unwrap();
    bed.proxy.heal();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}
