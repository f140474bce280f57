//! A token server for docker-registry's `auth: token`: signed tokens with short lives, for users who
//! may pull from some repositories (distribution, "Token Authentication Specification" and "Token
//! Authentication Implementation"). A stand-in: the project has no token server of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::area::Area;
use crate::process::run;
use crate::registry::Realm;
use crate::remote::{Credentials, block_on, spawn};

/// Who gives tokens, and for whom they are.
const NAME: &str = "test-tokens";

/// docker-registry takes a token for so long after its end, because clocks differ.
const LEEWAY: Duration = Duration::from_secs(60);

/// A running token server.
#[derive(Debug)]
pub struct TokenServer {
    state: Arc<State>,
    address: String,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    key: PathBuf,
    certificate: PathBuf,
    /// How long a token is good.
    life: Duration,
    users: Mutex<BTreeMap<String, User>>,
    issued: Mutex<Vec<Issued>>,
}

#[derive(Debug, Clone)]
struct User {
    password: String,
    /// Repositories that it may pull from.
    may: Vec<String>,
}

/// A token that was given.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The token.
    pub token: String,
    /// When it ends, in seconds after 1970.
    end: u64,
}

impl Issued {
    /// Whether the registry takes it no more.
    pub fn is_over(&self) -> bool {
        now() > self.end
    }
}

impl TokenServer {
    /// Starts one whose tokens are good for `life`.
    pub fn start(area: &Area, life: Duration) -> Self {
        let dir = tempfile::tempdir_in(area.path()).unwrap().keep();
        let line = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tokens -keyout key.pem -out cert.pem";
        run(Command::new("openssl").current_dir(&dir).args(line.split(' '))).ok();
        let state = Arc::new(State {
            key: dir.join("key.pem"),
            certificate: dir.join("cert.pem"),
            life,
            users: Mutex::default(),
            issued: Mutex::default(),
        });
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let task = spawn(serve(listener, Arc::clone(&state)));
        Self { state, address, task }
    }

    /// What a registry must be told of it.
    pub fn realm(&self) -> Realm {
        let url = format!("http://{}/token", self.address);
        Realm { url, name: NAME.into(), certificate: self.state.certificate.clone() }
    }

    /// Lets a user pull from these repositories; a known one gets another password.
    pub fn allow(&self, who: &Credentials, repositories: &[&str]) {
        let may = repositories.iter().map(|name| (*name).to_owned()).collect();
        let user = User { password: who.password.clone(), may };
        self.state.users.lock().unwrap().insert(who.user.clone(), user);
    }

    /// Every token that was given to somebody, oldest first.
    pub fn issued(&self) -> Vec<Issued> {
        self.state.issued.lock().unwrap().clone()
    }
}

impl Drop for TokenServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        let service = service_fn(move |request| {
            let answer = state.answer(&request);
            async { Ok::<_, Infallible>(answer) }
        });
        tokio::spawn(async move {
            let http = hyper::server::conn::http1::Builder::new();
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

impl State {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(user) = self.user(given) else {
            let mut answer = Response::new(Full::default());
            *answer.status_mut() = StatusCode::UNAUTHORIZED;
            return answer;
        };
        let query =
            request.uri().query().unwrap_or_default().replace("%3A", ":").replace("%2F", "/");
        let scopes = query.split('&').filter_map(|pair| pair.strip_prefix("scope=repository:"));
        let access: Vec<_> = scopes
            .filter_map(|scope| scope.rsplit_once(':'))
            .filter(|(name, _)| user.may.iter().any(|may| may == name))
            .map(|(name, _)| json!({ "type": "repository", "name": name, "actions": ["pull"] }))
            .collect();
        let issued = self.sign(&Value::from(access));
        let text = json!({ "token": issued.token, "expires_in": self.life.as_secs() });
        self.issued.lock().unwrap().push(issued);
        Response::new(Full::new(text.to_string().into()))
    }

    fn user(&self, given: Option<&str>) -> Option<User> {
        let pair = STANDARD.decode(given?.strip_prefix("Basic ")?).ok()?;
        let pair = String::from_utf8(pair).ok()?;
        let (name, password) = pair.split_once(':')?;
        let users = self.users.lock().unwrap();
        users.get(name).filter(|user| user.password == password).cloned()
    }

    /// A JSON Web Token, signed (RFC 7515, RS256).
    fn sign(&self, access: &Value) -> Issued {
        let end = now() + self.life.as_secs();
        let pem = fs::read_to_string(&self.certificate).unwrap();
        let certificate: String = pem.lines().filter(|line| !line.starts_with("---")).collect();
        let head = json!({ "typ": "JWT", "alg": "RS256", "x5c": [certificate] });
        let claims = json!({
            "iss": NAME, "aud": NAME, "sub": "somebody", "jti": end.to_string(), "access": access,
            "nbf": 0, "iat": 0, "exp": end.saturating_sub(LEEWAY.as_secs()),
        });
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(head), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(sign(&self.key, signed.as_bytes()));
        Issued { token: format!("{signed}.{signature}"), end }
    }
}

fn sign(key: &Path, bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut child = Command::new("openssl")
        .args(["dgst", "-sha256", "-binary", "-sign"])
        .arg(key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl signs");
    output.stdout
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
