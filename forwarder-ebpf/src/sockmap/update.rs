//! The program that the agent runs to change a credit in place: see [`forwarder_common::update`]. It hangs nowhere.

use core::ptr::write_volatile;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use forwarder_common::update::{CreditUpdate, REQUEST_OFFSET};

use crate::maps::CREDITS;

/// Changes the credit of a socket's stream. Returns how many.
#[classifier]
pub fn fwd_set_credit(context: TcContext) -> i32 {
    let Ok(update) = context.load::<CreditUpdate>(REQUEST_OFFSET) else { return 0 };
    let Some(credit) = CREDITS.get_ptr_mut(update.cookie) else { return 0 };
    // SAFETY: the element lives until the agent has closed its socket, which it does not while it runs this. A verdict may
    // read it meanwhile, word by word.
    unsafe {
        (*credit).credit = update.credit.credit;
        (*credit).full = update.credit.full;
        (*credit).notice_shift = update.credit.notice_shift;
        // Nobody else writes it: the agent looks next at what the verdict has passed.
        write_volatile(&raw mut (*credit).relayed, update.credit.relayed);
    }
    1
}
