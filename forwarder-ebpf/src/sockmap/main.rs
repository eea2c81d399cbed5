//! The eBPF program of tier `sockmap`: a [`verdict`] on everything that a socket of a pair receives, and the
//! program by which the agent changes how much of it is redirected.
#![no_std]
#![no_main]

mod maps;
mod update;
mod verdict;

/// What the kernel demands of programs that call its GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Programs have no panicking path: the kernel's verifier would refuse the endless loop.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
