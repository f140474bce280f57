//! docker-registry, the real one, on a free port with its data in the area.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::area::Area;
use crate::certificates::Certificates;
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
    certificates: Option<Certificates>,
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
        let certificates = options.tls.then(|| Certificates::make(&dir));
        let config = dir.join("config.yml");
        fs::write(&config, config_text(&dir, &options, certificates.as_ref())).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let mut service = Service::start(area, "docker-registry", command).quiet();
        let port = service.wait_ready(|service| port_in(&service.log()));
        let remote = Remote::new(&format!("127.0.0.1:{port}"))
            .with_credentials(options.credentials)
            .with_ca(certificates.as_ref().map(Certificates::authority).as_deref());
        Self { service, dir, remote, certificates }
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
    pub fn ca_file(&self) -> Option<PathBuf> {
        self.certificates.as_ref().map(Certificates::authority)
    }

    /// A client's certificate and its key, both in one PEM file, of a registry that speaks TLS.
    pub fn client_file(&self) -> Option<PathBuf> {
        self.certificates.as_ref().map(Certificates::client)
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

fn config_text(
    dir: &Path,
    options: &RegistryOptions,
    certificates: Option<&Certificates>,
) -> String {
    let mut text = format!(
        "version: 0.1\n\
         log: {{level: info, formatter: text, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {0}/data}}, delete: {{enabled: true}}}}\n\
         http:\n  addr: 127.0.0.1:0\n",
        dir.display()
    );
    if let Some(certificates) = certificates {
        let authorities = match options.client_certificates {
            true => format!(", clientcas: [{}]", certificates.authority().display()),
            false => String::new(),
        };
        let (certificate, key) = certificates.server();
        text += &format!(
            "  tls: {{certificate: {}, key: {}{authorities}}}\n",
            certificate.display(),
            key.display()
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
