//! Signatures as `cosign sign --key` pushes them, made by openssl. cosign itself is not in Debian;
//! the names and the payload are those of its documents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use weightfs_store::Digest;

use crate::area::Area;
use crate::process::run;
use crate::remote::{Artifact, Blob, OCI_MANIFEST, Remote};

/// Who has a key.
#[derive(Debug)]
pub struct Signer {
    dir: PathBuf,
}

impl Signer {
    /// Makes a pair of keys.
    pub fn new(area: &Area) -> Self {
        let dir = tempfile::Builder::new().prefix("k").tempdir_in(area.path()).unwrap().keep();
        openssl(&dir, "ecparam -name prime256v1 -genkey -noout -out private.pem");
        openssl(&dir, "ec -in private.pem -pubout -out cosign.pub");
        Self { dir }
    }

    /// The file of the public key.
    pub fn public_key(&self) -> PathBuf {
        self.dir.join("cosign.pub")
    }

    /// Pushes, where the signature of `manifest` is looked for, one that speaks of `subject`.
    pub fn sign(&self, remote: &Remote, repository: &str, manifest: Digest, subject: Digest) {
        let payload = json!({
            "critical": {
                "identity": {"docker-reference": format!("{}/{repository}", remote.address())},
                "image": {"docker-manifest-digest": subject.to_string()},
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let payload = payload.to_string();
        fs::write(self.dir.join("payload"), &payload).unwrap();
        openssl(&self.dir, "dgst -sha256 -sign private.pem -out signature payload");
        let signature = STANDARD.encode(fs::read(self.dir.join("signature")).unwrap());
        let (config, payload) = (Blob::from_bytes("{}"), Blob::from_bytes(payload));
        let manifest_of_signature = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config.digest.to_string(),
                "size": config.size,
            },
            "layers": [{
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                "digest": payload.digest.to_string(),
                "size": payload.size,
                "annotations": {"dev.cosignproject.cosign/signature": signature},
            }],
        });
        let blobs = vec![config, payload];
        let tag = format!("sha256-{}.sig", manifest.hex());
        Artifact { blobs, manifest: manifest_of_signature }.push(remote, repository, &tag);
    }
}

fn openssl(dir: &Path, line: &str) {
    run(Command::new("openssl").current_dir(dir).args(line.split(' '))).ok();
}
