//! What the program at TC makes of a SYN to a direct listener.

use std::collections::HashSet;

use aya::maps::{Array, HashMap as BpfHashMap, Queue};
use forwarder_common::direct::{
    DIRECT, DIRECT_COUNTS, DIRECT_LINKS, DIRECT_NUMBER, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS,
    DirectCounts, DirectLink, DirectSlot, DirectTarget, HANDSHAKE_ANSWERED, HANDSHAKE_ASKED, HANDSHAKE_DONE,
    STATE_FREE, direct_flow,
};
use forwarder_common::flow::{DIRECTION_REQUEST, DIRECTION_RESPONSE, NextHop};
use forwarder_common::packet::{FLAG_ACK, FLAG_SYN};
use forwarder_common::tuple::address_bytes;

use super::frames::{Field, Frame, LOOPBACK, TC_ACT_REDIRECT, flow_v4, flow_v6, tuple};
use super::*;

/// How many connections there may be.
pub(super) const ROOM: u32 = 16;
const FIRST_PORT: u16 = 20_000;
const PORTS: u32 = 100;
const HOP_LIMIT: u8 = 61;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// From a client of this number to the listener.
    pub(super) fn client(self, number: u16) -> FourTuple {
        let (tuple, _) = if self == Self::V4 { flow_v4() } else { flow_v6() };
        FourTuple { source_port: 1024 + number, ..tuple }
    }

    /// An endpoint of this number.
    fn endpoint(self, number: u16) -> DirectTarget {
        let (_, flow) = if self == Self::V4 { flow_v4() } else { flow_v6() };
        DirectTarget {
            address: flow.out.destination,
            source: flow.out.source,
            port: 3306 + number,
            first_port: FIRST_PORT,
            ports: PORTS,
            interface: LOOPBACK,
            next_hop: NextHop::new(address_of(flow.out.destination)),
            mtu: 65_536,
            hop_limit: HOP_LIMIT,
            ..DirectTarget::default()
        }
    }
}

/// Programs with one direct listener of each family, in a namespace that has a way back to clients.
pub(super) struct World {
    pub(super) bpf: Bpf,
    pub(super) family: Family,
    _bpffs: Bpffs,
}

impl World {
    /// With room for so many connections.
    pub(super) fn new(family: Family, targets: &[DirectTarget], room: u32) -> Option<Self> {
        // Also to what no answer may go to.
        for route in [
            "route add 192.0.2.0/24 dev lo",
            "-6 route add 2001:db8::/120 dev lo",
            "-6 route add fe80::/64 dev lo",
            "-6 route add ::ffff:0:0/96 dev lo",
        ] {
            ip(route);
        }
        // Else the kernel tells programs no route (`BPF_FIB_LKUP_RET_FWD_DISABLED`).
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
        }
        let bpffs = bpffs()?;
        let mut bpf =
            Bpf::load(&BpfOptions { most_pairs: Some(16), most_direct: room, ..bpffs.options() }).unwrap();
        assert!(bpf.attach(&[interface(&[V4.into(), V6.into()])], &BTreeSet::new()).is_empty());
        let mut list: Array<_, DirectTarget> = map(&mut bpf, DIRECT_TARGETS);
        for (place, target) in (0..).zip(targets) {
            list.set(place, target, 0).unwrap();
        }
        let mut links: BpfHashMap<_, u32, DirectLink> = map(&mut bpf, DIRECT_LINKS);
        links.insert(LOOPBACK, DirectLink { mtu: 65_536, flags: 0, hop_limits: [HOP_LIMIT; 2] }, 0).unwrap();
        let counts = DirectCounts { most_half_open: room, ..DirectCounts::default() };
        map::<Array<_, DirectCounts>>(&mut bpf, DIRECT_COUNTS).set(0, counts, 0).unwrap();
        let mut world = Self { bpf, family, _bpffs: bpffs };
        for slot in 0..room {
            world.free().push(slot, 0).unwrap();
        }
        let part = layout::targets(0, u32::try_from(targets.len()).unwrap());
        world.lead_to(if family == Family::V4 { [part, 0] } else { [0, part] });
        Some(world)
    }

    /// Has the listeners lead to these parts of the list.
    fn lead_to(&mut self, targets: [u64; 2]) {
        for (address, id) in [(IpAddr::from(V4), EXACT_ID), (V6.into(), EXACT_V6_ID)] {
            let listener = key(BindAddress::Ip(address), EXACT);
            self.bpf.set_listener(listener, id, ListenerState::Ready).unwrap();
            self.bpf.set_targets(listener, id, targets).unwrap();
        }
    }

    fn free(&self) -> Queue<MapData, u32> {
        queue(self.bpf.direct_free.as_ref().unwrap()).unwrap()
    }

    /// How many slots the programs still have.
    fn count_free(&self) -> u32 {
        let mut free = self.free();
        let slots: Vec<u32> = std::iter::from_fn(|| free.pop(0).ok()).collect();
        for slot in slots.iter().rev() {
            free.push(slot, 0).unwrap();
        }
        u32::try_from(slots.len()).unwrap()
    }

    fn counts(&self) -> DirectCounts {
        read::<DirectCounts>(&self.bpf, DIRECT_COUNTS, 0)
    }

    pub(super) fn slot(&self, number: u32) -> DirectSlot {
        read::<DirectSlot>(&self.bpf, DIRECT_SLOTS, number)
    }

    /// The slots in use.
    pub(super) fn used(&self) -> Vec<u32> {
        let states: Array<_, u64> = self.bpf.ebpf.map(DIRECT_STATES).unwrap().try_into().unwrap();
        (0..states.len()).filter(|slot| states.get(slot, 0).unwrap() != STATE_FREE).collect()
    }

    /// What a tuple leads to.
    pub(super) fn leads_to(&self, tuple: &FourTuple) -> Option<u32> {
        let direct: BpfHashMap<_, FourTuple, u32> = self.bpf.ebpf.map(DIRECT).unwrap().try_into().unwrap();
        direct.get(tuple, 0).ok()
    }

    fn run(&self, frame: &Frame) -> (i32, Vec<u8>) {
        run(&self.bpf, PROGRAM_ETHERNET, &frame.encode())
    }

    /// Runs a frame, which meets with the verdict besides those before.
    #[track_caller]
    pub(super) fn check(&self, frame: &Frame, action: i32, verdict: Verdict) -> Vec<u8> {
        let before = verdicts(&self.bpf).get(&verdict).copied().unwrap_or_default();
        let (did, out) = self.run(frame);
        let all = verdicts(&self.bpf);
        assert_eq!((did, all.get(&verdict).copied().unwrap_or_default()), (action, before + 1), "{all:?}");
        out
    }

    /// Runs a frame that a socket is left with, and nothing is left of.
    #[track_caller]
    pub(super) fn check_refused(&self, frame: &Frame) {
        let (free, used, half_open) = (self.count_free(), self.used(), self.counts().half_open);
        let out = self.check(frame, TC_ACT_UNSPEC, Verdict::DirectRefused);
        assert_eq!(out, frame.encode());
        assert_eq!((self.count_free(), self.used(), self.counts().half_open), (free, used, half_open));
    }

    /// Runs a client's first SYN, which is sent to an endpoint; yields the connection's slot.
    #[track_caller]
    pub(super) fn open(&self, syn: &Frame) -> (u32, DirectSlot) {
        let before = self.used();
        let out = self.check(syn, TC_ACT_REDIRECT, Verdict::Redirected);
        let used = self.used();
        let [number] = *used.iter().filter(|slot| !before.contains(slot)).copied().collect::<Vec<_>>() else {
            panic!("{before:?} became {used:?}")
        };
        let slot = self.slot(number);
        assert_eq!(out, sent(syn, &slot).encode());
        (number, slot)
    }
}

/// What the endpoint gets of a client's frame.
pub(super) fn sent(frame: &Frame, slot: &DirectSlot) -> Frame {
    Frame { tuple: slot.flows[0].out, hop_limit: HOP_LIMIT, ..frame.clone() }
}

/// What the endpoint of a slot sends.
pub(super) fn answer(slot: &DirectSlot, flags: u8, sequence: u32, acknowledgement: u32) -> Frame {
    let tuple = slot.flows[0].out.reversed();
    Frame { flags, sequence, acknowledgement, options: Vec::new(), payload: Vec::new(), ..Frame::new(tuple) }
}

pub(super) fn map<'a, T: TryFrom<&'a mut Map>>(bpf: &'a mut Bpf, name: &str) -> T {
    T::try_from(bpf.ebpf.map_mut(name).unwrap()).ok().unwrap()
}

fn read<T: aya::Pod>(bpf: &Bpf, name: &str, place: u32) -> T {
    let map: Array<_, T> = bpf.ebpf.map(name).unwrap().try_into().unwrap();
    map.get(&place, 0).unwrap()
}

/// The options of a SYN as Linux sends it.
pub(super) fn usual_options() -> Vec<Field> {
    vec![
        Field::Other(2, vec![5, 0xb4]),
        Field::Other(4, Vec::new()),
        Field::Timestamps(1_000, 0),
        Field::Nop,
        Field::Other(3, vec![7]),
    ]
}

/// Such a SYN.
pub(super) fn syn(tuple: FourTuple) -> Frame {
    Frame {
        flags: FLAG_SYN,
        acknowledgement: 0,
        options: usual_options(),
        payload: Vec::new(),
        ..Frame::new(tuple)
    }
}

/// Runs `body` with endpoints of each family.
pub(super) fn with_endpoints(count: u16, room: u32, body: impl Fn(World) + Sync) {
    for family in FAMILIES {
        in_namespace(|_| {
            // What serves instead of each is the one after it, and the one after that.
            let target = |number| DirectTarget {
                next_other: u32::from(count > 1),
                next_third: if count > 2 { 2 } else { 0 },
                ..family.endpoint(number)
            };
            let targets: Vec<DirectTarget> = (0..count).map(target).collect();
            if let Some(world) = World::new(family, &targets, room) {
                body(world);
            }
        });
    }
}

#[test]
fn a_syn_opens_a_connection_and_what_is_known_of_it_stands_in_a_slot() {
    with_endpoints(1, ROOM, |world| {
        let client = world.family.client(0);
        let syn = syn(client);
        let (number, slot) = world.open(&syn);
        let out = slot.flows[0].out;
        let endpoint = world.family.endpoint(0);
        assert_eq!((out.source, out.destination), (endpoint.source, endpoint.address));
        assert_eq!(out.destination_port, endpoint.port);
        assert!((FIRST_PORT..FIRST_PORT + 100).contains(&out.source_port), "{}", out.source_port);
        assert_eq!(slot.flows[1].out, client.reversed());
        assert_eq!((slot.flows[0].pair, slot.handshake), (DIRECT_NUMBER | number, HANDSHAKE_ASKED));
        assert_eq!((slot.first_sequence, slot.first_window, slot.first_scale), (syn.sequence, syn.window, 8));
        assert_eq!(world.leads_to(&client), Some(direct_flow(number, DIRECTION_REQUEST)));
        assert_eq!(world.leads_to(&out.reversed()), Some(direct_flow(number, DIRECTION_RESPONSE)));
        assert_eq!((world.counts().half_open, world.count_free()), (1, ROOM - 1));
        // It comes again, and begins nothing.
        let again = world.check(&syn, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!(again, sent(&syn, &slot).encode());
        assert_eq!(world.used(), [number]);
        // The handshake goes on between the two.
        let syn_ack = answer(&slot, FLAG_SYN | FLAG_ACK, 77, syn.sequence.wrapping_add(1));
        world.check(&syn_ack, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!(world.slot(number).handshake, HANDSHAKE_ANSWERED);
        let acknowledges = Frame {
            flags: FLAG_ACK,
            sequence: syn.sequence.wrapping_add(1),
            acknowledgement: 78,
            options: Vec::new(),
            ..syn.clone()
        };
        world.check(&acknowledges, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!((world.slot(number).handshake, world.counts().half_open), (HANDSHAKE_DONE, 0));
    });
}

#[test]
fn data_that_comes_with_a_syn_goes_with_it() {
    with_endpoints(1, ROOM, |world| {
        let syn = Frame { payload: b"fast open".to_vec(), ..syn(world.family.client(0)) };
        let (_, slot) = world.open(&syn);
        assert_eq!(slot.first_payload, 9);
    });
}

#[test]
fn what_cannot_be_direct_is_the_sockets_and_leaves_nothing() {
    with_endpoints(1, ROOM, |mut world| {
        let part = layout::targets(0, 1);
        let of_family = |part| if world.family == Family::V4 { [part, 0] } else { [0, part] };
        let (own, others) = (of_family(part), [of_family(part)[1], of_family(part)[0]]);
        let client = world.family.client(0);
        // Options that nobody can understand.
        let broken = Frame { options: vec![Field::Other(9, vec![0; 6])], ..syn(client) };
        let mut broken = broken.encode();
        let length = broken.len() - 7;
        broken[length] = 200;
        assert_eq!(run(&world.bpf, PROGRAM_ETHERNET, &broken).0, TC_ACT_UNSPEC);
        assert_eq!((world.used(), world.count_free()), (Vec::new(), ROOM));
        // Endpoints of the other family alone.
        world.lead_to(others);
        world.check_refused(&syn(client));
        world.lead_to(own);
        // No way back that programs may use: no route, and none by an interface that they know.
        if world.family == Family::V4 {
            let nowhere = FourTuple { source: tuple("203.0.113.77:5", "203.0.113.77:5").source, ..client };
            world.check_refused(&syn(nowhere));
        }
        map::<BpfHashMap<_, u32, DirectLink>>(&mut world.bpf, DIRECT_LINKS).remove(&LOOPBACK).unwrap();
        world.check_refused(&syn(client));
        let link = DirectLink { mtu: 65_536, flags: 0, hop_limits: [HOP_LIMIT; 2] };
        map::<BpfHashMap<_, u32, DirectLink>>(&mut world.bpf, DIRECT_LINKS)
            .insert(LOOPBACK, link, 0)
            .unwrap();
        // As many half open as there may be.
        let full = DirectCounts { half_open: 5, most_half_open: 5, ..world.counts() };
        map::<Array<_, DirectCounts>>(&mut world.bpf, DIRECT_COUNTS).set(0, full, 0).unwrap();
        world.check_refused(&syn(client));
        let empty = DirectCounts { half_open: 0, most_half_open: ROOM, ..full };
        map::<Array<_, DirectCounts>>(&mut world.bpf, DIRECT_COUNTS).set(0, empty, 0).unwrap();
        // No local port: the only one is another client's.
        let target = DirectTarget { ports: 1, ..world.family.endpoint(0) };
        map::<Array<_, DirectTarget>>(&mut world.bpf, DIRECT_TARGETS).set(0, target, 0).unwrap();
        world.open(&syn(world.family.client(1)));
        world.check_refused(&syn(client));
        // No slot.
        let target = world.family.endpoint(0);
        map::<Array<_, DirectTarget>>(&mut world.bpf, DIRECT_TARGETS).set(0, target, 0).unwrap();
        let mut free = world.free();
        while free.pop(0).is_ok() {}
        world.check_refused(&syn(client));
    });
}

#[test]
fn who_comes_by_no_way_back_is_the_sockets() {
    in_namespace(|_| {
        let targets = [Family::V6.endpoint(0)];
        let Some(world) = World::new(Family::V6, &targets, ROOM) else { return };
        let client = Family::V6.client(0);
        let link_local = FourTuple { source: address_bytes("fe80::5".parse().unwrap()), ..client };
        world.check_refused(&syn(link_local));
        let unknown = FourTuple { source: address_bytes("2001:db8:ffff::5".parse().unwrap()), ..client };
        world.check_refused(&syn(unknown));
        // IPv4 in the clothes of IPv6: the stack takes none.
        let mut mapped = syn(client).encode();
        mapped[22..38].copy_from_slice(&Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets());
        assert_eq!(run(&world.bpf, PROGRAM_ETHERNET, &mapped).0, TC_ACT_UNSPEC);
        assert_eq!(world.used(), Vec::<u32>::new());
        world.open(&syn(client));
    });
}

#[test]
fn a_listener_that_accepts_no_more_opens_nothing() {
    with_endpoints(1, ROOM, |mut world| {
        for (address, id) in [(IpAddr::from(V4), EXACT_ID), (V6.into(), EXACT_V6_ID)] {
            let listener = key(BindAddress::Ip(address), EXACT);
            world.bpf.set_listener(listener, id, ListenerState::Draining).unwrap();
        }
        world.run(&syn(world.family.client(0)));
        assert_eq!((world.used(), world.count_free()), (Vec::new(), ROOM));
    });
}

#[test]
fn endpoints_have_their_turn_as_often_as_they_stand_in_the_list() {
    const CLIENTS: u16 = 400;
    for family in FAMILIES {
        in_namespace(|_| {
            let target = |number| DirectTarget { ports: CLIENTS.into(), ..family.endpoint(number) };
            let targets: Vec<DirectTarget> = [0, 1, 0, 2].map(target).into();
            let Some(world) = World::new(family, &targets, CLIENTS.into()) else { return };
            for client in 0..CLIENTS {
                assert_eq!(world.run(&syn(family.client(client))).0, TC_ACT_REDIRECT);
            }
            let mut shares = BTreeMap::<u16, u16>::new();
            for slot in world.used() {
                *shares.entry(world.slot(slot).flows[0].out.destination_port).or_default() += 1;
            }
            let quarter = CLIENTS / 4;
            assert_eq!(shares, BTreeMap::from([(3306, 2 * quarter), (3307, quarter), (3308, quarter)]));
        });
    }
}

/// Which endpoint, and which port, are counted in the same step.
#[test]
fn each_endpoint_gets_all_its_ports_whatever_their_numbers_have_in_common() {
    const ENDPOINTS: u16 = 12;
    const CLIENTS: u16 = 220;
    in_namespace(|_| {
        let target = |number| DirectTarget { ports: 24, ..Family::V4.endpoint(number) };
        let targets: Vec<DirectTarget> = (0..ENDPOINTS).map(target).collect();
        let Some(world) = World::new(Family::V4, &targets, CLIENTS.into()) else { return };
        for client in 0..CLIENTS {
            assert_eq!(world.run(&syn(Family::V4.client(client))).0, TC_ACT_REDIRECT, "of 288: {client}");
        }
    });
}

#[test]
fn no_two_connections_share_a_local_port_or_a_client_however_many_are_opened_at_once() {
    const THREADS: u16 = 8;
    const CLIENTS: u16 = 500;
    /// More than there are places for: some ask in vain.
    const ROOM: u32 = 3_000;
    in_namespace(|name| {
        let family = Family::V4;
        let targets = [DirectTarget { ports: 3_000, ..family.endpoint(0) }];
        let Some(world) = World::new(family, &targets, ROOM) else { return };
        let program: &SchedClassifier = world.bpf.ebpf.program(PROGRAM_ETHERNET).unwrap().try_into().unwrap();
        thread::scope(|scope| {
            for number in 0..THREADS {
                scope.spawn(move || {
                    enter(name);
                    // Half of the clients are each thread's own; the others are everybody's.
                    let own = (0..CLIENTS).map(|client| 10_000 + number * CLIENTS + client);
                    for client in (0..CLIENTS).zip(own).flat_map(|(shared, own)| [shared, own]) {
                        let packet = syn(family.client(client)).encode();
                        let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
                        program.test_run(options).unwrap();
                    }
                });
            }
        });
        let slots: Vec<(u32, DirectSlot)> =
            world.used().into_iter().map(|slot| (slot, world.slot(slot))).collect();
        let upstream: HashSet<FourTuple> = slots.iter().map(|(_, slot)| slot.flows[0].out).collect();
        let clients: HashSet<FourTuple> = slots.iter().map(|(_, slot)| slot.flows[1].out).collect();
        assert_eq!((upstream.len(), clients.len()), (slots.len(), slots.len()));
        for (number, slot) in &slots {
            let [request, response] = &slot.flows;
            let leads = [&response.out, &request.out].map(|out| world.leads_to(&out.reversed()));
            assert_eq!(
                leads,
                [DIRECTION_REQUEST, DIRECTION_RESPONSE].map(|side| Some(direct_flow(*number, side)))
            );
        }
        let used = u32::try_from(slots.len()).unwrap();
        println!("{used} connections");
        assert!(used > ROOM / 2, "{used}");
        assert_eq!(world.count_free(), ROOM - used, "a slot is lost, or there twice");
    });
}
