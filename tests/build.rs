//! Generates the bindings of `proto/*.proto` (needs protoc).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .build_client(false)
        .compile_protos(&["proto/scheduler.proto"], &["proto"])
}
