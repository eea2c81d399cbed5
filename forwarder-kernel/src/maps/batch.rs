//! Reading all entries of a hash map, and removing some, thousands with one system call: one by one, a million take a second.
#![expect(unsafe_code, reason = "a command of bpf(2) that no crate offers")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use aya::Pod;
use rustix::io::Errno;

/// `BPF_MAP_LOOKUP_BATCH` (`linux/bpf.h`), for hash maps since Linux 5.6.
const LOOKUP_BATCH: libc::c_int = 24;
/// How many entries are read at once. A bucket with more of them is read with a larger buffer.
const ENTRIES: usize = 4096;

/// `BPF_MAP_DELETE_BATCH`, likewise.
const DELETE_BATCH: libc::c_int = 27;

/// Removes entries of a hash map whose keys are of this type. One that is not there needs no removal.
///
/// # Errors
/// The kernel refuses; the rest stays.
pub(crate) fn delete<K: Pod>(map: BorrowedFd<'_>, mut keys: &[K]) -> io::Result<()> {
    while !keys.is_empty() {
        let mut batch = Batch {
            begin: 0,
            next: 0,
            keys: keys.as_ptr() as u64,
            values: 0,
            count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
            map: u32::try_from(map.as_raw_fd()).unwrap_or_default(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the pointer is to as many keys as is said, of the size that this map's have, which is the caller's to see to; they live
        // as long as the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, DELETE_BATCH, &raw mut batch, size_of::<Batch>()) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if Errno::from_io_error(&error) != Some(Errno::NOENT) {
            return Err(error);
        }
        // So many were removed; the next one is not there.
        let removed = usize::try_from(batch.count).unwrap_or_default();
        keys = keys.get(removed + 1..).unwrap_or_default();
    }
    Ok(())
}

/// What the call is told: `union bpf_attr`, as this command reads it.
#[repr(C)]
struct Batch {
    /// Where to go on, and where that is said: one word each, for hash maps.
    begin: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Visits each entry of a hash map whose keys and values are of these types. One that is inserted or removed meanwhile is visited or
/// not; any other once, or twice where another process holds a part of the map on kernels from 5.11 to 5.19.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn for_each<K: Pod, V: Pod>(map: BorrowedFd<'_>, mut visit: impl FnMut(&K, &V)) -> io::Result<()> {
    let mut size = ENTRIES;
    let (mut keys, mut values) = (room::<K>(size), room::<V>(size));
    let mut token: Option<u32> = None;
    loop {
        let (begin, mut next) = (token.unwrap_or_default(), 0_u32);
        let mut batch = Batch {
            begin: if token.is_some() { (&raw const begin) as u64 } else { 0 },
            next: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(size).unwrap_or(u32::MAX),
            map: u32::try_from(map.as_raw_fd()).unwrap_or_default(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the pointers are to values that live as long as the call: two words, and as many keys and values as is said, of
        // the sizes that this map has, which is the caller's to see to.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
        let error = (result != 0).then(io::Error::last_os_error);
        let errno = error.as_ref().and_then(Errno::from_io_error);
        if errno == Some(Errno::NOSPC) {
            // One bucket has more entries than there is room for; nothing was read of it.
            size *= 2;
            (keys, values) = (room::<K>(size), room::<V>(size));
            continue;
        }
        if let Some(error) = error
            && errno != Some(Errno::NOENT)
        {
            return Err(error);
        }
        let count = usize::try_from(batch.count).unwrap_or_default();
        for (key, value) in keys.iter().zip(&values).take(count) {
            // SAFETY: the kernel has written so many of each, and of these types any bits are valid.
            let (key, value) = unsafe { (key.assume_init_ref(), value.assume_init_ref()) };
            visit(key, value);
        }
        if errno == Some(Errno::NOENT) {
            return Ok(());
        }
        token = Some(next);
    }
}

fn room<T>(size: usize) -> Vec<MaybeUninit<T>> {
    std::iter::repeat_with(MaybeUninit::uninit).take(size).collect()
}
