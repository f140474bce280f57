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
