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
        certificates.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
             -subj /CN=test-ca -keyout ca-key.pem -out ca.pem",
        );
        for who in ["server", "client"] {
            certificates.openssl(&format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={who} \
                 -keyout {who}-key.pem -out {who}.csr"
            ));
            certificates.openssl(&format!(
                "x509 -req -in {who}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
                 -extfile {who}.cnf -out {who}-cert.pem"
            ));
        }
        let both = ["client-cert.pem", "client-key.pem"].map(|name| fs::read(dir.join(name)));
        fs::write(certificates.client(), both.map(Result::unwrap).concat()).unwrap();
        certificates
    }

    fn openssl(&self, line: &str) {
        run(Command::new("openssl").current_dir(&self.dir).args(line.split_whitespace())).ok();
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
