// Cuts packets up as routers and senders do; the agent's tests of the loaded program and the wires of the integration tests
// include this file too.

/// Bytes of the Ethernet header, of IPv6's header and of its fragment header.
const ETHERNET: usize = 14;
const IPV6: usize = 40;
const FRAGMENT_HEADER: usize = 8;
/// "More fragments" in the word that holds IPv4's offset, and in the one that holds IPv6's.
const IPV4_MORE: u16 = 0x2000;
const IPV6_MORE: u16 = 1;

/// The frames of the fragments of an IP packet that is longer than `longest` bytes, from the IP header on; the frame itself
/// otherwise. All of them get all of IPv4's options.
pub(crate) fn cut(frame: &[u8], longest: usize, identification: u32) -> Vec<Vec<u8>> {
    let whole = || vec![frame.to_vec()];
    let (is_v6, header) = match (frame.get(12..14), frame.get(ETHERNET)) {
        (Some([0x08, 0x00]), Some(first)) => (false, usize::from(first & 15) * 4),
        (Some([0x86, 0xdd]), _) => (true, IPV6),
        _ => return whole(),
    };
    if frame.len() <= ETHERNET + longest {
        return whole();
    }
    let (headers, piece) = frame.split_at(ETHERNET + header);
    let more_headers = if is_v6 { FRAGMENT_HEADER } else { 0 };
    let room = (longest - header - more_headers) / 8 * 8;
    let count = piece.len().div_ceil(room);
    let cut_one = |(index, bytes): (usize, &[u8])| {
        let mut fragment = headers.to_vec();
        let place = u16::try_from(index * room).expect("a packet is no longer");
        let has_more = index + 1 < count;
        if is_v6 {
            let length = u16::try_from(FRAGMENT_HEADER + bytes.len()).expect("a packet is no longer");
            fragment[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
            let next = std::mem::replace(&mut fragment[ETHERNET + 6], 44);
            fragment.extend([next, 0]);
            fragment.extend((place | if has_more { IPV6_MORE } else { 0 }).to_be_bytes());
            fragment.extend(identification.to_be_bytes());
        } else {
            let length = u16::try_from(header + bytes.len()).expect("a packet is no longer");
            let [.., high, low] = identification.to_be_bytes();
            let ip = &mut fragment[ETHERNET..];
            ip[2..4].copy_from_slice(&length.to_be_bytes());
            ip[4..6].copy_from_slice(&[high, low]);
            ip[6..8].copy_from_slice(&((place / 8) | if has_more { IPV4_MORE } else { 0 }).to_be_bytes());
            ip[10..12].fill(0);
            let sum = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
            let folded = (sum & 0xffff) + (sum >> 16);
            let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice");
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        fragment.extend(bytes);
        fragment
    };
    piece.chunks(room).enumerate().map(cut_one).collect()
}
