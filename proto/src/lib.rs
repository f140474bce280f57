//! The protocols of WeightFS: `.proto` files and the code generated from them, nothing else.

/// The control service of a daemon (`proto/control.proto`).
#[expect(missing_docs, reason = "generated; documented in the .proto file")]
pub mod control {
    tonic::include_proto!("weightfs.control.v1");
}

/// What daemons ask each other (`proto/peer.proto`).
#[expect(missing_docs, reason = "generated; documented in the .proto file")]
pub mod peer {
    tonic::include_proto!("weightfs.peer.v1");
}

/// What Kubernetes asks of a volume plugin (`proto/csi.proto`).
#[expect(missing_docs, reason = "generated; documented in the .proto file")]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// How the kubelet finds plugins (`proto/registration.proto`).
#[expect(missing_docs, reason = "generated; documented in the .proto file")]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::csi::volume_capability::{AccessMode, AccessType, MountVolume};
    use super::csi::{NodePublishVolumeRequest, VolumeCapability};

    /// As the specification numbers the fields, not as our file does.
    #[test]
    fn a_publish_request_has_the_specifications_numbers() {
        let bytes = [
            b"\x0a\x01v".as_slice(),               // 1: volume_id
            b"\x22\x02/t",                         // 4: target_path
            b"\x2a\x0a",                           // 5: volume_capability
            b"\x12\x04\x12\x02ro\x1a\x02\x08\x03", // 2: mount, 2: mount_flags; 3: access_mode
            b"\x30\x01",                           // 6: readonly
            b"\x3a\x06\x0a\x01k\x12\x01s",         // 7: secrets, which are not looked at
            b"\x42\x06\x0a\x01a\x12\x01b",         // 8: volume_context
        ]
        .concat();
        let request = NodePublishVolumeRequest::decode(bytes.as_slice()).unwrap();
        let mount = MountVolume { mount_flags: vec!["ro".into()], ..MountVolume::default() };
        let expected = NodePublishVolumeRequest {
            volume_id: "v".into(),
            target_path: "/t".into(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(mount)),
                access_mode: Some(AccessMode { mode: 3 }),
            }),
            readonly: true,
            volume_context: [("a".into(), "b".into())].into(),
        };
        assert_eq!(request, expected);
    }
}
