//! Compiles the wire formats with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=control.proto");
    println!("cargo::rerun-if-changed=csi.proto");
    println!("cargo::rerun-if-changed=pluginregistration.proto");
    if std::env::var_os("CARGO_FEATURE_GRPC").is_none() {
        return Ok(());
    }
    let files = protox::compile(["control.proto", "csi.proto", "pluginregistration.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
