//! Deterministic data: the same seed yields the same bytes on both ends of a connection.

use std::fmt::Write as _;
use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};

/// How much is generated, sent or read at a time.
const BLOCK: usize = 64 * 1024;

/// An xorshift* generator: fast, and good enough for data and for choices in tests.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A generator; each seed yields another sequence.
    pub fn new(seed: u64) -> Self {
        // The state must not be zero, and near seeds must not yield near sequences.
        Self { state: (seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1 }
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// Fills `buffer`.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// The hexadecimal text of a SHA-256.
pub fn hex(digest: [u8; 32]) -> String {
    digest.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string never fails");
        text
    })
}

/// Sends `length` bytes made from `seed`; returns their SHA-256.
pub fn send(output: &mut impl Write, seed: u64, length: u64) -> io::Result<[u8; 32]> {
    let mut random = Random::new(seed);
    let mut hash = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut left = length;
    while left > 0 {
        let size = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        random.fill(&mut block[..size]);
        hash.update(&block[..size]);
        output.write_all(&block[..size])?;
        left -= size as u64;
    }
    Ok(hash.finalize().into())
}

/// The SHA-256 of `length` bytes made from `seed`.
pub fn digest(seed: u64, length: u64) -> [u8; 32] {
    send(&mut io::sink(), seed, length).expect("a sink takes everything")
}

/// Reads exactly `length` bytes; returns their SHA-256.
pub fn receive(input: &mut impl Read, length: u64) -> io::Result<[u8; 32]> {
    let (digest, received) = receive_to_end(&mut input.take(length))?;
    if received < length {
        let message = format!("the data ended after {received} of {length} bytes");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    Ok(digest)
}

/// Reads until the end; returns the SHA-256 and the number of bytes.
pub fn receive_to_end(input: &mut impl Read) -> io::Result<([u8; 32], u64)> {
    let mut hash = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    loop {
        match input.read(&mut block) {
            Ok(0) => return Ok((hash.finalize().into(), received)),
            Ok(size) => {
                hash.update(&block[..size]);
                received += size as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_received() {
        let mut data = Vec::new();
        let sent = send(&mut data, 7, 100_001).unwrap();
        assert_eq!(data.len(), 100_001);
        assert_eq!(receive(&mut data.as_slice(), 100_001).unwrap(), sent);
        assert_eq!(digest(7, 100_001), sent);
        assert_ne!(digest(8, 100_001), sent);
        assert!(receive(&mut data.as_slice(), 100_002).is_err());
    }
}
