//! What conversations are made of: bytes that follow from a seed, cheap to make and to compare at any position.

use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

use crate::random::Random;

/// The period of the bytes: a prime, so that what is lost or repeated in whole packets or pages shows.
const PERIOD: usize = 1_048_573;
/// The most that is sent or received at a time.
pub const BLOCK: usize = 64 * 1024;

/// One period and a block more, so that a block from any place is in one piece.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; PERIOD];
    Random::new(0).fill(&mut bytes);
    bytes.extend_from_within(..BLOCK);
    bytes
});

/// One direction of a conversation, seen from one of its ends.
#[derive(Clone, Debug)]
pub struct Content {
    start: usize,
    position: usize,
    hash: Sha256,
}

impl Content {
    /// The content of `seed`, from its start.
    pub fn new(seed: u64) -> Self {
        let start = usize::try_from(Random::new(seed).below(PERIOD as u64)).unwrap_or_default();
        Self { start, position: 0, hash: Sha256::new() }
    }

    /// How much has been sent or received.
    pub fn position(&self) -> usize {
        self.position
    }

    /// What comes next: up to `most` bytes, and no more than a block.
    pub fn next(&self, most: usize) -> &'static [u8] {
        let from = (self.start + self.position) % PERIOD;
        &BYTES[from..from + most.min(BLOCK)]
    }

    /// The index of the first of the `bytes`, a block at most, that is another than what comes next.
    pub fn differs(&self, bytes: &[u8]) -> Option<usize> {
        let want = self.next(bytes.len());
        // All at once first, since that is the rule and much faster.
        if bytes == want { None } else { bytes.iter().zip(want).position(|(byte, want)| byte != want) }
    }

    /// Takes note of bytes that have been sent or received.
    pub fn advance(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.position += bytes.len();
    }

    /// The SHA-256 of everything so far.
    pub fn digest(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }

    /// Where in the content `bytes` would belong, looked for around the position: says whether something was lost,
    /// repeated or is foreign.
    pub fn whereabouts(&self, bytes: &[u8]) -> Option<usize> {
        let from = self.position.saturating_sub(PERIOD / 2);
        let found = |at: usize| {
            let at = (self.start + at) % PERIOD;
            BYTES[at..at + BLOCK].starts_with(bytes)
        };
        (from..from + PERIOD).find(|&at| found(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_and_so_is_where_it_belongs() {
        let mut content = Content::new(3);
        let mut digest = Sha256::new();
        for size in [1, 1000, BLOCK, 17] {
            let bytes = content.next(size);
            assert_eq!(bytes.len(), size);
            digest.update(bytes);
            assert_eq!(content.differs(bytes), None);
            content.advance(bytes);
        }
        assert_eq!(content.position(), 1018 + BLOCK);
        assert_eq!(content.digest(), <[u8; 32]>::from(digest.finalize()));
        // A thousand bytes that are missing.
        let mut ahead = content.clone();
        ahead.advance(content.next(1000));
        let late = ahead.next(64);
        assert_eq!(content.whereabouts(late), Some(2018 + BLOCK));
        assert_eq!(content.differs(late), Some(0));
        assert_eq!(content.whereabouts(&[0; 32]), None);
    }

    #[test]
    fn it_goes_on_beyond_its_period() {
        let mut content = Content::new(4);
        let first = content.next(100);
        while content.position() < PERIOD {
            let size = (PERIOD - content.position()).min(BLOCK);
            content.advance(content.next(size));
        }
        assert_eq!(content.next(100), first);
    }
}
