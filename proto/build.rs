//! Generates the bindings of `proto/*.proto` (needs protoc).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(
        &["proto/control.proto", "proto/csi.proto", "proto/peer.proto", "proto/registration.proto"],
        &["proto"],
    )
}
