//! Where the configuration comes from: manifests in files, or objects of a Kubernetes API.

mod decode;
mod document;
mod fields;
mod file;
pub mod kube;
mod loaded;
mod locations;
mod manifest;
mod node;
mod refused;
mod scan;
mod state;
mod watch;
mod yaml;

pub use self::file::FileSource;
pub use self::loaded::Loaded;
pub use self::locations::Locations;
pub use self::watch::watch;
