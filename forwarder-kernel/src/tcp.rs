//! The state of TCP connections: read and written by `TCP_REPAIR`, joined, and told to peers by bare segments.

pub mod join;
pub mod leg;
pub mod segments;
pub mod tcp_info;
pub mod timestamp_clock;
