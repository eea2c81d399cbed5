//! The Gateway API as computed: [`manifests`] come in, and [`resolve`] makes a [`model::RouteTable`], [`status`]es and [`problem`]s of
//! them; [`plan`] orders the operations from the table in force to the wanted one.
//!
//! Nothing here reads, writes, waits or asks for the time: the same input gives the same output (ARCHITECTURE.md, "Pure core").

pub mod allowed;
pub mod manifests;
pub mod model;
pub mod object;
pub mod plan;
pub mod problem;
pub mod resolve;
pub mod spelling;
pub mod status;
