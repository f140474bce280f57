//! An authority that nobody knows, and what it certifies: a server on loopback, and a client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::process::run;

/// A name that only the certificate knows, for what is reached through a proxy.
pub const SERVER_NAME: &str = "registry.test";

/// The name that the certificates of all peers have.
pub const PEER_NAME: &str = "weightfs-peer";

/// Files of keys and certificates in a directory.
#[derive(Debug, Clone)]
pub struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    /// Makes them in a directory.
    pub fn make(dir: &Path) -> Self {
        let server = format!(
            "subjectAltName=IP:127.0.0.1,IP:::1,DNS:{SERVER_NAME}\nbasicConstraints=CA:FALSE\n"
        );
        fs::write(dir.join("server.cnf"), server).unwrap();
        let client = "extendedKeyUsage=clientAuth\nbasicConstraints=CA:FALSE\n";
        fs::write(dir.join("client.cnf"), client).unwrap();
        let certificates = Self { dir: dir.to_owned() };
        openssl(
            dir,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
             -subj /CN=test-ca -keyout ca-key.pem -out ca.pem",
        );
        for who in ["server", "client"] {
            openssl(
                dir,
                &format!(
                    "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={who} \
                 -keyout {who}-key.pem -out {who}.csr"
                ),
            );
            openssl(
                dir,
                &format!(
                    "x509 -req -in {who}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
                 -extfile {who}.cnf -out {who}-cert.pem"
                ),
            );
        }
        let both = ["client-cert.pem", "client-key.pem"].map(|name| fs::read(dir.join(name)));
        fs::write(certificates.client(), both.map(Result::unwrap).concat()).unwrap();
        certificates
    }

    /// The authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// The server's certificate and its key.
    pub fn server(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("server-cert.pem"), self.dir.join("server-key.pem"))
    }

    /// A client's certificate and its key, both in one file.
    pub fn client(&self) -> PathBuf {
        self.dir.join("client.pem")
    }

    /// For a server of our own; one that wants client certificates lets in nobody else.
    pub fn server_config(&self, client_certificates: bool) -> Arc<ServerConfig> {
        rustls::crypto::ring::default_provider().install_default().ok();
        let read = |path: PathBuf| {
            CertificateDer::pem_file_iter(path).unwrap().map(Result::unwrap).collect::<Vec<_>>()
        };
        let (certificate, key) = self.server();
        let builder = ServerConfig::builder();
        let builder = if client_certificates {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(read(self.authority()));
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::from_pem_file(key).unwrap();
        Arc::new(builder.with_single_cert(read(certificate), key).unwrap())
    }
}

/// An authority for peers, with what it certifies: PEM files in one directory.
#[derive(Debug, Clone)]
pub struct PeerAuthority {
    dir: PathBuf,
    name: &'static str,
}

impl PeerAuthority {
    /// Makes one: `<name>.pem`.
    pub fn make(dir: &Path, name: &'static str) -> Self {
        openssl(
            dir,
            &format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                 -subj /CN={name} -keyout {name}-key.pem -out {name}.pem"
            ),
        );
        Self { dir: dir.to_owned(), name }
    }

    /// Certifies a peer for so many days, which are over if there are fewer than none:
    /// `<peer>.pem` and `<peer>-key.pem`.
    pub fn certify(&self, peer: &str, days: i32) {
        let Self { dir, name } = self;
        let extensions = format!(
            "subjectAltName=DNS:{PEER_NAME}\nbasicConstraints=CA:FALSE\n\
             extendedKeyUsage=serverAuth,clientAuth\n"
        );
        fs::write(dir.join("peer.cnf"), extensions).unwrap();
        openssl(
            dir,
            &format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=peer \
                 -keyout {peer}-key.pem -out {peer}.csr"
            ),
        );
        openssl(
            dir,
            &format!(
                "x509 -req -in {peer}.csr -CA {name}.pem -CAkey {name}-key.pem -CAcreateserial \
                 -days {days} -extfile peer.cnf -out {peer}.pem"
            ),
        );
    }

    /// The keys of `[peers]` that name a peer's files.
    pub fn config(&self, peer: &str) -> String {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let ca = file(&format!("{}.pem", self.name));
        let [cert, key] = [".pem", "-key.pem"].map(|end| file(&format!("{peer}{end}")));
        format!(
            "ca_file = {ca:?}\ncert_file = {cert:?}\nkey_file = {key:?}\n\
             server_name = {PEER_NAME:?}"
        )
    }
}

fn openssl(dir: &Path, line: &str) {
    run(Command::new("openssl").current_dir(dir).args(line.split_whitespace())).ok();
}
