//! Generates the bindings of `proto/*.proto` (needs protoc).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .compile_protos(&["proto/control.proto", "proto/peer.proto"], &["proto"])
}
