//! Addresses and ports as the maps know them.

use core::mem::{align_of, offset_of, size_of};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address in network byte order; IPv4 as `::ffff:a.b.c.d`.
pub type AddressBytes = [u8; 16];

/// The bytes by which the maps know an IPv4 address.
#[inline(always)]
pub const fn mapped_v4(octets: [u8; 4]) -> AddressBytes {
    let [a, b, c, d] = octets;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The bytes by which the maps know `address`.
pub const fn address_bytes(address: IpAddr) -> AddressBytes {
    match address {
        IpAddr::V4(v4) => mapped_v4(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address that `bytes` stand for: the inverse of [`address_bytes`].
pub const fn address_of(bytes: AddressBytes) -> IpAddr {
    match bytes {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        _ => IpAddr::V6(Ipv6Addr::from_octets(bytes)),
    }
}

/// Key of [`FLOWS`](crate::layout::FLOWS): the addresses and ports of a packet. 36 bytes without padding.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct FourTuple {
    /// Where it comes from, in network byte order.
    pub source: AddressBytes,
    /// Where it is sent to, in network byte order.
    pub destination: AddressBytes,
    /// The port that it comes from, in host byte order.
    pub source_port: u16,
    /// The port that it is sent to, in host byte order.
    pub destination_port: u16,
}

impl FourTuple {
    /// That of these [addresses](Self::address_words), made of words, because the programs would write it byte by byte.
    #[inline(always)]
    #[must_use]
    pub const fn of_words(addresses: [u32; 8], source_port: u16, destination_port: u16) -> Self {
        #[repr(C)]
        struct Words {
            addresses: [u32; 8],
            ports: u32,
        }
        // As on little-endian machines, the only ones that this is for.
        let ports = (destination_port as u32) << 16 | source_port as u32;
        #[expect(unsafe_code, reason = "the programs write words")]
        // SAFETY: as large, and aligned as the structure is; any bits make integers, and there is no padding.
        unsafe {
            core::mem::transmute::<Words, Self>(Words { addresses, ports })
        }
    }

    /// The addresses as 32-bit words in the byte order of the packet: four of the source, four of the destination. Of an
    /// IPv4 address all but the last are the same in every key.
    #[inline(always)]
    pub const fn address_words(&self) -> &[u32; 8] {
        #[expect(unsafe_code, reason = "the programs sum up words")]
        // SAFETY: the two arrays begin the structure, side by side, and are as large; the structure is aligned to 4
        // bytes; any bits make an integer.
        unsafe {
            &*(&raw const *self).cast()
        }
    }

    /// The tuple of the packets that go the other way on the same leg.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }
}

const _: () = {
    assert!(size_of::<FourTuple>() == 36 && align_of::<FourTuple>() == 4);
    assert!(offset_of!(FourTuple, destination) == 16);
    assert!(offset_of!(FourTuple, source_port) == 32);
    assert!(offset_of!(FourTuple, destination_port) == 34);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the size asserted above equals the
    // sum of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for super::FourTuple {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["0.0.0.0", "127.0.0.1", "192.0.2.7", "::", "::1", "2001:db8::7", "fe80::1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(address_of(address_bytes(address)), address);
        }
    }

    #[test]
    fn a_tuple_is_the_same_by_words() {
        for (source, destination) in [("192.0.2.7", "198.51.100.9"), ("2001:db8::7", "fe80::1:2")] {
            let [source, destination] =
                [source, destination].map(|text| address_bytes(text.parse().unwrap()));
            let tuple = FourTuple { source, destination, source_port: 40_000, destination_port: 3_306 };
            assert_eq!(FourTuple::of_words(*tuple.address_words(), 40_000, 3_306), tuple);
        }
    }

    #[test]
    fn v4_is_mapped_into_v6() {
        let expected: Ipv6Addr = "::ffff:192.0.2.7".parse().unwrap();
        assert_eq!(address_bytes("192.0.2.7".parse().unwrap()), expected.octets());
    }
}
