//! The archive of an image: an OCI image layout, with the one file more that older versions of Docker want.
//!
//! The same program makes the same bytes: nothing in it tells when, where or by whom it was made.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// Where the program stands in the image.
const PROGRAM: &str = "forwarder";

/// An image with one program.
pub(crate) struct Image<'a> {
    /// Name and tag.
    pub reference: &'a str,
    /// The tag alone.
    pub tag: &'a str,
    /// As images name it: `amd64`.
    pub architecture: &'a str,
    /// The program's bytes.
    pub program: &'a [u8],
}

/// Bytes that are named by their digest.
struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self { digest: format!("sha256:{}", hexadecimal(&Sha256::digest(&bytes))), bytes }
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": self.digest,
            "size": self.bytes.len(),
        })
    }
}

impl Image<'_> {
    /// Writes the archive, and yields the digest by which a registry will know the image.
    pub(crate) fn write(&self, output: impl Write) -> Result<String> {
        let layer = Blob::new(self.layer()?);
        let config = Blob::new(serde_json::to_vec(&self.config(&layer.digest))?);
        let manifest = Blob::new(serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor("config.v1+json"),
            "layers": [layer.descriptor("layer.v1.tar")],
        }))?);
        let mut entry = manifest.descriptor("manifest.v1+json");
        entry["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        // The first is for containerd, the second for everyone else.
        entry["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": self.tag,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        });
        // Docker before version 25 looks for this file.
        let docker = json!([{
            "Config": config.path(),
            "RepoTags": [self.reference],
            "Layers": [layer.path()],
        }]);

        let mut archive = Builder::new(output);
        append(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut archive, "index.json", 0o644, &serde_json::to_vec(&index)?)?;
        append(&mut archive, "manifest.json", 0o644, &serde_json::to_vec(&docker)?)?;
        for folder in ["blobs/", "blobs/sha256/"] {
            archive.append(&header(folder, EntryType::Directory, 0o755, 0)?, &[][..])?;
        }
        for blob in [&config, &manifest, &layer] {
            append(&mut archive, &blob.path(), 0o644, &blob.bytes)?;
        }
        archive.into_inner()?.flush()?;
        Ok(manifest.digest)
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::with_capacity(self.program.len() + 4096));
        append(&mut layer, PROGRAM, 0o755, self.program)?;
        Ok(layer.into_inner()?)
    }

    fn config(&self, layer: &str) -> Value {
        json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": [format!("/{PROGRAM}")],
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": "forwarder",
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                    "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [layer]},
            "history": [{"created_by": "cargo xtask image"}],
        })
    }
}

fn append(archive: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let header = header(path, EntryType::Regular, mode, bytes.len())?;
    Ok(archive.append(&header, bytes)?)
}

/// A header that says no more than it has to: root, and the beginning of time.
fn header(path: &str, kind: EntryType, mode: u32, size: usize) -> Result<Header> {
    let mut header = Header::new_ustar();
    header.set_path(path)?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size.try_into()?);
    header.set_cksum();
    Ok(header)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    const IMAGE: Image<'_> = Image {
        reference: "registry.example/forwarder:1.2",
        tag: "1.2",
        architecture: "amd64",
        program: b"\x7fELF and so on",
    };

    fn archive() -> Vec<u8> {
        let mut bytes = Vec::new();
        IMAGE.write(&mut bytes).unwrap();
        bytes
    }

    /// The files of an archive by their paths, with their modes.
    fn files(archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().display().to_string(), (entry.header().mode().unwrap(), bytes))
        };
        tar::Archive::new(archive).entries().unwrap().map(read).collect()
    }

    fn read(files: &BTreeMap<String, (u32, Vec<u8>)>, path: &str) -> Value {
        serde_json::from_slice(&files[path].1).unwrap()
    }

    /// The blob that a descriptor names, whose size and digest are as it says.
    fn follow<'a>(files: &'a BTreeMap<String, (u32, Vec<u8>)>, descriptor: &Value) -> &'a [u8] {
        let digest = descriptor["digest"].as_str().unwrap();
        let (_, bytes) = &files[&format!("blobs/sha256/{}", digest.strip_prefix("sha256:").unwrap())];
        assert_eq!(descriptor["size"], bytes.len());
        assert_eq!(digest, format!("sha256:{}", hexadecimal(&Sha256::digest(bytes))));
        bytes
    }

    #[test]
    fn everything_is_found_from_the_index_by_its_digest() {
        let files = files(&archive());
        assert_eq!(read(&files, "oci-layout")["imageLayoutVersion"], "1.0.0");
        let entry = &read(&files, "index.json")["manifests"][0];
        assert_eq!(entry["annotations"]["io.containerd.image.name"], IMAGE.reference);
        assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], "1.2");
        assert_eq!(entry["platform"]["architecture"], "amd64");
        let manifest: Value = serde_json::from_slice(follow(&files, entry)).unwrap();
        let config: Value = serde_json::from_slice(follow(&files, &manifest["config"])).unwrap();
        let layer = follow(&files, &manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"], json!([manifest["layers"][0]["digest"]]));
        assert_eq!(config["config"]["Entrypoint"], json!(["/forwarder"]));

        // The index names all that there is.
        let blobs = files.keys().filter(|path| path.starts_with("blobs/sha256/") && path.len() > 13);
        assert_eq!(blobs.count(), 3);
        let expected = BTreeMap::from([("forwarder".to_owned(), (0o755, IMAGE.program.to_vec()))]);
        assert_eq!(tests::files(layer), expected);
    }

    #[test]
    fn older_versions_of_docker_find_the_same() {
        let files = files(&archive());
        let docker = &read(&files, "manifest.json")[0];
        assert_eq!(docker["RepoTags"], json!([IMAGE.reference]));
        let manifest: Value =
            serde_json::from_slice(follow(&files, &read(&files, "index.json")["manifests"][0])).unwrap();
        let path = |descriptor: &Value| {
            format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"))
        };
        assert_eq!(docker["Config"], path(&manifest["config"]));
        assert_eq!(docker["Layers"], json!([path(&manifest["layers"][0])]));
    }

    #[test]
    fn the_same_program_makes_the_same_archive() {
        assert_eq!(archive(), archive());
    }
}
