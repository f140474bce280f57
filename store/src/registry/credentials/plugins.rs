//! The kubelet's credential provider plugins: its CredentialProviderConfig says which program knows
//! the registries of which images; the program gets a request on its standard input and answers with
//! credentials and how long they may be remembered (KEP-2133, credentialprovider.kubelet.k8s.io/v1).
//!
//! Plugins that want a pod's service account token are passed over: only the kubelet has those.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::Duration;

use lru::LruCache;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::images::Images;
use super::{Credentials, PluginOptions, Secret, exec, read};
use crate::registry::Repository;
use crate::shared::lock;

/// Plugins of a configuration at the most.
const MAX_PLUGINS: usize = 64;

/// Patterns of a plugin, and credentials in an answer, at the most.
const MAX_PATTERNS: usize = 1024;

/// Answers that are remembered at the most.
const MAX_ANSWERS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// The longest that an answer is remembered, whatever it says of itself.
const MAX_CACHED: Duration = Duration::from_secs(24 * 60 * 60);

const CONFIG_KIND: &str = "CredentialProviderConfig";
const REQUEST_KIND: &str = "CredentialProviderRequest";
const RESPONSE_KIND: &str = "CredentialProviderResponse";

/// Versions of the protocol that are spoken; all have what is used here.
const VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// See the module.
#[derive(Debug)]
pub(super) struct Plugins {
    options: PluginOptions,
    answers: Mutex<LruCache<Key, Answer>>,
}

/// What an answer holds for: which plugin, and which images.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    plugin: String,
    of: CacheKey,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum CacheKey {
    Image(Repository),
    Registry(String),
    Global,
}

#[derive(Debug, Clone)]
struct Answer {
    /// The most specific first.
    by_images: Vec<(Images, Credentials)>,
    key_type: KeyType,
    /// How long it holds, if it says so.
    duration: Option<Duration>,
    until: Instant,
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    api_version: String,
    kind: String,
    providers: Vec<Provider>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<TokenAttributes>,
}

#[derive(Clone, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

impl std::fmt::Debug for Variable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}=..", self.name)
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenAttributes {
    #[serde(default)]
    require_service_account: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'a str,
    api_version: &'a str,
    image: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    api_version: String,
    kind: String,
    cache_key_type: KeyType,
    cache_duration: Option<String>,
    auth: Option<BTreeMap<String, Pair>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum KeyType {
    Image,
    Registry,
    Global,
}

#[derive(Deserialize)]
struct Pair {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

impl Plugins {
    pub(super) fn new(options: PluginOptions) -> Self {
        Self { options, answers: Mutex::new(LruCache::new(MAX_ANSWERS)) }
    }

    /// What people know it by.
    pub(super) fn name(&self) -> String {
        format!("the kubelet's plugins ({})", self.options.config.display())
    }

    /// What the plugins give for a repository.
    ///
    /// # Errors
    /// In words: a configuration that can't be used, or a plugin that fails, if no other one gives
    /// anything.
    pub(super) async fn find(&self, to: &Repository) -> Result<Vec<Credentials>, String> {
        let text = read(&self.options.config).await.map_err(|error| error.to_string())?;
        let providers = parse_config(&text)?;
        let (mut found, mut failed) = (vec![], None);
        for provider in providers {
            if !provider.is_for(to)? {
                continue;
            }
            match self.ask(&provider, to).await {
                Ok(more) => found.extend(more),
                Err(why) => failed = Some(why),
            }
        }
        match failed {
            Some(why) if found.is_empty() => Err(why),
            _ => Ok(found),
        }
    }

    /// Forgets answers with these credentials: they were refused.
    pub(super) fn forget(&self, credentials: &Credentials) {
        let mut answers = lock(&self.answers);
        let has = |answer: &Answer| answer.by_images.iter().any(|(_, known)| known == credentials);
        let stale: Vec<_> =
            answers.iter().filter(|(_, answer)| has(answer)).map(|(key, _)| key.clone()).collect();
        for key in stale {
            answers.pop(&key);
        }
    }

    async fn ask(&self, provider: &Provider, to: &Repository) -> Result<Vec<Credentials>, String> {
        if let Some(known) = self.remembered(provider, to) {
            return Ok(known);
        }
        let request = Request {
            kind: REQUEST_KIND,
            api_version: &provider.api_version,
            image: to.to_string(),
        };
        let request = serde_json::to_vec(&request).map_err(|error| error.to_string())?;
        let program = self.options.directory.join(&provider.name);
        let arguments = provider.args.clone().unwrap_or_default();
        let variables = provider.env.iter().flatten();
        let variables = variables.map(|one| (one.name.clone(), one.value.clone())).collect();
        let output = exec::run(program.as_os_str(), &arguments, &variables, &request).await?;
        if !output.success {
            return Err(format!("the plugin {} failed", provider.name));
        }
        let mut answer = parse_answer(&output.stdout, &provider.api_version)
            .map_err(|why| format!("the plugin {}: {why}", provider.name))?;
        let given = answer.of(to);
        let default = provider.default_cache_duration.as_deref().and_then(duration);
        let cached = answer.duration.or(default).unwrap_or_default().min(MAX_CACHED);
        if !cached.is_zero() {
            answer.until = Instant::now() + cached;
            let of = match answer.key_type {
                KeyType::Image => CacheKey::Image(to.clone()),
                KeyType::Registry => CacheKey::Registry(to.registry.clone()),
                KeyType::Global => CacheKey::Global,
            };
            lock(&self.answers).put(Key { plugin: provider.name.clone(), of }, answer);
        }
        Ok(given)
    }

    fn remembered(&self, provider: &Provider, to: &Repository) -> Option<Vec<Credentials>> {
        let mut answers = lock(&self.answers);
        let keys = [
            CacheKey::Image(to.clone()),
            CacheKey::Registry(to.registry.clone()),
            CacheKey::Global,
        ];
        let now = Instant::now();
        keys.into_iter().find_map(|of| {
            let answer = answers.get(&Key { plugin: provider.name.clone(), of })?;
            (now < answer.until).then(|| answer.of(to))
        })
    }
}

impl Provider {
    fn is_for(&self, to: &Repository) -> Result<bool, String> {
        for text in self.match_images.iter().take(MAX_PATTERNS) {
            if Images::parse(text)?.matches(to) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn needs_service_account(&self) -> bool {
        self.token_attributes.as_ref().is_some_and(|wanted| wanted.require_service_account)
    }
}

impl Answer {
    fn of(&self, to: &Repository) -> Vec<Credentials> {
        let matching = self.by_images.iter().filter(|(images, _)| images.matches(to));
        matching.map(|(_, credentials)| credentials.clone()).collect()
    }
}

fn parse_config(bytes: &[u8]) -> Result<Vec<Provider>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8")?;
    // What a plugin is given may be a secret: of the parser's words the place is enough.
    let config: Config = serde_saphyr::from_str(text).map_err(|error| match error.location() {
        Some(at) => format!("not a {CONFIG_KIND} (line {}, column {})", at.line(), at.column()),
        None => format!("not a {CONFIG_KIND}"),
    })?;
    if config.kind != CONFIG_KIND || !config.api_version.starts_with("kubelet.config.k8s.io/") {
        return Err(format!("it is {} {}, not a {CONFIG_KIND}", config.api_version, config.kind));
    }
    let mut providers = config.providers;
    providers.truncate(MAX_PLUGINS);
    for provider in &providers {
        let name = &provider.name;
        // As the kubelet has it: a name in one directory.
        if matches!(&**name, "" | "." | "..") || name.contains(['/', ' ', '\0']) {
            return Err(format!("{name:?} is no name of a plugin"));
        }
        if !VERSIONS.contains(&&*provider.api_version) {
            return Err(format!(
                "the plugin {name}: unknown apiVersion {:?}",
                provider.api_version
            ));
        }
    }
    providers.retain(|provider| !provider.needs_service_account());
    Ok(providers)
}

fn parse_answer(bytes: &[u8], version: &str) -> Result<Answer, String> {
    // The parser's words could repeat a part of a secret.
    let response: Response = serde_json::from_slice(bytes)
        .map_err(|error| format!("its answer is no {RESPONSE_KIND} (column {})", error.column()))?;
    if response.kind != RESPONSE_KIND || response.api_version != version {
        return Err(format!("its answer is no {RESPONSE_KIND} of {version}"));
    }
    let pairs = response.auth.unwrap_or_default().into_iter().take(MAX_PATTERNS);
    let mut by_images = pairs
        .map(|(pattern, Pair { username, password })| {
            let password = Secret::new(password);
            let images = Images::parse(&pattern).map_err(|_| "its answer is for no images")?;
            Ok((images, Credentials::Password { user: username, password }))
        })
        .collect::<Result<Vec<_>, String>>()?;
    by_images.sort_by(|(a, _), (b, _)| Reverse(&a.text).cmp(&Reverse(&b.text)));
    let cached = match response.cache_duration.as_deref() {
        Some(text) => Some(duration(text).ok_or("its cacheDuration is no duration")?),
        None => None,
    };
    let until = Instant::now();
    Ok(Answer { by_images, key_type: response.cache_key_type, duration: cached, until })
}

/// A duration of Go's: numbers with units, "12h0m0s"; none if it is negative or something else.
fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let more = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        sum = sum.checked_add(more)?;
        rest = after;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;

    /// As cloud providers ship it.
    const CONFIG: &str = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n\
        providers:\n  - name: cloud\n    matchImages: [\"*.example.com\", 'other.io']\n    \
        defaultCacheDuration: \"12h0m0s\"\n    apiVersion: credentialprovider.kubelet.k8s.io/v1\n    \
        args: [get]\n    env:\n      - {name: PROFILE, value: hidden}\n  - name: pods\n    \
        matchImages: [\"*.example.com\"]\n    defaultCacheDuration: 0s\n    \
        apiVersion: credentialprovider.kubelet.k8s.io/v1\n    tokenAttributes:\n      \
        serviceAccountTokenAudience: x\n      requireServiceAccount: true\n";

    const ANSWER: &str = r#"{"apiVersion":"credentialprovider.kubelet.k8s.io/v1",
        "kind":"CredentialProviderResponse","cacheKeyType":"Registry","cacheDuration":"1h30m",
        "auth":{"*.example.com":{"username":"all","password":"hidden"},
        "r.example.com/team":{"username":"team","password":"hidden"}}}"#;

    fn repository(name: &str) -> Repository {
        Repository { registry: "r.example.com".into(), name: name.into() }
    }

    /// Plugins that answer `answer`, and count how often they are asked.
    fn plugins(directory: &Path, answer: &str) -> Plugins {
        let config = directory.join("config.yaml");
        std::fs::write(&config, CONFIG).unwrap();
        std::fs::write(directory.join("answer"), answer).unwrap();
        let here = directory.display();
        let program = directory.join("cloud");
        let script = format!(
            "#!/bin/sh\n[ \"$1$PROFILE\" = gethidden ] || exit 1\ncat > {here}/request\n\
             echo >> {here}/asked\ncat {here}/answer\n"
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        Plugins::new(PluginOptions { config, directory: directory.to_owned() })
    }

    fn users(found: &[Credentials]) -> Vec<String> {
        found.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_plugin_is_asked_as_the_kubelet_does_and_its_answer_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let plugins = plugins(directory.path(), ANSWER);
        let asked = || std::fs::read_to_string(directory.path().join("asked")).unwrap().len();
        let found = plugins.find(&repository("team/model")).await.unwrap();
        assert_eq!(users(&found), ["user \"team\"", "user \"all\""]);
        let request = std::fs::read(directory.path().join("request")).unwrap();
        let request: serde_json::Value = serde_json::from_slice(&request).unwrap();
        assert_eq!(request["image"], "r.example.com/team/model");
        assert_eq!(request["kind"], REQUEST_KIND);
        assert_eq!(users(&plugins.find(&repository("model")).await.unwrap()), ["user \"all\""]);
        assert_eq!(asked(), 1, "the answer holds for the registry");
        plugins.forget(&found[1]);
        plugins.find(&repository("model")).await.unwrap();
        assert_eq!(asked(), 2, "what was refused is asked for again");
        let elsewhere = Repository { registry: "r.example.org".into(), name: "a".into() };
        assert_eq!(plugins.find(&elsewhere).await, Ok(vec![]));
        assert_eq!(asked(), 2);
    }

    #[tokio::test]
    async fn an_answer_without_a_lifetime_is_not_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let plugins = plugins(directory.path(), &ANSWER.replace("1h30m", "0s"));
        for asked in 1..3 {
            plugins.find(&repository("model")).await.unwrap();
            let count = std::fs::read_to_string(directory.path().join("asked")).unwrap().len();
            assert_eq!(count, asked);
        }
    }

    #[tokio::test]
    async fn a_plugin_that_fails_is_named_without_what_it_was_given() {
        let directory = tempfile::tempdir().unwrap();
        let plugins = plugins(directory.path(), "hidden");
        let error = plugins.find(&repository("model")).await.unwrap_err();
        assert!(error.contains("cloud") && !error.contains("hidden"), "{error}");
        assert!(!format!("{:?}", parse_config(CONFIG.as_bytes())).contains("hidden"));
    }

    #[test]
    fn configurations_are_read_and_what_is_wrong_is_said() {
        let providers = parse_config(CONFIG.as_bytes()).unwrap();
        assert_eq!(providers.len(), 1, "the one that wants a pod's token is passed over");
        for (from, to, needle) in [
            ("kubelet.config.k8s.io/v1", "v2", "not a CredentialProviderConfig"),
            ("name: cloud", "name: ../cloud", "no name of a plugin"),
            ("credentialprovider.kubelet.k8s.io/v1", "v7", "unknown apiVersion"),
            ("kind: ", "kind ", "not a CredentialProviderConfig"),
        ] {
            let error = parse_config(CONFIG.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(error.contains(needle) && !error.contains("hidden"), "{error}");
        }
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let seconds = |text| duration(text).map(|duration| duration.as_secs_f64());
        assert_eq!(seconds("12h0m0s"), Some(43_200.0));
        assert_eq!(seconds("1h30m"), Some(5_400.0));
        assert_eq!(seconds("1.5s"), Some(1.5));
        assert_eq!(seconds("250ms"), Some(0.25));
        assert_eq!(seconds("0"), Some(0.0));
        for bad in ["", "5", "h", "-1s", "1d", "1s2", "9e9h", "99999999999999999999h"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn fuzz_configurations_of_plugins_are_refused_or_sound() {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[CONFIG.as_bytes()], input);
            let Ok(providers) = parse_config(&bytes) else { return };
            assert!(providers.len() <= MAX_PLUGINS);
            for provider in providers {
                assert!(!provider.name.contains('/') && !provider.name.is_empty());
                let _ = provider.is_for(&repository("team/model"));
                let _ = provider.default_cache_duration.as_deref().map(duration);
            }
        });
    }

    #[test]
    fn fuzz_answers_of_plugins_are_refused_or_for_their_images() {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[ANSWER.as_bytes()], input);
            match parse_answer(&bytes, VERSIONS[0]) {
                Ok(answer) => {
                    assert!(answer.by_images.len() <= MAX_PATTERNS);
                    assert!(answer.of(&repository("team/model")).len() <= answer.by_images.len());
                }
                Err(why) => assert!(!why.contains("hidden"), "{why}"),
            }
        });
    }
}
