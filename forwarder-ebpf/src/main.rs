//! The eBPF programs of forwarder.
//!
//! A packet enters each file once on its way: [`ingress`] finds the TCP segment in it ([`frame`]) and has [`redirect`] turn what
//! belongs to a flow into a packet of the other leg ([`fragment`], if it comes in pieces; [`rewrite`] changes it, and [`handover`]
//! has a copy for the local socket as long as that still sends). [`icmp`] tells the ends of packets that are too large, and [`reset`]
//! answers packets of pairs that the agent has ended. [`direct`] makes connections of its own at the SYN. A SYN of a client that its listener does not let in is dropped ([`clients`]). Where a program hangs at XDP, that drops such a SYN already, and sends on what is ordinary of established connections ([`xdp`]). Everything else goes on as it was, and what is for a listener is counted
//! ([`admission`]); of a flood of SYNs ([`flood`]) the program answers what sockets are not to be asked ([`cookie`]). [`egress`] holds back what the local sockets of a flow say. Those of [`update`] hang nowhere: by them, the agent
//! changes what stands in the maps. Below all of them are [`flow`] (where what is known of connections stands), [`outcome`], [`arrival`], [`sk_lookup`], [`route`], [`clock`], [`packet`]
//! (what a packet is wherever a program meets it), [`skb`] (what it is at TC) and [`maps`].
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]

mod admission;
mod arrival;
mod clients;
mod clock;
mod compose;
mod cookie;
mod direct;
mod egress;
mod flood;
mod flow;
mod fragment;
mod frame;
mod handover;
mod icmp;
mod ingress;
mod maps;
mod outcome;
mod packet;
mod redirect;
mod reset;
mod rewrite;
mod route;
mod sk_lookup;
mod skb;
mod update;
mod xdp;

/// What the kernel demands of programs that call its GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Programs have no panicking path: the kernel's verifier would refuse the endless loop.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
