//! The table for people: `docs/metrics.md`.

use super::{Kind, Metric, TABLE};

const HEAD: &str = "\
# Metrics

`[metrics] address` of the configuration turns them on: `\"9478\"` is port 9478 of this machine alone,
`\"0.0.0.0:9478\"` is reached from elsewhere. `GET /metrics` is Prometheus's text format, `/healthz` answers
while the daemon serves. There is no password.

Counters begin at 0 with each start of the daemon, as Prometheus expects. Labels have the values of this
table and no others: none is named after a blob, a host, an image, a path or a peer. Reads of files that the
kernel passes through to their cache files never reach the daemon: of those `weightfs_opens_total` is all that
is known.

`packaging/monitoring/` has a Grafana dashboard and alert rules.

This page is made from the code (`make docs`).

| metric | type | labels | meaning |
|---|---|---|---|
";

/// The page.
pub fn markdown() -> String {
    TABLE.iter().fold(HEAD.to_owned(), |page, metric| page + &row(metric))
}

fn row(metric: &Metric) -> String {
    let kind = match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let labels: Vec<_> = metric
        .labels
        .iter()
        .map(|(name, values)| format!("`{name}`: {}", values().join(", ")))
        .collect();
    format!("| `{}` | {kind} | {} | {}. |\n", metric.name, labels.join("; "), metric.help)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::documents;

    #[test]
    fn documents_the_page_is_what_the_code_says() {
        documents::assert_current("docs/metrics.md", &markdown());
    }

    /// The metrics that an expression names, with the labels that it asks for.
    fn named(expression: &str) -> Vec<(String, Vec<String>)> {
        let name = regex::Regex::new(r"\b((?:weightfs|process)_[a-z_]+)(?:\{([^}]*)\})?").unwrap();
        let label = regex::Regex::new(r#"([a-z_]+)(?:=|!=|=~|!~)""#).unwrap();
        let labels = |text: &str| label.captures_iter(text).map(|at| at[1].to_owned()).collect();
        let found = name.captures_iter(expression);
        found.map(|at| (at[1].to_owned(), labels(at.get(2).map_or("", |it| it.as_str())))).collect()
    }

    fn assert_known(expression: &str) {
        for (name, labels) in named(expression) {
            let of = |suffix| name.strip_suffix(suffix);
            let metric = TABLE.iter().find(|metric| match metric.kind {
                Kind::Histogram => ["_bucket", "_sum", "_count"]
                    .into_iter()
                    .any(|suffix| of(suffix) == Some(metric.name)),
                Kind::Counter | Kind::Gauge => metric.name == name,
            });
            let metric = metric.unwrap_or_else(|| panic!("{expression} names no metric: {name}"));
            for label in labels {
                let own = metric.labels.iter().any(|(known, _)| *known == label);
                assert!(
                    own || ["instance", "job", "le"].contains(&&*label),
                    "{expression}: {label}"
                );
            }
        }
    }

    /// All strings under the key `expr`.
    fn expressions(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Array(values) => values.iter().for_each(|it| expressions(it, found)),
            serde_json::Value::Object(map) => {
                found.extend(map.get("expr").and_then(|it| it.as_str()).map(str::to_owned));
                map.values().for_each(|it| expressions(it, found));
            }
            _ => {}
        }
    }

    #[test]
    fn the_dashboard_and_the_alerts_name_metrics_that_exist() {
        let dashboard = include_str!("../../../packaging/monitoring/dashboard.json");
        let mut found = vec![];
        expressions(&serde_json::from_str(dashboard).unwrap(), &mut found);
        let alerts = include_str!("../../../packaging/monitoring/alerts.yaml");
        let rules = alerts.split("- alert: ").skip(1);
        // Without their texts for people.
        let rules = rules.filter_map(|rule| rule.split("annotations:").next());
        let alerts: Vec<_> = rules.map(str::to_owned).collect();
        assert!(found.len() > 20 && alerts.len() > 5);
        let names: usize = found.iter().chain(&alerts).map(|it| named(it).len()).sum();
        assert!(names >= found.len() + alerts.len() - 1, "an expression without a metric");
        found.iter().chain(&alerts).for_each(|expression| assert_known(expression));
    }

    #[test]
    fn names_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for Metric { name, kind, labels, help, .. } in TABLE {
            assert!(names.insert(name), "{name} twice");
            let own = name.starts_with("weightfs_") || name.starts_with("process_");
            assert!(own, "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            for unit in ["milli", "micro", "_ms", "_mb", "_kb", "_percent"] {
                assert!(!name.contains(unit), "{name} is not in a base unit");
            }
            if *kind == Kind::Histogram {
                assert!(name.ends_with("_seconds") || name.ends_with("_bytes"), "{name}");
            }
            assert!(!help.is_empty() && !help.ends_with('.') && !help.contains('|'), "{name}");
            let series: usize = labels.iter().map(|(_, values)| values().len()).product();
            assert!(series <= 100, "{name} has {series} series");
        }
    }
}
