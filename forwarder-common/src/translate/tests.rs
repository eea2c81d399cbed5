//! Against a naive model: whole numbers instead of words, whole packets instead of differences.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// The Internet checksum of `bytes` (RFC 1071), whose own field is zero.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// The two ways to write zero in ones' complement are one.
fn normal(checksum: u16) -> u16 {
    if checksum == u16::MAX { 0 } else { checksum }
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// One option as its bytes.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let timestamps = any::<[u8; 8]>().prop_map(|data| [&[8, 10][..], &data].concat());
    let sack = vec(any::<[u8; 8]>(), 1..=4).prop_map(|blocks| {
        let length = u8::try_from(2 + blocks.len() * 8).unwrap();
        [&[5, length][..], &blocks.concat()].concat()
    });
    let unknown = (prop_oneof![2..5_u8, 6..8_u8, 9..=255_u8], vec(any::<u8>(), 0..10))
        .prop_map(|(kind, data)| [&[kind, u8::try_from(data.len()).unwrap() + 2][..], &data].concat());
    prop_oneof![3 => Just(vec![1]), 2 => timestamps, 2 => sack, 1 => unknown]
}

/// A header of a multiple of four bytes with options of any kinds in any order, padded with ends of the list.
fn header() -> impl Strategy<Value = Vec<u8>> {
    vec(options(), 0..8).prop_map(|options| {
        let mut header = vec![0; 20];
        for option in options {
            if header.len() + option.len() <= 60 {
                header.extend(option);
            }
        }
        header.resize(header.len().next_multiple_of(4), 0);
        header
    })
}

/// The options that the header holds, by kind, place and length, until the end of the list; and how many steps it takes to
/// find them.
fn walk(header: &[u8]) -> (Vec<(u8, usize, u8)>, usize) {
    let mut found = Vec::new();
    let mut steps = 0;
    let mut offset = 20;
    while offset < header.len() && header[offset] != 0 {
        steps += 1;
        if header[offset] == 1 {
            offset += 1;
            continue;
        }
        found.push((header[offset], offset + 2, header[offset + 1]));
        offset += usize::from(header[offset + 1]);
    }
    (found, steps)
}

fn find_options(header: &[u8]) -> Result<Options, OptionsError> {
    let mut walk = OptionsWalk::new();
    for _ in 0..MAX_OPTIONS {
        let read = |offset| header.get(usize::try_from(offset).unwrap()).copied();
        if walk.step(u32::try_from(header.len()).unwrap(), read)? {
            return Ok(walk.found);
        }
    }
    Err(OptionsError::TooMany)
}

proptest! {
    #[test]
    fn a_window_is_never_larger_than_it_was(raw: u16, source in 0..=14_u8, target in 0..=14_u8) {
        let bytes = u64::from(raw) << source;
        let told = u64::from(window(raw, source, target)) << target;
        prop_assert!(told <= bytes);
        let most = u64::from(u16::MAX) << target;
        prop_assert!(bytes.min(most) - told < 1 << target);
    }

    #[test]
    fn options_are_found_wherever_they_stand(header in header()) {
        let (walked, steps) = walk(&header);
        let last = |kind| walked.iter().rev().find(|option| option.0 == kind);
        match find_options(&header) {
            Ok(found) => {
                let place = |kind| last(kind).map_or(0, |option| u32::try_from(option.1).unwrap());
                prop_assert_eq!(found.timestamps, place(8));
                prop_assert_eq!(found.sack, place(5));
                prop_assert_eq!(found.sack_blocks, last(5).map_or(0, |option| u32::from(option.2 - 2) / 8));
            }
            Err(error) => {
                prop_assert_eq!(error, OptionsError::TooMany);
                prop_assert!(steps >= MAX_OPTIONS);
            }
        }
    }

    #[test]
    fn any_bytes_as_options_are_walked_without_leaving_the_header(bytes in vec(any::<u8>(), 0..=40)) {
        let header = [&[0; 20][..], &bytes].concat();
        if let Ok(found) = find_options(&header) {
            let length = u32::try_from(header.len()).unwrap();
            prop_assert!(found.timestamps == 0 || found.timestamps + 8 <= length);
            prop_assert!(found.sack + found.sack_blocks * 8 <= length);
        }
    }

    #[test]
    fn a_changed_checksum_is_that_of_the_changed_packet(
        packet in vec(any::<u8>(), 24..80),
        changes in vec((any::<prop::sample::Index>(), any::<u32>()), 0..14),
    ) {
        let mut changed = packet.clone();
        let mut change = ChecksumChange::NONE;
        for (index, new) in changes {
            let offset = index.index(packet.len() - 3);
            change = change.and_at(u32::try_from(offset).unwrap(), word(&changed, offset), new);
            changed[offset..offset + 4].copy_from_slice(&new.to_be_bytes());
        }
        prop_assert_eq!(normal(change.applied_to(checksum(&packet))), normal(checksum(&changed)));
    }

    #[test]
    fn a_stream_keeps_its_order_through_the_wrap(
        first_in: u32,
        first_out: u32,
        position in 0..u64::from(u32::MAX) * 3,
        length in 0..1_u64 << 30,
    ) {
        // Where a byte stands in a stream that begins at `first`.
        #[expect(clippy::cast_possible_truncation, reason = "sequence numbers are positions modulo 2^32")]
        let number = |first: u32, position: u64| (u64::from(first) + position) as u32;
        let shift = first_out.wrapping_sub(first_in);
        prop_assert_eq!(number(first_in, position).wrapping_add(shift), number(first_out, position));
        let (start, end) = (number(first_out, position), number(first_out, position + length));
        prop_assert_eq!(is_before(start, end), length > 0);
        prop_assert!(!is_before(end, start));
    }

    #[test]
    fn an_echo_is_what_the_receiver_sent(request_shift: u32, response_shift: u32, sent: u32, clock: u32) {
        // The endpoint's clock, as the client sees it, comes back in the client's echo.
        let response = Timestamps { value: sent, echo: 0 }.translated(response_shift, None);
        let request = Timestamps { value: clock, echo: response.value }
            .translated(request_shift, Some(response_shift));
        prop_assert_eq!(request, Timestamps { value: clock.wrapping_add(request_shift), echo: sent });
    }

    #[test]
    fn a_clock_ticks_once_a_millisecond(clock: u32, start in 0..1_u64 << 60, milliseconds in 0..1_u64 << 40) {
        let now = start + milliseconds * 1_000_000;
        #[expect(clippy::cast_possible_truncation, reason = "the clock wraps")]
        let expected = (u64::from(clock) + milliseconds) as u32;
        prop_assert_eq!(clock_at(clock, start, now), expected);
        prop_assert_eq!(clock_at(clock, start, now + 999_999), expected);
    }
}

#[test]
fn half_the_numbers_come_before_any_number() {
    assert!(is_before(0xffff_ffff, 0));
    assert!(!is_before(0, 0xffff_ffff));
    assert!(!is_before(7, 7));
}

#[test]
fn a_window_shrinks_by_what_is_acknowledged_in_advance() {
    assert_eq!(window_without(1_000, 0, 7), 1_000);
    assert_eq!(window_without(1_000, 128, 7), 999);
    assert_eq!(window_without(1_000, 129, 7), 998);
    assert_eq!(window_without(1_000, 1_000 << 7, 7), 0);
    assert_eq!(window_without(1_000, u32::MAX, 7), 0);
}

proptest! {
    #[test]
    fn the_sum_of_a_pseudo_header_is_told(
        source: [u8; 16], destination: [u8; 16], is_v4: bool, length in 20..65_535_u32, other: u16,
    ) {
        let mapped = |address: [u8; 16]| {
            let [.., a, b, c, d] = address;
            if is_v4 { [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] } else { address }
        };
        let (source, destination) = (mapped(source), mapped(destination));
        let bytes = [source, destination].concat();
        let words: Vec<u32> = bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        let words: [u32; 8] = words.try_into().unwrap();
        let [sources, destinations] = [source, destination].map(|address| {
            if is_v4 { address[12..].to_vec() } else { address.to_vec() }
        });
        let pseudo = [sources, destinations, length.to_be_bytes().to_vec(), vec![0, 0, 0, 6]].concat();
        let sum = !checksum(&pseudo);
        prop_assert!(is_pseudo_header_sum(sum.to_be(), &words, length));
        let is_same = normal(other) == normal(sum);
        prop_assert_eq!(is_pseudo_header_sum(other.to_be(), &words, length), is_same);
    }
}
