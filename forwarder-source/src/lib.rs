//! Manifests in files: found, read, decoded with every fault named, watched, and kept for the next start.

mod decode;
mod document;
mod fields;
mod file;
pub mod loaded;
mod locations;
mod node;
mod refused;
mod scan;
pub mod state;
mod watch;
mod yaml;

pub use self::file::FileSource;
pub use self::loaded::Loaded;
pub use self::locations::Locations;
pub use self::watch::watch;
