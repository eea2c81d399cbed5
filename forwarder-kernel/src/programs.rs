//! The programs: where they hang, what they leave pinned, and what dead agents left.

pub mod attach;
pub mod cleanup;
pub mod hook;
pub mod pin_dir;
pub mod pins;
