//! A genuine Kubernetes API: etcd and kube-apiserver, without controllers, scheduler and nodes.
//!
//! What controllers would do, tests do themselves: [`Api::create_pod`] places pods, [`Api::create_endpoint_slice`] names
//! endpoints, nothing collects garbage, and a namespace that is deleted never goes. Everything else is the real thing:
//! admission, validation, defaults, conversion, watches, RBAC.

mod api;
mod apply;
mod assets;
mod audit;
mod crds;
pub mod fields;
mod objects;
mod server;
mod session;

pub use api::{Api, ApiError, Credentials};
pub use assets::{Program, program, require_kubernetes};
pub use audit::Write;
pub use crds::{Channel, RELEASES, crds};
pub use objects::{Endpoint, Pod, endpoint_slice, service};
pub use server::{ADMIN, ApiServer, Options, User};
pub use session::Session;
