//! docker-registry, the real one, on a free port with its data in the area.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::area::Area;
use crate::process::{Service, run};
use crate::remote::{Credentials, Remote};

/// How the registry is set up.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Asks everybody for these credentials (HTTP basic, htpasswd).
    pub credentials: Option<Credentials>,
    /// Asks for tokens of that server.
    pub tokens: Option<Realm>,
    /// Speaks TLS with a certificate of an authority that nobody knows yet.
    pub tls: bool,
    /// With TLS: lets in only who shows a certificate of the same authority.
    pub client_certificates: bool,
}

/// Whose tokens a registry takes.
#[derive(Debug, Clone)]
pub struct Realm {
    /// Where they are to be had.
    pub url: String,
    /// Who gives them, and for whom they are.
    pub name: String,
    /// PEM file of the certificate that they are signed by.
    pub certificate: PathBuf,
}

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    service: Service,
    dir: PathBuf,
    remote: Remote,
    ca_file: Option<PathBuf>,
}

impl Registry {
    /// Starts one that serves everybody over plain HTTP.
    pub fn start(area: &Area) -> Self {
        Self::start_with(area, RegistryOptions::default())
    }

    /// Starts one.
    pub fn start_with(area: &Area, options: RegistryOptions) -> Self {
        let dir = tempfile::tempdir_in(area.path()).unwrap().keep();
        Self::start_in(area, &dir, options)
    }

    /// Starts one with its data in `dir`.
    pub fn start_in(area: &Area, dir: &Path, options: RegistryOptions) -> Self {
        let dir = dir.to_owned();
        let ca_file = options.tls.then(|| make_certificates(&dir));
        let config = dir.join("config.yml");
        fs::write(&config, config_text(&dir, &options)).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let mut service = Service::start(area, "docker-registry", command).quiet();
        let port = service.wait_ready(|service| port_in(&service.log()));
        let remote = Remote::new(&format!("127.0.0.1:{port}"))
            .with_credentials(options.credentials)
            .with_ca(ca_file.as_deref());
        Self { service, dir, remote, ca_file }
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> &str {
        self.remote.address()
    }

    /// To push to it.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// The certificate authority of a registry that speaks TLS.
    pub fn ca_file(&self) -> Option<&Path> {
        self.ca_file.as_deref()
    }

    /// A client's certificate and its key, both in one PEM file, of a registry that speaks TLS.
    pub fn client_file(&self) -> Option<PathBuf> {
        self.ca_file.as_ref().map(|ca| ca.with_file_name("client.pem"))
    }

    /// The file that a blob is stored in, by its hex digest.
    pub fn stored(&self, hex: &str) -> PathBuf {
        let blobs = self.dir.join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// Lets these in from now on, and nobody else.
    pub fn change_password(&self, credentials: &Credentials) {
        fs::write(self.dir.join("htpasswd"), htpasswd(credentials)).unwrap();
    }

    /// Kills it, as a power cut would.
    pub fn kill(&mut self) {
        self.service.kill();
    }
}

/// Its own words when it listens: the port was ours to choose, so it is a free one.
fn port_in(log: &str) -> Option<u16> {
    let rest = log.split("listening on 127.0.0.1:").nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn config_text(dir: &Path, options: &RegistryOptions) -> String {
    let mut text = format!(
        "version: 0.1\n\
         log: {{level: info, formatter: text, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {0}/data}}, delete: {{enabled: true}}}}\n\
         http:\n  addr: 127.0.0.1:0\n",
        dir.display()
    );
    if options.tls {
        let authorities = match options.client_certificates {
            true => format!(", clientcas: [{}/ca.pem]", dir.display()),
            false => String::new(),
        };
        text += &format!(
            "  tls: {{certificate: {0}/cert.pem, key: {0}/key.pem{authorities}}}\n",
            dir.display()
        );
    }
    if let Some(credentials) = &options.credentials {
        fs::write(dir.join("htpasswd"), htpasswd(credentials)).unwrap();
        text += &format!("auth: {{htpasswd: {{realm: test, path: {}/htpasswd}}}}\n", dir.display());
    }
    if let Some(Realm { url, name, certificate }) = &options.tokens {
        text += &format!(
            "auth: {{token: {{realm: \"{url}\", service: {name}, issuer: {name}, \
             rootcertbundle: {}}}}}\n",
            certificate.display()
        );
    }
    text
}

fn htpasswd(credentials: &Credentials) -> String {
    // The registry knows bcrypt only; cost 4 is the quickest.
    run(Command::new("htpasswd").args(["-nbBC4", &credentials.user, &credentials.password])).ok()
}

/// A certificate authority and a certificate for 127.0.0.1; the path of the former.
fn make_certificates(dir: &Path) -> PathBuf {
    let openssl = |line: &str| {
        run(Command::new("openssl").current_dir(dir).args(line.split(' '))).ok();
    };
    fs::write(dir.join("san.cnf"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        .unwrap();
    fs::write(dir.join("client.cnf"), "extendedKeyUsage=clientAuth\nbasicConstraints=CA:FALSE\n")
        .unwrap();
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test-ca \
         -keyout ca-key.pem -out ca.pem",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=127.0.0.1 \
         -keyout key.pem -out cert.csr",
    );
    openssl(
        "x509 -req -in cert.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
         -extfile san.cnf -out cert.pem",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=client \
         -keyout client-key.pem -out client.csr",
    );
    openssl(
        "x509 -req -in client.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
         -extfile client.cnf -out client-cert.pem",
    );
    let both = [fs::read(dir.join("client-cert.pem")), fs::read(dir.join("client-key.pem"))];
    fs::write(dir.join("client.pem"), both.map(Result::unwrap).concat()).unwrap();
    dir.join("ca.pem")
}
