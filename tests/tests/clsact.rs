//! The tests of what outlives an agent, once more with the filters by which programs hang where the kernel has no tcx: see
//! [`forwarder_tests::attach`].

#[path = "attachments.rs"]
mod attachments;
#[path = "privileges.rs"]
mod privileges;
#[path = "removal.rs"]
mod removal;
#[path = "shutdown.rs"]
mod shutdown;
#[path = "survival.rs"]
mod survival;
