//! The elements of an array map, mapped into the agent's memory: to read one costs no system call.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd as _;
use std::ptr::{NonNull, null_mut};

use aya::Pod;
use aya::maps::MapData;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What the kernel rounds the size of an element up to (`array_map_alloc`).
const ALIGNMENT: usize = 8;

/// An array map that was made with `BPF_F_MMAPABLE`. Programs write it at the same time, word by word: so does this.
pub(crate) struct Mapped<T> {
    first: NonNull<c_void>,
    bytes: usize,
    length: u32,
    elements: PhantomData<T>,
}

// SAFETY: what is mapped belongs to no thread, and elements are of plain old types.
unsafe impl<T: Pod> Send for Mapped<T> {}
// SAFETY: as above; all that is read and written is so by volatile accesses of words, since the kernel does so anyway.
unsafe impl<T: Pod> Sync for Mapped<T> {}

impl<T: Pod> Mapped<T> {
    /// Maps the whole array.
    ///
    /// # Errors
    /// The kernel refuses, or its elements are of another size.
    pub(crate) fn open(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        if usize::try_from(info.value_size()) != Ok(size_of::<T>())
            || !size_of::<T>().is_multiple_of(size_of::<u32>())
        {
            return Err(io::Error::other("its elements are of another size"));
        }
        let length = info.max_entries();
        let bytes = stride::<T>() * usize::try_from(length).map_err(io::Error::other)?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let first = unsafe {
            mmap(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, map.fd().as_fd(), 0)
        }?;
        let first = NonNull::new(first).ok_or_else(|| io::Error::other("mapped at no address"))?;
        Ok(Self { first, bytes, length, elements: PhantomData })
    }

    /// How many elements it has.
    pub(crate) fn len(&self) -> u32 {
        self.length
    }

    fn at(&self, index: u32) -> Option<NonNull<T>> {
        if index >= self.length {
            return None;
        }
        // SAFETY: it lies within the mapping, which begins at a page and whose elements are aligned to eight bytes.
        Some(unsafe { self.first.byte_add(index as usize * stride::<T>()) }.cast())
    }

    /// An element as it is at this moment; `None` beyond the last. Another may be written meanwhile: of each word, it has what was there or
    /// what is.
    pub(crate) fn get(&self, index: u32) -> Option<T> {
        // SAFETY: the place is valid for as long as this value lives, and any bits are a value of the type.
        Some(unsafe { self.at(index)?.as_ptr().read_volatile() })
    }

    /// A part of an element, `offset` bytes from its first, as [`Self::get`] yields the whole: it costs as much as there is of it.
    pub(crate) fn part<P: Pod>(&self, index: u32, offset: usize) -> Option<P> {
        assert!(
            offset.is_multiple_of(align_of::<P>()) && offset + size_of::<P>() <= size_of::<T>(),
            "a part of the element"
        );
        // SAFETY: as above; the part lies within the element, which is aligned to eight bytes.
        Some(unsafe { self.at(index)?.byte_add(offset).cast::<P>().as_ptr().read_volatile() })
    }

    /// Replaces an element.
    pub(crate) fn set(&self, index: u32, value: T) {
        if let Some(place) = self.at(index) {
            // SAFETY: as above.
            unsafe { place.as_ptr().write_volatile(value) };
        }
    }

    /// Replaces one word of an element, `offset` bytes from its first. The others stay what they are, whoever writes them.
    pub(crate) fn set_word(&self, index: u32, offset: usize, word: u32) {
        assert!(offset.is_multiple_of(size_of::<u32>()) && offset < size_of::<T>(), "a word of the element");
        if let Some(place) = self.at(index) {
            // SAFETY: as above; the word lies within the element, whose size is a multiple of a word's.
            unsafe { place.cast::<u32>().byte_add(offset).as_ptr().write_volatile(word) };
        }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: nothing that this value has lent is used any more.
        let _ = unsafe { munmap(self.first.as_ptr(), self.bytes) };
    }
}

const fn stride<T>() -> usize {
    size_of::<T>().next_multiple_of(ALIGNMENT)
}
