//! The forwarder agent: turns Gateway API objects into listeners, forwards connections, and says what it did.
//!
//! This crate is the command line ([`cli`]), what an [`agent`] starts and joins, and what it shows of itself ([`admin`], [`metrics`]). Flow of data:
//! `forwarder_source` or `forwarder_kube` reads manifests; `forwarder_gateway` (pure) makes a table of routes, statuses and problems
//! of them, and a plan from the table in force to the wanted one; the reconciler of `forwarder_dataplane` applies it to the listeners
//! and, through `forwarder_kernel`, to the maps. ARCHITECTURE.md states the invariants.

/// That of the C library keeps in pieces what thousands of objects have left: half as much again as is in use (docs/adr/019).
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

pub mod admin;
pub mod agent;
pub mod cli;
pub mod metrics;
pub mod report;
pub mod resolver;
pub mod settings;
pub mod state;
pub mod telemetry;
pub mod view;
