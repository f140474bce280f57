//! What is given to Kubernetes is what Kubernetes knows: the chart, the plain manifests and the
//! examples, by helm, by kustomize, and by the types of its API.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, PersistentVolume, PersistentVolumeClaim, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::storage::v1::CSIDriver;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use weightfs_tests::process::{Outcome, run};
use weightfs_tests::python::python;

/// Kinds of other projects, whose types are not here: that they are YAML is all that is checked.
const OTHERS: &[(&str, &str)] = &[
    ("cert-manager.io/v1", "Certificate"),
    ("data.fluid.io/v1alpha1", "Dataset"),
    ("data.fluid.io/v1alpha1", "ThinRuntime"),
    ("data.fluid.io/v1alpha1", "ThinRuntimeProfile"),
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
    ("serving.kserve.io/v1beta1", "InferenceService"),
];

/// A file of the repository.
fn packaging(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging").join(path)
}

/// A program that `make test-deps` has unpacked.
fn tool(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let mut places = test.ancestors().skip(3).take(2).map(|dir| dir.join("kubernetes").join(name));
    let found = places.find(|place| place.is_file());
    Command::new(found.unwrap_or_else(|| panic!("{name} is missing: run `make test-deps`")))
}

fn helm_template(values: &[&str]) -> Outcome {
    let mut command = tool("helm");
    command.arg("template").args(["weightfs", packaging("helm/weightfs").to_str().unwrap()]);
    command.args(["--namespace", "weightfs"]);
    run(command.args(values.iter().flat_map(|value| ["--set", value])))
}

/// The documents of YAML text.
fn documents(yaml: &str) -> Vec<Value> {
    let program = "import json, sys, yaml\n\
        documents = yaml.safe_load_all(open(sys.argv[1]))\n\
        print(json.dumps([document for document in documents if document is not None]))";
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), yaml).unwrap();
    serde_json::from_str(&python(program, &[file.path().to_str().unwrap()]).ok()).unwrap()
}

/// Asserts that each field of the document is one that its kind has.
fn assert_known(document: &Value, place: &str) {
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    match (version, kind) {
        ("v1", "ConfigMap") => assert_lossless::<ConfigMap>(document, place),
        ("v1", "Namespace") => assert_lossless::<Namespace>(document, place),
        ("v1", "PersistentVolume") => assert_lossless::<PersistentVolume>(document, place),
        ("v1", "PersistentVolumeClaim") => {
            assert_lossless::<PersistentVolumeClaim>(document, place);
        }
        ("v1", "Pod") => assert_lossless::<Pod>(document, place),
        ("v1", "Service") => assert_lossless::<Service>(document, place),
        ("v1", "ServiceAccount") => assert_lossless::<ServiceAccount>(document, place),
        ("apps/v1", "DaemonSet") => assert_lossless::<DaemonSet>(document, place),
        ("apps/v1", "Deployment") => assert_lossless::<Deployment>(document, place),
        ("storage.k8s.io/v1", "CSIDriver") => assert_lossless::<CSIDriver>(document, place),
        other => assert!(OTHERS.contains(&other), "{place}: {other:?} is not known"),
    }
}

/// The types drop what they don't know: nothing may be lost on the way through them.
fn assert_lossless<T: Serialize + DeserializeOwned>(document: &Value, place: &str) {
    let typed: T = serde_json::from_value(document.clone())
        .unwrap_or_else(|error| panic!("{place}, {}: {error}", document["kind"]));
    let typed = serde_json::to_value(typed).unwrap();
    if let Some(lost) = lost(document, &typed, "") {
        panic!("{place}, {}: there is no field {lost}", document["kind"]);
    }
}

/// The first field of `before` that `after` does not have, or has with another value.
fn lost(before: &Value, after: &Value, path: &str) -> Option<String> {
    match (before, after) {
        (Value::Object(fields), _) if fields.is_empty() => None,
        (Value::Object(fields), Value::Object(_)) => fields
            .iter()
            .find_map(|(name, value)| lost(value, &after[name], &format!("{path}.{name}"))),
        (Value::Array(items), _) if items.is_empty() => None,
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => {
            let pairs = items.iter().zip(others).enumerate();
            pairs.into_iter().find_map(|(n, (a, b))| lost(a, b, &format!("{path}[{n}]")))
        }
        _ => (before != after).then(|| path.to_owned()),
    }
}

#[test]
fn a_field_that_kubernetes_does_not_have_is_noticed() {
    let yaml = "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n    - name: x\n      imagee: y\n";
    let pod = documents(yaml).remove(0);
    let noticed = std::panic::catch_unwind(|| assert_known(&pod, "here")).unwrap_err();
    let text = noticed.downcast_ref::<String>().unwrap();
    assert!(text.contains(".spec.containers[0].imagee"), "{text}");
}

#[test]
fn every_manifest_and_example_has_only_what_kubernetes_knows() {
    let mut files = 0;
    for dir in ["kubernetes/base", "kubernetes/pod", "kubernetes/examples"] {
        for entry in fs::read_dir(packaging(dir)).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(path.extension().and_then(|ending| ending.to_str()), Some("yaml"));
            let found = documents(&fs::read_to_string(&path).unwrap());
            assert!(!found.is_empty(), "{} is empty", path.display());
            found.iter().for_each(|document| assert_known(document, path.to_str().unwrap()));
            files += 1;
        }
    }
    assert!(files >= 10, "{files} files");
}

#[test]
fn kustomize_builds_the_plain_manifests() {
    for dir in ["kubernetes/base", "kubernetes/pod"] {
        let text = run(tool("kubectl").arg("kustomize").arg(packaging(dir))).ok();
        let found = documents(&text);
        assert!(found.iter().any(|document| document["kind"] == "Namespace"), "{text}");
        found.iter().for_each(|document| assert_known(document, dir));
        let here = |document: &&Value| document["metadata"]["namespace"] == "weightfs";
        assert_eq!(found.iter().filter(here).count(), 4, "{text}");
    }
}

#[test]
fn the_plain_manifests_are_those_of_the_chart() {
    let to = tempfile::tempdir().unwrap();
    let helm = tool("helm");
    let mut render = Command::new(packaging("kubernetes/render"));
    run(render.arg(helm.get_program()).arg(to.path())).ok();
    for dir in ["base", "pod"] {
        let rendered = fs::read_to_string(to.path().join(dir).join("weightfs.yaml")).unwrap();
        let path = packaging("kubernetes").join(dir).join("weightfs.yaml");
        let written = fs::read_to_string(&path).unwrap();
        assert!(rendered == written, "{}: run packaging/kubernetes/render", path.display());
    }
}

#[test]
fn the_chart_renders_what_kubernetes_knows() {
    let chart = packaging("helm/weightfs");
    run(tool("helm").args(["lint", "--strict", "--quiet"]).arg(&chart)).ok();
    let ways: [&[&str]; 3] = [
        &[],
        &["daemon=pod", "csi.driverName=model.csi.modelpack.org"],
        &[
            "daemon=pod",
            "peers.service=true",
            "peers.tls.secretName=weightfs-tls",
            "peers.tls.certManager.issuerName=ca",
            "registryCredentials.secretName=registry",
            "imagePullSecrets[0].name=registry",
            "podAnnotations.a=b",
        ],
    ];
    let kinds = ways.map(|values| {
        let text = helm_template(values).ok();
        let found = documents(&text);
        found.iter().for_each(|document| assert_known(document, &format!("{values:?}")));
        found.len()
    });
    // The service and the certificate only where they are wanted.
    assert_eq!(kinds, [4, 4, 6]);
}

#[test]
fn the_daemon_understands_the_configuration_that_the_chart_writes() {
    let secret = ["registryCredentials.secretName=registry", "peers.tls.secretName=weightfs-tls"];
    let own = |name: &str| format!("peers.tls.serverName={name}");
    for (values, expected) in [
        (vec![], vec!["# listen ="]),
        (
            [&secret[..], &["peers.service=true"]].concat(),
            vec![
                "listen = \"0.0.0.0:9480\"",
                "dns = \"weightfs-peers.weightfs.svc:9480\"",
                "trust = \"digest\"",
                "cert_file = \"/etc/weightfs/tls/tls.crt\"",
                "server_name = \"weightfs-peers.weightfs.svc\"",
            ],
        ),
        (
            vec![
                "peers.service=true",
                "peers.tls.secretName=t",
                &own("peer.example"),
                "peers.address=[::]",
                "peers.port=7000",
                "peers.trust=cluster",
                "peers.uploads=8",
            ],
            vec![
                "listen = \"[::]:7000\"",
                "trust = \"cluster\"",
                "uploads = 8",
                "server_name = \"peer.example\"",
            ],
        ),
    ] {
        let found = documents(&helm_template(&values).ok());
        let map = found.iter().find(|document| document["kind"] == "ConfigMap").unwrap();
        let map: ConfigMap = serde_json::from_value(map.clone()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &map.data.unwrap()["config.toml"]).unwrap();
        let mut command = Command::new(weightfs_tests::weightfs::binary());
        let understood = run(command.args(["config", "--config"]).arg(file.path())).ok();
        for line in expected {
            assert!(understood.contains(line), "{values:?}: no {line} in\n{understood}");
        }
    }
}

#[test]
fn only_the_daemon_is_privileged_and_its_mounts_are_seen_on_the_node() {
    for (way, privileged) in [("host", 0), ("pod", 1)] {
        let found = documents(&helm_template(&[&format!("daemon={way}")]).ok());
        let set = found.iter().find(|document| document["kind"] == "DaemonSet").unwrap();
        let set: DaemonSet = serde_json::from_value(set.clone()).unwrap();
        let pod = set.spec.unwrap().template.spec.unwrap();
        let is_privileged = |container: &&k8s_openapi::api::core::v1::Container| {
            container.security_context.as_ref().and_then(|context| context.privileged) == Some(true)
        };
        let daemons: Vec<_> = pod.containers.iter().filter(is_privileged).collect();
        assert_eq!(daemons.len(), privileged, "{way}");
        for daemon in daemons {
            let mounts = daemon.volume_mounts.as_ref().unwrap();
            let shared = |path: &str| {
                mounts.iter().any(|mount| {
                    mount.mount_path == path
                        && mount.mount_propagation.as_deref() == Some("Bidirectional")
                })
            };
            assert!(shared("/var/lib/weightfs") && shared("/var/lib/kubelet"));
        }
        assert_eq!(pod.automount_service_account_token, Some(false));
    }
}

#[test]
fn wrong_values_are_refused_with_their_name() {
    for (value, name) in [
        ("daemon=moon", "daemon"),
        ("csi.driverName=-x", "driverName"),
        ("kubeletDir=relative", "kubeletDir"),
        ("peers.port=0", "port"),
        ("peers.trust=nobody", "trust"),
        ("containerd.restrat=true", "restrat"),
        ("imagge.tag=1", "imagge"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
    ] {
        let outcome = helm_template(&[value]);
        assert_ne!(outcome.code, 0, "{value} was taken");
        assert!(outcome.stderr.contains(name), "{value}: {outcome}");
    }
}

#[test]
fn the_schema_has_every_value() {
    let read = |name: &str| fs::read_to_string(packaging("helm/weightfs").join(name)).unwrap();
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let values = documents(&read("values.yaml")).remove(0);
    let names = |value: &Value| -> Vec<String> {
        value.as_object().unwrap().keys().filter(|name| *name != "global").cloned().collect()
    };
    assert_eq!(names(&schema["properties"]), names(&values));
    assert_eq!(names(&schema["properties"]["peers"]["properties"]), names(&values["peers"]));
}
