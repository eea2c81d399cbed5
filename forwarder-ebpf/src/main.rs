//! The eBPF programs of forwarder.
#![no_std]
#![no_main]
