//! Where the configuration comes from: manifests in files.

mod decode;
mod document;
mod file;
mod locations;
mod manifest;
mod node;
mod scan;
mod watch;
mod yaml;

pub use self::file::{FileSource, Loaded};
pub use self::locations::Locations;
pub use self::watch::watch;
