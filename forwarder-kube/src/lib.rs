//! The Kubernetes API, both ways: [`watch`] reads objects, [`publish`] writes statuses, reports and events.

pub mod publish;
mod settings;
pub mod watch;

pub use self::settings::{KubeSettings, POD_SELECTOR};
