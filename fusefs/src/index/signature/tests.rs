//! Signatures that openssl made, and what is none.

use super::*;

const KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEx2TvtP3OXoPQHFkKv8X4GRSmZpSh
9VLoJGzwjusI19HXeaBHdJyxFz49dBX1AHU2fXYTFzdYuu0m2hvX+bHI3g==
-----END PUBLIC KEY-----
";
const OTHER_KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAECMvjeFi4YgNP/kpdL6z2oEf4EdX8
FXfKfgXl/vj/mEpthBC0fh5YZ1byqo8ulApOJL8RstSEtnPPGxxHL94kWg==
-----END PUBLIC KEY-----
";
const KEY_ON_P384: &str = "-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEhJWhsvsNf6RcKo4BTnFVKcup6/T1qcWp
/POhsoeUq559ujT/3Qd+aE0iE4ptY6KkaZekadSddsIKYVe9Zs6efl+5apKTLARx
+YoAxqWT3cWux0gR2wIcNg7OieSocIuY
-----END PUBLIC KEY-----
";
const MANIFEST: &str = "sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19";
const PAYLOAD: &str = r#"{"critical":{"identity":{"docker-reference":"localhost:5000/m"},"image":{"docker-manifest-digest":"sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19"},"type":"cosign container image signature"},"optional":null}"#;
/// Made with `openssl dgst -sha256 -sign`.
const SIGNED: &str = "MEYCIQC9fZjXTAr7i9hsV9ZISSSuAKLNYtRF4GeFsd704HrqAAIhAMBu0BxBRnonsJnRqrPxkkoPz6SHrtuEWxNssD1r1prY";

fn key(pem: &str) -> PublicKey {
    PublicKey::from_pem(pem.as_bytes()).unwrap()
}

fn signature() -> Vec<u8> {
    STANDARD.decode(SIGNED).unwrap()
}

fn manifest() -> Digest {
    MANIFEST.parse().unwrap()
}

#[test]
fn what_one_of_the_keys_has_signed_is_believed() {
    let keys = [key(OTHER_KEY), key(KEY)];
    assert_eq!(check_payload(PAYLOAD.as_bytes(), &signature(), manifest(), &keys), Ok(()));
}

#[test]
fn a_signature_of_another_key_or_manifest_or_of_changed_bytes_is_not() {
    let check = |payload: &str, signature: &[u8], manifest, keys: &[PublicKey]| {
        check_payload(payload.as_bytes(), signature, manifest, keys).unwrap_err()
    };
    let (keys, good) = ([key(KEY)], signature());
    let none_of_the_keys = "none of the keys in verify.keys";
    assert!(check(PAYLOAD, &good, manifest(), &[key(OTHER_KEY)]).contains(none_of_the_keys));
    assert!(check(PAYLOAD, &good, manifest(), &[]).contains(none_of_the_keys));
    assert!(check(&PAYLOAD.replace("null", "true"), &good, manifest(), &keys).contains("none of"));
    for at in 0..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 1;
        assert!(check(PAYLOAD, &changed, manifest(), &keys).contains(none_of_the_keys), "{at}");
    }
    let other = Digest::of(b"other");
    assert!(
        check(PAYLOAD, &good, other, &keys).contains(&format!("its signature is of {MANIFEST}"))
    );
}

#[test]
fn a_payload_that_is_no_signature_of_a_manifest_says_nothing() {
    for wrong in ["", "{}", "[]", r#"{"critical":{"image":{},"type":"x"}}"#] {
        assert!(signed_manifest(wrong.as_bytes()).unwrap_err().contains("of something else"));
    }
    let other = PAYLOAD.replace(PAYLOAD_TYPE, "atomic container signature");
    assert_eq!(
        signed_manifest(other.as_bytes()).unwrap_err(),
        "its signature is of something else"
    );
}

#[test]
fn other_files_are_no_keys() {
    let private = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    for (pem, why) in [
        ("", "no PUBLIC KEY"),
        ("key", "no PUBLIC KEY"),
        (private, "no PUBLIC KEY"),
        (KEY_ON_P384, "no key of ECDSA on the curve P-256"),
        (&KEY.replace("x2Tv", "AAAA\nAAAA"), "no key of ECDSA"),
    ] {
        assert!(PublicKey::from_pem(pem.as_bytes()).unwrap_err().contains(why), "{pem}");
    }
    let error = PublicKey::read(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(error.starts_with("public key /nonexistent: "), "{error}");
}

fn signatures(size: u64, count: usize) -> Bytes {
    let layer = serde_json::json!({
        "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "digest": Digest::of(PAYLOAD.as_bytes()).to_string(),
        "size": size,
        "annotations": {SIGNATURE: SIGNED, "other": "x"},
    });
    serde_json::json!({"schemaVersion": 2, "layers": vec![layer; count]}).to_string().into()
}

#[test]
fn signatures_are_read_within_their_bounds() {
    let found = parse_signatures(&signatures(PAYLOAD.len() as u64, 2)).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], (Digest::of(PAYLOAD.as_bytes()), PAYLOAD.len() as u64, signature()));
    assert_eq!(parse_signatures(&signatures(MAX_PAYLOAD_BYTES + 1, 1)).unwrap(), []);
    assert_eq!(parse_signatures(&signatures(1, 1000)).unwrap().len(), MAX_SIGNATURES);
    assert!(parse_signatures(&Bytes::from_static(b"{}")).is_err());
}

#[test]
fn fuzz_signatures_are_refused_or_bounded() {
    let sample = signatures(PAYLOAD.len() as u64, 1);
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = Bytes::from(weightfs_fuzz::foreign(&[&sample], input));
        if let Ok(found) = parse_signatures(&bytes) {
            assert!(found.len() <= MAX_SIGNATURES);
            assert!(found.iter().all(|(_, size, _)| *size <= MAX_PAYLOAD_BYTES));
        }
    });
}

#[test]
fn fuzz_payloads_name_a_manifest_only_where_they_say_so() {
    let keys = [key(KEY)];
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = weightfs_fuzz::foreign(&[PAYLOAD.as_bytes()], input);
        if let Ok(named) = signed_manifest(&bytes) {
            let text = String::from_utf8_lossy(&bytes);
            assert!(text.contains(PAYLOAD_TYPE) || text.contains('\\'), "{named}");
        }
        let believed = check_payload(&bytes, &signature(), manifest(), &keys).is_ok();
        assert_eq!(believed, bytes == PAYLOAD.as_bytes(), "one document was signed");
    });
}

#[test]
fn fuzz_keys_are_refused_or_work() {
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = weightfs_fuzz::foreign(&[KEY.as_bytes()], input);
        if let Ok(read) = PublicKey::from_pem(&bytes) {
            let believed = read.has_signed(PAYLOAD.as_bytes(), &signature());
            assert_eq!(believed, read == key(KEY));
        }
    });
}
