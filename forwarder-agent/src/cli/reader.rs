//! What a command does when nobody reads what it prints.
#![expect(unsafe_code, reason = "no crate sets the disposition of a signal without it")]

/// Has the process end by SIGPIPE, silently, when whoever reads its output has gone (`| head`), as other tools do.
///
/// Rust's start-up has the signal ignored, so that printing fails with an error instead, on which `println!` panics.
pub(super) fn end_with_it() {
    // SAFETY: SIG_DFL runs no code of this process, and SIGPIPE is a signal that may have it. No other thread has been
    // started yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
