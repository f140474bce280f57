//! What a daemon's metrics say, read as a Prometheus server reads them.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::remote::block_on;
use crate::weightfs::Weightfs;

/// The metrics of a daemon at one moment: each series with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// By name with labels, as they are written.
    pub series: BTreeMap<String, f64>,
    /// The text.
    pub text: String,
}

/// Turns metrics on, at a free port. To be called before the daemon is started.
pub fn configure(weightfs: &Weightfs, more: &str) {
    weightfs.configure(&format!("[metrics]\naddress = \"127.0.0.1:0\"\n{more}"));
}

/// Where a running daemon has its metrics.
pub fn address(weightfs: &Weightfs) -> String {
    let status = weightfs.run_here(&["status", "--json"]).ok();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["metrics_address"].as_str().unwrap().to_owned()
}

/// Gets a page of the metrics address: its status, its type and its text.
///
/// # Panics
/// When nobody answers.
pub fn get(address: &str, path: &str) -> (u16, String, String) {
    block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let answer = client.get(format!("http://{address}{path}")).send().await.unwrap();
        let kind = answer.headers().get("content-type").map(|kind| kind.to_str().unwrap());
        let kind = kind.unwrap_or_default().to_owned();
        (answer.status().as_u16(), kind, answer.text().await.unwrap())
    })
}

impl Metrics {
    /// As they are now.
    ///
    /// # Panics
    /// When they can't be had, or a line is not of Prometheus's text format.
    pub fn of(address: &str) -> Self {
        let (status, kind, text) = get(address, "/metrics");
        assert_eq!(status, 200, "{text}");
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let series = samples.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        Self { series: series.collect(), text }
    }

    /// The value of a series.
    ///
    /// # Panics
    /// When there is none.
    pub fn value(&self, series: &str) -> f64 {
        let value = self.series.get(series);
        *value.unwrap_or_else(|| panic!("no {series} in\n{}", self.text))
    }

    /// Names of metrics of which a series differs.
    pub fn moved(&self, before: &Self) -> Vec<String> {
        let differs = |(name, value): (&String, &f64)| {
            (before.series.get(name) != Some(value)).then(|| metric(name))
        };
        let mut names: Vec<_> = self.series.iter().filter_map(differs).collect();
        names.dedup();
        names
    }
}

/// The name of the metric that a series is of.
fn metric(series: &str) -> String {
    let name = series.split('{').next().unwrap_or_default();
    let parts = ["_bucket", "_sum", "_count"];
    parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name).to_owned()
}

/// Gives promtool a text, and asserts that it finds nothing wrong with it.
///
/// # Panics
/// When it does, or is not here.
pub fn promtool(arguments: &[&str], input: &str) {
    let mut command = Command::new(promtool_path());
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

/// Where `packaging/promtool` has put it, else what is installed.
fn promtool_path() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let mut places =
        me.ancestors().skip(1).take(3).map(|dir| dir.join("promtool/usr/bin/promtool"));
    places.find(|place| place.is_file()).unwrap_or_else(|| "promtool".into())
}
