//! The programs: where they hang, what they leave pinned, and what dead agents left.

pub mod attach;
pub mod cleanup;
pub mod hook;
pub mod pin_dir;
pub mod pins;
pub(crate) mod xdp;

use aya::programs::ProgramError;
use rustix::io::Errno;

use crate::load_error::errno_of;

/// How often a program is tried to be loaded where signals interrupt that.
const LOAD_ATTEMPTS: usize = 20;

/// Has the kernel verify a program, again where a signal has interrupted that: `EAGAIN` (`do_check`). Any signal does that the thread
/// has to see to, also that a debugger or the freezer of a cgroup has stopped it for a moment.
pub(crate) fn uninterrupted(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(error) if errno_of(&error) == Some(Errno::AGAIN) => {
                tracing::debug!("a signal has interrupted the loading of a program: it is loaded again");
            }
            loaded => return loaded,
        }
    }
    load()
}
