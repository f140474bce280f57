//! `verify.referrers = "signed"`: an index counts only if one of the configured keys has signed it.

use std::path::PathBuf;
use std::process::Command;

use weightfs_store::Digest;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::{Outcome, run};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Signer, Target, Weightfs};

const REPOSITORY: &str = "models/signed";
const MODEL: &[Part] = &[Part { path: "w/a.safetensors", bytes: 3 << 20, mode: 0o644 }];

/// An indexed model in a plain tar, and who is believed.
struct Signed {
    bed: Bed,
    source: PathBuf,
    artifact: Artifact,
    reference: String,
    /// The manifest that carries the index.
    referrer: Digest,
    signer: Signer,
}

impl Signed {
    fn new() -> Self {
        let bed = Bed::new();
        let source = bed.model(MODEL);
        let plans = [Plan::Tar(Compression::Plain, vec!["w".to_owned()])];
        let artifact = bed.pack(&source, Dialect::Cncf, &plans);
        let reference = bed.push(&artifact, REPOSITORY);
        let made = Weightfs::new(&bed.area).run_here(&["index", &reference, "--json"]).ok();
        let made: serde_json::Value = serde_json::from_str(&made).unwrap();
        let referrer = made["referrer"].as_str().unwrap().parse().unwrap();
        let signer = Signer::new(&bed.area);
        Self { bed, source, artifact, reference, referrer, signer }
    }

    fn sign(&self, signer: &Signer, subject: Digest) {
        signer.sign(self.bed.registry.remote(), REPOSITORY, self.referrer, subject);
    }

    /// A fresh state directory that believes the signer.
    fn node(&self, more: &str) -> Weightfs {
        let node = Weightfs::new(&self.bed.area);
        let key = self.signer.public_key();
        node.configure(&format!(
            "{more}\n[verify]\nreferrers = \"signed\"\nkeys = [\"{}\"]",
            key.display()
        ));
        self.bed.proxy.forget();
        node
    }

    /// Bytes of the layer that a mount fetches, and what it logs.
    fn mount(&self) -> (u64, String) {
        let node = self.node("");
        let mounted = node.mount(&self.bed.area, &self.reference, &self.bed.mount_point());
        let fetched = self.bed.proxy.bytes(Target::Blob(self.artifact.layer_digest(0)));
        tree::assert_same(&self.source, mounted.dir(), Scope::ModelFiles);
        let log = mounted.log();
        mounted.stop();
        (fetched, log)
    }

    fn mount_strictly(&self) -> Outcome {
        let node = self.node("[cache]\nverify = \"strict\"");
        let mut command = node.command(["mount", "--foreground", &self.reference]);
        run(command.arg(self.bed.mount_point()).arg("--config").arg(node.config()))
    }

    /// The index is not believed, for that reason, and not at all mounted under strict.
    fn assert_refused(&self, reason: &str) {
        let (fetched, log) = self.mount();
        assert!(log.contains("index ignored") && log.contains(reason), "{reason}: {log}");
        assert!(fetched > 0, "the tar is walked");
        let outcome = self.mount_strictly();
        self.bed.assert_clean_failure(&outcome, &["strict", reason]);
    }
}

#[test]
fn an_index_that_is_not_signed_is_passed_over() {
    Signed::new().assert_refused("it is not signed");
}

#[test]
fn an_index_that_somebody_else_has_signed_is_passed_over() {
    let signed = Signed::new();
    let other = Signer::new(&signed.bed.area);
    signed.sign(&other, signed.referrer);
    signed.assert_refused("none of the keys in verify.keys");
}

#[test]
fn a_signature_of_something_else_does_not_count() {
    let signed = Signed::new();
    let other = Digest::of(b"another manifest");
    signed.sign(&signed.signer, other);
    signed.assert_refused(&format!("its signature is of {other}"));
}

#[test]
fn an_index_that_is_signed_is_used() {
    let signed = Signed::new();
    signed.sign(&signed.signer, signed.referrer);
    let (fetched, log) = signed.mount();
    assert!(fetched <= 1 << 18, "{fetched} bytes of the tar: {log}");
}

#[test]
fn a_key_that_is_none_is_refused_by_name() {
    let bed = Bed::new();
    let garbage = bed.area.file("garbage.pub", "no key");
    let reference = "127.0.0.1:1/models/x:v1";
    for (file, why) in
        [(garbage.to_str().unwrap(), "no PUBLIC KEY in PEM"), ("/nonexistent.pub", "No such file")]
    {
        bed.weightfs.configure(&format!("[verify]\nreferrers = \"signed\"\nkeys = [\"{file}\"]"));
        bed.weightfs.run_here(&["ls", reference]).assert_fails(1, &["public key", file, why]);
        let mut serve: Command = bed.weightfs.serve_command();
        run(&mut serve).assert_fails(1, &["public key", file, why]);
    }
}
