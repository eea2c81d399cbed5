//! What a test that waited in vain leaves to be read: why something stood still once, nobody can ask later.

use std::cell::RefCell;

/// How much is shown of one answer, in bytes.
const SHOWN: usize = 6_000;

/// Tells how something stands now: nothing, if it is gone.
type Ask = Box<dyn Fn() -> Option<String>>;

thread_local! {
    /// What this thread has made that can be asked, by its name.
    static WITNESSES: RefCell<Vec<(String, Ask)>> = const { RefCell::new(Vec::new()) };
}

/// Remembers what a test of this thread may want to know of.
pub(crate) fn add(name: String, ask: impl Fn() -> Option<String> + 'static) {
    WITNESSES.with_borrow_mut(|witnesses| witnesses.push((name, Box::new(ask))));
}

/// Prints what all of it says now, once.
pub(crate) fn show() {
    for (name, ask) in WITNESSES.take() {
        if let Some(text) = ask() {
            let end = text.floor_char_boundary(SHOWN);
            eprintln!("---- {name}:\n{}", text[..end].trim_end());
            if end < text.len() {
                eprintln!("({} bytes more)", text.len() - end);
            }
        }
    }
}
