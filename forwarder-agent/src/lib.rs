//! The forwarder agent: turns Gateway API objects into listeners, forwards connections, and says what it did.
//!
//! Flow of data: a [`source`] reads [`manifests`]; [`resolve`] (pure) makes a [`model::RouteTable`], statuses and
//! problems of them; [`plan`] (pure) orders the operations from the table in force to the wanted one; the
//! [`reconciler`] applies these to the listeners and to the [`datapath`]'s maps; [`worker`]s accept connections, connect
//! an endpoint and [`relay`] bytes. Where the objects come from a Kubernetes API, [`publish`] writes the statuses there.
//! ARCHITECTURE.md states the invariants.

/// That of the C library keeps in pieces what thousands of objects have left: half as much again as is in use (docs/adr/019).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

pub mod admin;
pub mod agent;
pub mod allowed;
pub mod balancer;
pub mod cli;
mod connection;
pub mod counters;
pub mod datapath;
pub mod descriptors;
mod drain;
mod error;
mod failpoint;
pub mod fallback_reason;
pub mod listener;
pub mod live;
mod lock;
pub mod manifests;
pub mod metrics;
pub mod model;
pub mod object;
pub mod pairs;
mod panics;
pub mod plan;
pub mod problem;
pub mod publish;
pub mod reconciler;
mod record;
pub mod relay;
pub mod removal;
pub mod report;
pub mod resolve;
pub mod resolver;
pub mod segment_size;
pub mod settings;
pub mod sockmap;
pub mod source;
mod spelling;
pub mod state;
pub mod status;
pub mod telemetry;
pub mod tier_toggles;
pub mod upstream;
pub mod view;
pub mod worker;
pub mod worker_context;
