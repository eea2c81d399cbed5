//! Packets of flows, crafted, and a naive model of what the ingress program makes of them: decode, translate each field by itself,
//! encode with fresh checksums.

use std::net::IpAddr;

use forwarder_common::flow::{DIRECTION_REQUEST, Flow, NextHop, Pair, STATE_OFFLOADED};
use forwarder_common::packet::FLAG_ACK;
use forwarder_common::tuple::FourTuple;
use forwarder_common::tuple::{address_bytes, address_of};

use super::{Bpffs, PAIR, bpffs, load_egress, write_flows, write_pair};
use crate::bpf::Bpf;

/// The interface that test runs say packets arrive by.
pub(super) const LOOPBACK: u32 = 1;
pub(super) const TC_ACT_SHOT: i32 = 2;
pub(super) const TC_ACT_REDIRECT: i32 = 7;
/// Shifts that make the numbers of most packets wrap.
pub(super) const SEQUENCE_SHIFT: u32 = 0xffff_f000;
pub(super) const REVERSE_SHIFT: u32 = 0x8000_0001;
pub(super) const TIMESTAMP_SHIFT: u32 = 0xdead_beef;
pub(super) const REVERSE_TIMESTAMP_SHIFT: u32 = 0x1234_5678;

/// What both ends take beyond what they have acknowledged.
pub(super) const WINDOW: u16 = 60_000;

/// A TCP packet in an Ethernet frame.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Frame {
    pub(super) tuple: FourTuple,
    /// The TTL or hop limit, which is not carried over.
    pub(super) hop_limit: u8,
    pub(super) ip_options: Vec<u8>,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) options: Vec<Field>,
    pub(super) payload: Vec<u8>,
}

/// A TCP option.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Field {
    Nop,
    Timestamps(u32, u32),
    Sack(Vec<[u32; 2]>),
    Other(u8, Vec<u8>),
}

pub(super) fn tuple(source: &str, destination: &str) -> FourTuple {
    let parse = |text: &str| text.parse::<std::net::SocketAddr>().unwrap();
    let (source, destination) = (parse(source), parse(destination));
    FourTuple {
        source: address_bytes(source.ip()),
        destination: address_bytes(destination.ip()),
        source_port: source.port(),
        destination_port: destination.port(),
    }
}

pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

impl Frame {
    pub(super) fn new(tuple: FourTuple) -> Self {
        Self {
            tuple,
            hop_limit: 1,
            ip_options: Vec::new(),
            sequence: 0xffff_fff0,
            acknowledgement: 0x0000_1000,
            flags: FLAG_ACK,
            window: 501,
            options: vec![Field::Nop, Field::Nop, Field::Timestamps(1_000, 2_000)],
            payload: b"some payload of odd length.".to_vec(),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut options = Vec::new();
        for option in &self.options {
            match option {
                Field::Nop => options.push(1),
                Field::Timestamps(value, echo) => {
                    options.extend([8, 10]);
                    options.extend(value.to_be_bytes());
                    options.extend(echo.to_be_bytes());
                }
                Field::Sack(blocks) => {
                    options.extend([5, u8::try_from(2 + blocks.len() * 8).unwrap()]);
                    options.extend(blocks.iter().flatten().flat_map(|edge| edge.to_be_bytes()));
                }
                Field::Other(kind, data) => {
                    options.extend([*kind, u8::try_from(2 + data.len()).unwrap()]);
                    options.extend(data);
                }
            }
        }
        options.resize(options.len().next_multiple_of(4), 0);
        let mut tcp = Vec::new();
        tcp.extend(self.tuple.source_port.to_be_bytes());
        tcp.extend(self.tuple.destination_port.to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        tcp.extend([u8::try_from((20 + options.len()) / 4).unwrap() << 4, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(&self.payload);
        let length = u32::try_from(tcp.len()).unwrap();
        let (source, destination) = (address_of(self.tuple.source), address_of(self.tuple.destination));
        let pseudo =
            [bytes_of(source), bytes_of(destination), length.to_be_bytes().to_vec(), vec![0, 0, 0, 6]];
        let sum = checksum(&[&pseudo.concat(), &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());

        let mut frame = vec![0; 12];
        if source.is_ipv4() {
            frame.extend([0x08, 0x00]);
            let header_length = 20 + self.ip_options.len();
            let mut ip = vec![0x40 | u8::try_from(header_length / 4).unwrap(), 0];
            ip.extend(u16::try_from(header_length + tcp.len()).unwrap().to_be_bytes());
            ip.extend([0, 1, 0x40, 0, self.hop_limit, 6, 0, 0]);
            ip.extend(bytes_of(source));
            ip.extend(bytes_of(destination));
            ip.extend(&self.ip_options);
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend(ip);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(u16::try_from(tcp.len()).unwrap().to_be_bytes());
            frame.extend([6, self.hop_limit]);
            frame.extend(bytes_of(source));
            frame.extend(bytes_of(destination));
        }
        frame.extend(tcp);
        frame
    }

    /// The same with a checksum of the pseudo-header alone, as a super-packet has it.
    pub(super) fn encode_partial(&self) -> Vec<u8> {
        let mut frame = self.encode();
        let (source, destination) = (address_of(self.tuple.source), address_of(self.tuple.destination));
        let tcp = if source.is_ipv4() { 14 + 20 } else { 14 + 40 };
        let length = u32::try_from(frame.len() - tcp).unwrap();
        let parts: [&[u8]; 3] = [&bytes_of(source), &bytes_of(destination), &length.to_be_bytes()];
        let sum = !checksum(&[&parts.concat(), &[0, 0, 0, 6]]);
        frame[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// The same packet on the other leg.
    pub(super) fn translated(&self, flow: &Flow) -> Self {
        let acknowledged = |number: u32| number.wrapping_add(flow.acknowledgement_shift);
        let window = (u64::from(self.window) << flow.source_scale) >> flow.target_scale;
        Self {
            tuple: flow.out,
            hop_limit: flow.hop_limit,
            sequence: self.sequence.wrapping_add(flow.sequence_shift),
            acknowledgement: if self.flags & FLAG_ACK == 0 {
                self.acknowledgement
            } else {
                acknowledged(self.acknowledgement)
            },
            window: u16::try_from(window).unwrap_or(u16::MAX),
            options: self
                .options
                .iter()
                .map(|option| match option {
                    Field::Timestamps(value, echo) => Field::Timestamps(
                        value.wrapping_add(TIMESTAMP_SHIFT),
                        echo.wrapping_sub(REVERSE_TIMESTAMP_SHIFT),
                    ),
                    Field::Sack(blocks) => {
                        Field::Sack(blocks.iter().map(|block| block.map(acknowledged)).collect())
                    }
                    other => other.clone(),
                })
                .collect(),
            ..self.clone()
        }
    }
}

pub(super) fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(super) fn flow_v4() -> (FourTuple, Flow) {
    let key = tuple("192.0.2.1:40000", "198.51.100.7:9001");
    (key, flow(tuple("198.51.100.8:51000", "203.0.113.9:3306")))
}

pub(super) fn flow_v6() -> (FourTuple, Flow) {
    let key = tuple("[2001:db8::1]:40000", "[2001:db8::7]:9001");
    (key, flow(tuple("[2001:db8:1::8]:51000", "[2001:db8:2::9]:3306")))
}

fn flow(out: FourTuple) -> Flow {
    Flow {
        out,
        interface: 1,
        next_hop: NextHop::new(address_of(out.destination)),
        mtu: 0,
        clock_time: 0,
        clock: 0,
        pair: PAIR,
        direction: DIRECTION_REQUEST,
        state: STATE_OFFLOADED,
        sequence_shift: SEQUENCE_SHIFT,
        acknowledgement_shift: REVERSE_SHIFT.wrapping_neg(),
        source_scale: 7,
        target_scale: 9,
        flags: 0,
        acknowledged: 0,
        arrival: LOOPBACK,
        hop_limit: 64,
        receiver_scale: 0,
        pad: [0; 2],
    }
}

/// A pair of which both clocks are known.
pub(super) fn known_clocks() -> Pair {
    let mut pair = Pair::default();
    pair.request.learn_clock(TIMESTAMP_SHIFT);
    pair.response.learn_clock(REVERSE_TIMESTAMP_SHIFT);
    pair
}

/// The same, at the place of `frame` in the streams of both ends.
pub(super) fn at(frame: &Frame) -> Pair {
    let mut pair = known_clocks();
    pair.request.sequence_end = frame.sequence;
    pair.request.acknowledged = frame.acknowledgement;
    pair.request.edge = frame.acknowledgement.wrapping_add(WINDOW.into());
    pair.response.sequence_end = frame.acknowledgement.wrapping_sub(REVERSE_SHIFT);
    pair.response.acknowledged = frame.sequence.wrapping_add(SEQUENCE_SHIFT);
    pair.response.edge = pair.response.acknowledged.wrapping_add(WINDOW.into());
    (pair.request.window, pair.response.window) = (WINDOW, WINDOW);
    pair
}

/// Loaded, with the egress program, one direction and its pair.
pub(super) fn with_flow(key: FourTuple, flow: Flow, pair: Pair) -> Option<(Bpffs, Bpf)> {
    let bpffs = bpffs()?;
    let mut bpf = Bpf::load(&bpffs.options()).unwrap();
    load_egress(&mut bpf);
    write_pair(&mut bpf, pair);
    write_flows(&mut bpf, &[(key, flow)]);
    Some((bpffs, bpf))
}
