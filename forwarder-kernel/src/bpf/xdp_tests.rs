//! What the programs at XDP send on, and what they leave to TC.

use aya::maps::{Array, HashMap as BpfHashMap, PerCpuArray, PerCpuValues};
use aya::programs::Xdp as XdpProgram;
use aya::{TestRun as _, TestRunResult};
use forwarder_common::direct::{
    DIRECT, DIRECT_NUMBER, DIRECT_SLOTS, DirectSlot, HANDSHAKE_DONE, direct_flow,
};
use forwarder_common::flow::{
    DIRECTION_REQUEST, DIRECTION_RESPONSE, FLOW_BY_STACK, FLOW_CLEAR_ECN, FLOW_OPENING, STATE_HANDOVER,
    STATE_OVER, STATE_RESET,
};
use forwarder_common::layout::{XDP_NEIGHBOURS, XDP_NEIGHBOURS_BITS};
use forwarder_common::packet::{FLAG_FIN, FLAG_RST};
use forwarder_common::{PROGRAM_XDP, PROGRAM_XDP_FORWARD, PROGRAM_XDP_FRAGS};

use super::frames::{Field, Frame, LOOPBACK, TC_ACT_REDIRECT, WINDOW, at, flow_v4, flow_v6};
use super::*;

pub(super) const XDP_DROP: u32 = 1;
pub(super) const XDP_PASS: u32 = 2;
pub(super) const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// The Ethernet address of the interface, and of the neighbour.
pub(super) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Another interface, as far as maps are concerned.
const OTHER: u32 = 77;

/// Loaded, with the program at XDP that this kernel takes.
pub(super) fn loaded_at_xdp(bpffs: &Bpffs, xdp: Xdp, most_direct: u32) -> (Bpf, &'static str) {
    let mut bpf =
        Bpf::load(&BpfOptions { xdp, most_pairs: Some(16), most_direct, ..bpffs.options() }).unwrap();
    assert_eq!(bpf.xdp_error(), None);
    bpf.set_listener(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, ListenerState::Ready).unwrap();
    bpf.set_listener(key(BindAddress::Ip(V6.into()), EXACT), EXACT_V6_ID, ListenerState::Ready).unwrap();
    let has = |name: &&str| bpf.ebpf.program(name).is_some_and(|program| program.fd().is_ok());
    let program = [PROGRAM_XDP_FORWARD, PROGRAM_XDP_FRAGS, PROGRAM_XDP].into_iter().find(has).unwrap();
    (bpf, program)
}

/// What the program returns for a frame, and makes of it.
pub(super) fn run_at_xdp(bpf: &Bpf, program: &str, packet: &[u8]) -> (u32, Vec<u8>) {
    let program: &XdpProgram = bpf.ebpf.program(program).unwrap().try_into().unwrap();
    let mut out = vec![0; packet.len() + 64];
    let options =
        TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::default() };
    let result = program.test_run(options).unwrap();
    out.truncate(usize::try_from(result.data_size_out).unwrap());
    (result.return_value, out)
}

/// The least mean time that a frame has cost at XDP, of several runs.
pub(super) fn cost_at_xdp(bpf: &Bpf, program: &str, packet: &[u8], action: u32) -> Duration {
    let program: &XdpProgram = bpf.ebpf.program(program).unwrap().try_into().unwrap();
    least_cost(packet, action, |options| program.test_run(options).unwrap())
}

/// The same at TC, where it is redirected.
fn cost_at_tc(bpf: &Bpf, packet: &[u8]) -> Duration {
    let program: &SchedClassifier = bpf.ebpf.program(PROGRAM_ETHERNET).unwrap().try_into().unwrap();
    least_cost(packet, TC_ACT_REDIRECT.cast_unsigned(), |options| program.test_run(options).unwrap())
}

fn least_cost(packet: &[u8], action: u32, run: impl Fn(TestRunOptions<'_>) -> TestRunResult) -> Duration {
    const REPEAT: u32 = 100_000;
    let runs = (0..7).map(|_| {
        let options = TestRunOptions { data_in: Some(packet), repeat: REPEAT, ..TestRunOptions::default() };
        let result = run(options);
        assert_eq!(result.return_value, action);
        result.duration
    });
    runs.min().unwrap()
}

/// Whether the kernel tells what takes frames from XDP; says so if not.
pub(super) fn tells_targets() -> bool {
    let told = crate::net::netdev::Netdev::open();
    if let Err(error) = &told {
        println!("skipped: the kernel does not tell what takes frames from XDP: {error}");
    }
    told.is_ok()
}

/// Loaded to send on, with a flow and its pair, by an interface that takes what it sends; `None` where this kernel does not tell of such.
fn sending(bpffs: &Bpffs, flow: (FourTuple, Flow), frame: &Frame) -> Option<Bpf> {
    sending_with(bpffs, flow, frame, 16)
}

/// The same, with room for so many direct connections.
fn sending_with(
    bpffs: &Bpffs,
    (tuple, flow): (FourTuple, Flow),
    frame: &Frame,
    most_direct: u32,
) -> Option<Bpf> {
    if !tells_targets() {
        return None;
    }
    let (mut bpf, program) = loaded_at_xdp(bpffs, Xdp::Native, most_direct);
    assert_eq!(program, PROGRAM_XDP_FORWARD);
    write_flows(&mut bpf, &[(tuple, flow)]);
    write_pair(&mut bpf, at(frame));
    bpf.xdp.pretend(&Interface { index: LOOPBACK, hardware_address: Some(OWN), ..interface(&[]) }, true);
    know_neighbour(&mut bpf, &flow, NEIGHBOUR);
    Some(bpf)
}

/// Writes down the address of a flow's neighbour, as asked for a while after this test.
fn know_neighbour(bpf: &mut Bpf, flow: &Flow, address: [u8; 6]) {
    const HOUR: u64 = 3_600_000_000_000;
    know_neighbour_since(bpf, flow, address, crate::clock::monotonic() + HOUR);
}

fn know_neighbour_since(bpf: &mut Bpf, flow: &Flow, address: [u8; 6], time: u64) {
    let mut value = [0; 48];
    value[..4].copy_from_slice(&flow.interface.to_ne_bytes());
    value[4..8].copy_from_slice(&flow.next_hop.family.to_ne_bytes());
    value[8..24].copy_from_slice(&flow.next_hop.address);
    value[24..32].copy_from_slice(&time.to_ne_bytes());
    value[32..38].copy_from_slice(&address);
    value[38..44].copy_from_slice(&OWN);
    write_neighbours(bpf, value);
}

/// Writes a value at each place where a neighbour may stand.
fn write_neighbours(bpf: &mut Bpf, value: [u8; 48]) {
    let mut map: PerCpuArray<_, [u8; 48]> = bpf.ebpf.map_mut(XDP_NEIGHBOURS).unwrap().try_into().unwrap();
    let values = vec![value; aya::util::nr_cpus().unwrap()];
    for place in 0..1 << XDP_NEIGHBOURS_BITS {
        map.set(place, PerCpuValues::try_from(values.clone()).unwrap(), 0).unwrap();
    }
}

/// A frame to the interface.
pub(super) fn addressed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&OWN);
    frame
}

/// The frame as it leaves.
fn sent(frame: &Frame, flow: &Flow) -> Vec<u8> {
    let mut frame = frame.translated(flow).encode();
    frame[..6].copy_from_slice(&NEIGHBOUR);
    frame[6..12].copy_from_slice(&OWN);
    frame
}

#[track_caller]
fn check_sent(flow: (FourTuple, Flow), change: impl Fn(&mut Frame)) {
    let mut frame = Frame::new(flow.0);
    change(&mut frame);
    let Some(bpffs) = bpffs() else { return };
    let Some(bpf) = sending(&bpffs, flow, &frame) else { return };
    let (action, out) = run_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &addressed(frame.encode()));
    assert_eq!(
        (action, verdicts(&bpf)),
        (XDP_TX, BTreeMap::from([(Verdict::XdpRedirected, 1)])),
        "{frame:?}"
    );
    assert_eq!(out, sent(&frame, &flow.1), "{frame:?}");
    let direction = pair(&bpf).request;
    let payload = u64::try_from(frame.payload.len()).unwrap();
    assert_eq!((direction.packets, direction.bytes), (1, payload));
    assert!(direction.last_seen > 0);
}

#[test]
fn what_is_ordinary_of_a_connection_is_sent_on() {
    let blocks = vec![[0xffff_ff00, 0x100], [0x200, 0x300]];
    for flow in [flow_v4(), flow_v6()] {
        check_sent(flow, |_| {});
        check_sent(flow, |frame| frame.flags |= 8);
        check_sent(flow, |frame| frame.payload.clear());
        check_sent(flow, |frame| frame.options.clear());
        check_sent(flow, |frame| frame.options.extend([Field::Nop, Field::Nop, Field::Sack(blocks.clone())]));
        check_sent(flow, |frame| frame.options = vec![Field::Nop, Field::Timestamps(u32::MAX, 0x0102_0304)]);
        check_sent(flow, |frame| frame.payload = vec![1; 1_448]);
        check_sent((flow.0, Flow { flags: FLOW_CLEAR_ECN, ..flow.1 }), |_| {});
    }
    check_sent(flow_v4(), |frame| frame.ip_options = vec![1; 8]);
}

/// Whether a frame comes through as it was, and why.
#[track_caller]
fn check_left(what: &str, flow: (FourTuple, Flow), frame: &[u8], verdict: Option<Verdict>) {
    check_left_where(what, flow, frame, verdict, |_| {});
}

#[track_caller]
fn check_left_where(
    what: &str,
    flow: (FourTuple, Flow),
    frame: &[u8],
    verdict: Option<Verdict>,
    prepare: impl Fn(&mut Bpf),
) {
    let Some(bpffs) = bpffs() else { return };
    let Some(mut bpf) = sending(&bpffs, flow, &Frame::new(flow.0)) else { return };
    prepare(&mut bpf);
    let before = pair(&bpf);
    let (action, out) = run_at_xdp(&bpf, PROGRAM_XDP_FORWARD, frame);
    assert_eq!(action, XDP_PASS, "{what}");
    assert!(out == frame, "{what}: it was changed");
    let expected = verdict.map(|verdict| (verdict, 1)).into_iter().collect();
    assert_eq!(verdicts(&bpf), expected, "{what}");
    assert_eq!(pair(&bpf), before, "{what}: it was noted");
}

#[test]
fn all_else_is_left_to_tc_as_it_was() {
    for flow in [flow_v4(), flow_v6()] {
        let usual = Frame::new(flow.0);
        let frame = addressed(usual.encode());
        for flags in [FLAG_FIN | ACK, SYN, SYN_ACK, FLAG_RST, FLAG_RST | ACK, 0] {
            let frame = Frame { flags, ..usual.clone() }.encode();
            check_left("it opens or ends something", flow, &addressed(frame), None);
        }
        let of = |change: fn(&mut Flow)| {
            let mut other = flow;
            change(&mut other.1);
            other
        };
        for (what, flow) in [
            ("amid its handover", of(|flow| flow.state = STATE_HANDOVER)),
            ("ended by the agent", of(|flow| flow.state = STATE_RESET)),
            ("over", of(|flow| flow.state = STATE_OVER)),
            ("by the stack", of(|flow| flow.flags = FLOW_BY_STACK)),
            ("opening", of(|flow| flow.flags = FLOW_OPENING)),
            ("too large", of(|flow| flow.mtu = 60)),
            ("expected elsewhere", of(|flow| flow.arrival = OTHER)),
            ("without a pair", of(|flow| flow.pair += 1)),
        ] {
            check_left(what, flow, &frame, Some(Verdict::XdpLeft));
        }
        check_left(
            "to another interface",
            of(|flow| flow.interface = OTHER),
            &frame,
            Some(Verdict::XdpNoTarget),
        );
        check_left_where("to an unknown neighbour", flow, &frame, Some(Verdict::XdpNeighbour), |bpf| {
            write_neighbours(bpf, [0; 48]);
        });
        check_left("for another host", flow, &usual.encode(), Some(Verdict::XdpLeft));
        check_left("cut short", flow, &frame[..frame.len() - 1], Some(Verdict::XdpLeft));
        let stranger = Frame { sequence: usual.sequence.wrapping_add(1 << 30), ..usual.clone() };
        check_left("nothing that is expected", flow, &addressed(stranger.encode()), Some(Verdict::XdpLeft));
        let sent = |pair: fn(&mut Pair)| {
            move |bpf: &mut Bpf| {
                let mut known = self::pair(bpf);
                pair(&mut known);
                write_pair(bpf, known);
            }
        };
        let repeated = sent(|pair| pair.request.sequence_end = pair.request.sequence_end.wrapping_add(500));
        check_left_where("sent again", flow, &frame, Some(Verdict::XdpLeft), repeated);
        let bare = addressed(Frame { payload: Vec::new(), window: WINDOW, ..usual.clone() }.encode());
        check_left("an acknowledgement that says nothing new", flow, &bare, Some(Verdict::XdpLeft));
        let mut tagged = frame.clone();
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        check_left("for a VLAN interface", flow, &tagged, None);
        let foreign = Frame { tuple: flow.0.reversed(), ..usual.clone() };
        check_left("of no connection", flow, &addressed(foreign.encode()), None);
    }
    let flow = flow_v4();
    let usual = Frame::new(flow.0);
    check_left("unfinished", flow, &addressed(usual.encode_partial()), Some(Verdict::XdpUnfinished));
    let mut fragment = addressed(usual.encode());
    fragment[20] = 0x20;
    check_left("a fragment", flow, &fragment, None);
}

/// The neighbour's address is asked for anew from time to time, by a packet that goes by TC.
#[test]
fn a_neighbour_is_not_believed_for_long() {
    let Some(bpffs) = bpffs() else { return };
    let flow = flow_v4();
    let frame = Frame::new(flow.0);
    let Some(mut bpf) = sending(&bpffs, flow, &frame) else { return };
    let frame = addressed(frame.encode());
    let deadline = Instant::now() + Duration::from_secs(10);
    let run = |bpf: &mut Bpf| {
        write_pair(bpf, at(&Frame::new(flow.0)));
        run_at_xdp(bpf, PROGRAM_XDP_FORWARD, &frame).0
    };
    let sends = |bpf: &mut Bpf| {
        know_neighbour_since(bpf, &flow.1, NEIGHBOUR, crate::clock::monotonic());
        run(bpf) == XDP_TX
    };
    // A slow machine may take longer.
    while !sends(&mut bpf) {
        assert!(Instant::now() < deadline, "it is never believed");
    }
    while run(&mut bpf) == XDP_TX {
        assert!(Instant::now() < deadline, "it is believed for ever");
        thread::yield_now();
    }
    assert!(verdicts(&bpf)[&Verdict::XdpNeighbour] >= 1);
}

/// What may look like others' frames, and what has another address now, is left to TC, and so is what nobody takes any more.
#[test]
fn the_program_is_told_of_changes_of_interfaces() {
    let (tuple, flow) = flow_v4();
    let frame = addressed(Frame::new(tuple).encode());
    let own = || Interface { index: LOOPBACK, hardware_address: Some(OWN), ..interface(&[]) };
    for (what, other, takes, verdict) in [
        ("with VLANs", Interface { xdp_frames: XdpFrames::Ambiguous, ..own() }, true, Verdict::XdpLeft),
        ("another address", Interface { hardware_address: Some(NEIGHBOUR), ..own() }, true, Verdict::XdpLeft),
        ("without address", Interface { hardware_address: None, ..own() }, true, Verdict::XdpLeft),
        ("another one", Interface { index: OTHER, ..own() }, true, Verdict::XdpLeft),
        ("that takes nothing", own(), false, Verdict::XdpNoTarget),
    ] {
        check_left_where(what, (tuple, flow), &frame, Some(verdict), |bpf| bpf.xdp.pretend(&other, takes));
        let Some(bpffs) = bpffs() else { return };
        let usual = Frame::new(tuple);
        let Some(mut bpf) = sending(&bpffs, (tuple, flow), &usual) else { return };
        bpf.xdp.pretend(&other, takes);
        bpf.xdp.pretend(&own(), true);
        assert_eq!(run_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &frame).0, XDP_TX, "{what}, and back");
    }
}

/// What is sent back by a veth would lie there.
#[test]
fn what_leaves_by_the_veth_that_it_has_come_by_is_redirected() {
    let (tuple, flow) = flow_v4();
    let frame = Frame::new(tuple);
    let Some(bpffs) = bpffs() else { return };
    let Some(mut bpf) = sending(&bpffs, (tuple, flow), &frame) else { return };
    let own = Interface { index: LOOPBACK, hardware_address: Some(OWN), ..interface(&[]) };
    bpf.xdp.pretend(&Interface { xdp_frames: XdpFrames::OfVeth, ..own }, true);
    let frame = addressed(frame.encode());
    assert_eq!(run_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &frame).0, XDP_REDIRECT);
}

/// What is known of a direct connection, in slot 0.
fn write_direct(bpf: &mut Bpf, (tuple, flow): (FourTuple, Flow), frame: &Frame) -> Flow {
    let flow = Flow {
        pair: DIRECT_NUMBER,
        sequence_shift: 0,
        acknowledgement_shift: 0,
        source_scale: 0,
        target_scale: 0,
        ..flow
    };
    let back = Flow { out: tuple.reversed(), direction: DIRECTION_RESPONSE, ..flow };
    let mut pair = at(frame);
    pair.request.acknowledged = frame.acknowledgement.wrapping_add(10);
    (pair.request.timestamp_known, pair.response.timestamp_known) = (0, 0);
    pair.response.sequence_end = frame.acknowledgement;
    pair.response.acknowledged = frame.sequence;
    pair.response.edge = frame.sequence.wrapping_add(60_000);
    let slot = DirectSlot { flows: [flow, back], pair, handshake: HANDSHAKE_DONE, ..DirectSlot::default() };
    let mut slots: Array<_, DirectSlot> = bpf.ebpf.map_mut(DIRECT_SLOTS).unwrap().try_into().unwrap();
    slots.set(0, slot, 0).unwrap();
    let mut direct: BpfHashMap<_, FourTuple, u32> = bpf.ebpf.map_mut(DIRECT).unwrap().try_into().unwrap();
    direct.insert(tuple, direct_flow(0, DIRECTION_REQUEST), 0).unwrap();
    direct.insert(flow.out.reversed(), direct_flow(0, DIRECTION_RESPONSE), 0).unwrap();
    flow
}

#[test]
fn what_is_ordinary_of_a_direct_connection_is_sent_on() {
    for flow in [flow_v4(), flow_v6()] {
        let frame = Frame::new(flow.0);
        let Some(bpffs) = bpffs() else { return };
        let nobodys = (flow.0.reversed(), flow.1);
        let Some(mut bpf) = sending(&bpffs, nobodys, &frame) else { return };
        let flow = write_direct(&mut bpf, flow, &frame);
        let (action, out) = run_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &addressed(frame.encode()));
        assert_eq!((action, verdicts(&bpf)), (XDP_TX, BTreeMap::from([(Verdict::XdpRedirected, 1)])));
        let mut expected = Frame { tuple: flow.out, hop_limit: flow.hop_limit, ..frame.clone() }.encode();
        expected[..6].copy_from_slice(&NEIGHBOUR);
        expected[6..12].copy_from_slice(&OWN);
        assert_eq!(out, expected);
        let slots: Array<_, DirectSlot> = bpf.ebpf.map(DIRECT_SLOTS).unwrap().try_into().unwrap();
        assert_eq!(slots.get(&0, 0).unwrap().pair.request.packets, 1);
    }
}

/// Tells what a packet costs that is sent on at XDP; nothing is asserted of it, for it is the machine's.
#[test]
fn what_a_packet_costs_that_is_sent_on_at_xdp() {
    for (version, (tuple, flow)) in [("IPv4", flow_v4()), ("IPv6", flow_v6())] {
        for options in [vec![Field::Nop, Field::Nop, Field::Timestamps(1_000, 2_000)], Vec::new()] {
            let mut frame = Frame { options, ..Frame::new(tuple) };
            frame.payload.clear();
            let what = if frame.options.is_empty() { "without options" } else { "with timestamps" };
            let packet = addressed(frame.encode());
            // It becomes what it was, or the second run would see another one.
            let flow = Flow {
                out: tuple,
                sequence_shift: 0,
                acknowledgement_shift: 0,
                source_scale: 0,
                target_scale: 0,
                hop_limit: frame.hop_limit,
                ..flow
            };
            let Some(bpffs) = bpffs() else { return };
            let mut pair = at(&frame);
            (pair.request.timestamp_shift, pair.response.timestamp_shift) = (0, 0);
            pair.response.sequence_end = frame.acknowledgement;
            pair.response.acknowledged = frame.sequence;
            pair.response.edge = frame.sequence.wrapping_add(60_000);
            // An old one, which stays news.
            pair.request.acknowledged = frame.acknowledgement.wrapping_add(10);
            for (most_direct, others) in [(0, "no direct ones"), (16, "direct ones besides")] {
                let Some(mut bpf) = sending_with(&bpffs, (tuple, flow), &frame, most_direct) else { return };
                write_pair(&mut bpf, pair);
                know_neighbour(&mut bpf, &flow, OWN);
                let cost = cost_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &packet, XDP_TX);
                println!("{version} {what}, offloaded, with {others}: {cost:?}");
                if most_direct > 0 {
                    write_direct(&mut bpf, (tuple, flow), &frame);
                    let cost = cost_at_xdp(&bpf, PROGRAM_XDP_FORWARD, &packet, XDP_TX);
                    println!(
                        "{version} {what}, direct: {cost:?}, and at TC {:?}",
                        cost_at_tc(&bpf, &frame.encode())
                    );
                }
            }
        }
    }
}
