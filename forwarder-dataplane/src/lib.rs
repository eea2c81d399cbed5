//! Connections: the [`reconciler`] gives [`listener`]s to the [`worker`]s, which accept, choose an endpoint of an [`upstream`], connect
//! it and [`relay`] bytes, until a connection ends or the kernel takes it ([`offload`]).

mod connection;
pub mod counters;
pub mod descriptors;
pub mod listener;
pub mod live;
pub mod offload;
pub mod reconciler;
mod record;
pub mod relay;
pub mod removal;
pub mod upstream;
pub mod view;
pub mod worker;
pub mod worker_context;
