//! Questions to the kernel's routes and neighbours.

use core::ffi::c_void;

use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::helpers::generated::bpf_fib_lookup as look_up;

/// The families of addresses (`linux/socket.h`).
pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

/// Asks; the answer stands in the question. Returns one of `BPF_FIB_LKUP_RET_*`, or an error. `context` is the program's own.
#[inline(always)]
pub(crate) fn ask(context: *mut c_void, question: &mut bpf_fib_lookup, flags: u32) -> i64 {
    // SAFETY: the context is the program's own, the question initialised and of the size given.
    unsafe { look_up(context.cast(), &raw mut *question, size_of::<bpf_fib_lookup>() as i32, flags) }
}
