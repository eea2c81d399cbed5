//! The eBPF programs of forwarder.
//!
//! [`classify`] counts, at the ingress of each interface, the TCP packets to the listeners, and passes them on to the next
//! program as they were. What belongs to a flow, [`redirect`] turns into a packet of the other leg ([`fragment`], if it comes in
//! pieces), and [`icmp`] tells its
//! ends of packets that are too large. [`guard`], at egress, holds back what the local sockets of a flow say.
#![no_std]
#![no_main]

mod classify;
mod fragment;
mod guard;
mod icmp;
mod maps;
mod redirect;
mod rewrite;
mod tail;

/// What the kernel demands of programs that call its GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Programs have no panicking path: the kernel's verifier would refuse the endless loop.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
