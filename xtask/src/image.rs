//! `cargo xtask image`: a container image that holds the agent and nothing else, made without a container engine.

mod archive;
mod executable;

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{ebpf, workspace};

#[derive(Args)]
pub(crate) struct Arguments {
    /// The image's name and tag [default: localhost/forwarder:VERSION]
    #[arg(long, value_name = "NAME:TAG")]
    reference: Option<String>,
    /// Where to write the archive [default: image.tar in the target directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Take this binary instead of building one; it has to be linked statically.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Builds the agent, unless there is one, and writes the archive.
pub(crate) fn image(arguments: &Arguments) -> Result<()> {
    let default = format!("localhost/forwarder:{}", env!("CARGO_PKG_VERSION"));
    let reference = arguments.reference.as_deref().unwrap_or(&default);
    let Some((_, tag)) = reference.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) else {
        bail!("`{reference}` has no tag: give a name and a tag, such as {default}");
    };
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None => ebpf::build_static_agent(&ebpf::build()?)?,
    };
    let program = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
    let architecture = executable::inspect(&program)
        .with_context(|| format!("{} cannot be all that an image holds", binary.display()))?;

    let output = arguments.output.clone().unwrap_or_else(|| workspace::target_directory().join("image.tar"));
    let image = archive::Image { reference, tag, architecture, program: &program };
    let context = || format!("writing {}", output.display());
    let file = File::create(&output).with_context(context)?;
    let digest = image.write(BufWriter::new(file)).with_context(context)?;
    println!("{reference} (linux/{architecture}), {digest}, in {}", output.display());
    println!("load it with one of");
    for command in ["docker load -i", "podman load -i", "ctr -n k8s.io images import"] {
        println!("    {command} {}", output.display());
    }
    println!("    skopeo copy oci-archive:{}:{tag} docker://REGISTRY/forwarder:{tag}", output.display());
    Ok(())
}
