//! Tests of the loaded programs: they need root, and the object that `cargo xtask build-ebpf` makes.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap as BpfHashMap, MapData};
use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use forwarder_common::flow::{Flow, Pair};
use forwarder_common::layout::{self};
use forwarder_common::layout::{FLOWS, PAIRS, PINNED_MAPS};
use forwarder_common::tuple::FourTuple;
use forwarder_common::tuple::address_of;
use forwarder_common::update::{PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};
use forwarder_common::{
    BackendKey, PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP, PROGRAM_ETHERNET, PROGRAM_IP,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::loading::load_program;
use super::*;
use crate::flows;
use crate::maps::versions::{folders, map_path, programs_folder};
use crate::net::interfaces::{InterfaceKind, XdpFrames, watch};
use crate::programs::attach::{AttachKind, Stay};

#[path = "cleanup_tests.rs"]
mod cleanup_tests;

#[path = "clients_tests.rs"]
mod clients_tests;

#[path = "live_tests.rs"]
mod live_tests;

#[path = "xdp_tests.rs"]
mod xdp_tests;

#[path = "cookie_tests.rs"]
mod cookie_tests;

#[path = "direct_answer_tests.rs"]
mod direct_answer_tests;

#[path = "direct_tests.rs"]
mod direct_tests;

#[path = "egress_tests.rs"]
mod egress_tests;

#[path = "frames.rs"]
mod frames;

#[path = "redirect_tests.rs"]
mod redirect_tests;

#[path = "icmp_tests.rs"]
mod icmp_tests;

#[path = "fragment_tests.rs"]
mod fragment_tests;

#[path = "../../../forwarder-common/src/packet/cut.rs"]
mod cut;
#[path = "reset_tests.rs"]
mod reset_tests;

#[path = "reuse_tests.rs"]
mod reuse_tests;

#[path = "update_tests.rs"]
mod update_tests;

#[path = "../../../forwarder-common/src/packet/samples.rs"]
mod samples;

use samples::{ACK, SYN, SYN_ACK, TCP, UDP, ethernet, extension, fragment_header, framed, ipv4, ipv6, tcp};

const V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const OTHER_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);
const EXACT: u16 = 9001;
const WILDCARD: u16 = 9002;
const EXACT_ID: ListenerId = ListenerId(1);
const EXACT_V6_ID: ListenerId = ListenerId(2);
const WILDCARD_ID: ListenerId = ListenerId(3);
/// The next program decides.
const TC_ACT_UNSPEC: i32 = -1;
/// The pair that tests join.
const PAIR: u32 = 7;

/// A BPF file system of the test's own.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn options(&self) -> BpfOptions {
        BpfOptions {
            pin_dir: self.0.path().join("forwarder"),
            trace: false,
            most_pairs: None,
            most_direct: 0,
            xdp: Xdp::Off,
            syn_cookies_above: 0,
        }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// `None`, having said so, where the test cannot run.
fn bpffs() -> Option<Bpffs> {
    let missing = if !rustix::process::geteuid().is_root() {
        "root"
    } else if OBJECT.is_empty() {
        "the eBPF programs: run `cargo xtask build-ebpf`"
    } else {
        let directory = tempfile::tempdir().unwrap();
        mount("bpf", directory.path(), "bpf", MountFlags::empty(), None).unwrap();
        return Some(Bpffs(directory));
    };
    skip(missing);
    None
}

/// Says that a test is skipped for what is missing, or fails it where `REQUIRE_NETNS=1` demands that none is.
fn skip(missing: &str) {
    assert!(std::env::var("REQUIRE_NETNS").as_deref() != Ok("1"), "needs {missing}");
    eprintln!("skipped: needs {missing}");
}

/// Loads the egress program, which an agent without pairs does not need.
fn load_egress(bpf: &mut Bpf) {
    load_program(&mut bpf.ebpf, PROGRAM_EGRESS_ETHERNET).unwrap();
}

/// Loaded, with maps that are pinned nowhere.
fn unpinned() -> Ebpf {
    load(&LoadSettings { most_pairs: 16, most_direct: 16, ..LoadSettings::PROBE }).unwrap()
}

/// Writes directions of a pair.
fn write_flows(bpf: &mut Bpf, flows: &[(FourTuple, Flow)]) {
    let mut map: BpfHashMap<_, FourTuple, Flow> = bpf.ebpf.map_mut(FLOWS).unwrap().try_into().unwrap();
    for (key, flow) in flows {
        map.insert(key, flow, 0).unwrap();
    }
}

/// Loads what another one has left. The lock of its directory is free a little later where another test has just started a process,
/// which has a copy of every descriptor until it executes.
fn load_after(options: &BpfOptions) -> Result<Bpf, LoadError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Bpf::load(options) {
            Err(LoadError::InUse { .. }) if Instant::now() < deadline => thread::yield_now(),
            loaded => return loaded,
        }
    }
}

/// The interfaces of this namespace.
fn interfaces() -> Vec<Interface> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { watch().await.unwrap().0.borrow().clone() })
}

/// Writes what the programs know of the pair [`PAIR`].
fn write_pair(bpf: &mut Bpf, pair: Pair) {
    let mut map: BpfHashMap<_, u32, Pair> = bpf.ebpf.map_mut(PAIRS).unwrap().try_into().unwrap();
    map.insert(PAIR, pair, 0).unwrap();
}

/// What the programs know of the pair [`PAIR`].
fn pair(bpf: &Bpf) -> Pair {
    let map: BpfHashMap<_, u32, Pair> = bpf.ebpf.map(PAIRS).unwrap().try_into().unwrap();
    map.get(&PAIR, 0).unwrap()
}

fn key(address: BindAddress, port: u16) -> ListenerKey {
    ListenerKey { address, port: NonZeroU16::new(port).unwrap() }
}

fn interface(addresses: &[IpAddr]) -> Interface {
    let kind = InterfaceKind::Ethernet;
    Interface {
        index: 1,
        name: "test0".to_owned(),
        kind,
        addresses: addresses.to_vec(),
        mtu: 1500,
        is_up: true,
        is_inner: false,
        hardware_address: None,
        xdp_frames: XdpFrames::Own,
    }
}

/// Loaded, with a listener on `V4`, one on `V6`, and one on every address, of which `V4` is local.
fn loaded(bpffs: &Bpffs) -> Bpf {
    let mut bpf = Bpf::load(&bpffs.options()).unwrap();
    for (address, port, id) in [
        (BindAddress::Ip(V4.into()), EXACT, EXACT_ID),
        (BindAddress::Ip(V6.into()), EXACT, EXACT_V6_ID),
        (BindAddress::Any, WILDCARD, WILDCARD_ID),
    ] {
        bpf.set_listener(key(address, port), id, ListenerState::Ready).unwrap();
    }
    assert!(bpf.attach(&[interface(&[V4.into()])], &BTreeSet::new()).is_empty());
    bpf
}

fn verdicts(bpf: &Bpf) -> BTreeMap<Verdict, u64> {
    bpf.verdicts().unwrap().into_iter().filter(|(_, count)| *count > 0).collect()
}

/// What a program returns for a packet, and makes of it.
fn run(bpf: &Bpf, program: &str, packet: &[u8]) -> (i32, Vec<u8>) {
    run_in(bpf, program, packet, None)
}

/// The same where `context` says more of the packet: a `struct __sk_buff`.
fn run_in(bpf: &Bpf, program: &str, packet: &[u8], context: Option<&[u8]>) -> (i32, Vec<u8>) {
    let program: &SchedClassifier = bpf.ebpf.program(program).unwrap().try_into().unwrap();
    let mut out = vec![0; packet.len() + 64];
    let options = TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ctx_in: context,
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).unwrap();
    out.truncate(usize::try_from(result.data_size_out).unwrap());
    (result.return_value.cast_signed(), out)
}

/// Runs a program once over `packet`, which it passes on.
fn run_passed(bpf: &Bpf, program: &str, packet: &[u8]) {
    assert_eq!(run(bpf, program, packet).0, TC_ACT_UNSPEC);
}

/// Checks that the frame meets with `verdict`, and what is counted of it for `listener`, from the IP header on.
#[track_caller]
fn check(frame: &[u8], verdict: Verdict, listener: ListenerId, syns: u64, bytes: usize) {
    let Some(bpffs) = bpffs() else { return };
    let bpf = loaded(&bpffs);
    run_passed(&bpf, PROGRAM_ETHERNET, frame);
    assert_eq!(verdicts(&bpf), BTreeMap::from([(verdict, 1)]));
    for id in [EXACT_ID, EXACT_V6_ID, WILDCARD_ID] {
        let expected = if id == listener && verdict == Verdict::Counted {
            ListenerCounters {
                syns,
                packets: 1,
                bytes: u64::try_from(bytes).unwrap(),
                ..ListenerCounters::default()
            }
        } else {
            ListenerCounters::default()
        };
        assert_eq!(bpf.counters(id).unwrap(), expected, "{id:?}");
    }
}

#[track_caller]
fn check_passed(frame: &[u8], verdict: Verdict) {
    check(frame, verdict, EXACT_ID, 0, 0);
}

#[test]
fn ipv4_is_counted() {
    let counted = |flags, syns| {
        check(&framed(&ipv4(V4, TCP, &[], 0, &tcp(EXACT, flags))), Verdict::Counted, EXACT_ID, syns, 40);
    };
    counted(SYN, 1);
    counted(ACK, 0);
    counted(SYN_ACK, 0);
}

#[test]
fn ipv4_with_options_is_counted() {
    check(&framed(&ipv4(V4, TCP, &[1; 4], 0, &tcp(EXACT, SYN))), Verdict::Counted, EXACT_ID, 1, 44);
    check(&framed(&ipv4(V4, TCP, &[1; 40], 0, &tcp(EXACT, SYN))), Verdict::Counted, EXACT_ID, 1, 80);
}

#[test]
fn ipv6_is_counted() {
    check(&framed(&ipv6(V6, TCP, &tcp(EXACT, SYN))), Verdict::Counted, EXACT_V6_ID, 1, 60);
    let behind_two = extension(60, 0, &extension(TCP, 1, &tcp(EXACT, SYN)));
    check(&framed(&ipv6(V6, 0, &behind_two)), Verdict::Counted, EXACT_V6_ID, 1, 84);
    let first_fragment = fragment_header(TCP, 0, &tcp(EXACT, SYN));
    check(&framed(&ipv6(V6, 44, &first_fragment)), Verdict::Counted, EXACT_V6_ID, 1, 68);
}

#[test]
fn the_walk_of_extension_headers_ends() {
    let long = (0..9).fold((TCP, tcp(EXACT, SYN)), |(next, payload), _| (60, extension(next, 0, &payload)));
    check_passed(&framed(&ipv6(V6, long.0, &long.1)), Verdict::TooManyHeaders);
}

#[test]
fn a_vlan_tag_in_the_frame_is_skipped() {
    let packet = ipv4(V4, TCP, &[], 0, &tcp(EXACT, SYN));
    check(&ethernet(0x0800, &[0x8100], &packet), Verdict::Counted, EXACT_ID, 1, 40);
}

#[test]
fn fragments_are_told() {
    check(&framed(&ipv4(V4, TCP, &[], 0x2000, &tcp(EXACT, SYN))), Verdict::Counted, EXACT_ID, 1, 40);
    check_passed(&framed(&ipv4(V4, TCP, &[], 2, &tcp(EXACT, SYN))), Verdict::Fragment);
    check_passed(&framed(&ipv6(V6, 44, &fragment_header(TCP, 2, &tcp(EXACT, SYN)))), Verdict::Fragment);
}

#[test]
fn truncated_packets_are_told() {
    let frame = framed(&ipv4(V4, TCP, &[1; 40], 0, &tcp(EXACT, SYN)));
    // The IP header is whole, as the kernel demands of a test packet; the TCP header is not, or not there.
    check_passed(&frame[..frame.len() - 1], Verdict::Truncated);
    check_passed(&frame[..14 + 60], Verdict::Truncated);
    let frame = framed(&ipv6(V6, 0, &extension(TCP, 0, &tcp(EXACT, SYN))));
    check_passed(&frame[..14 + 40 + 4], Verdict::Truncated);
}

#[test]
fn what_is_not_tcp_is_told() {
    check_passed(&framed(&ipv4(V4, UDP, &[], 0, &[0; 8])), Verdict::NotTcp);
    check_passed(&framed(&ipv6(V6, UDP, &[0; 8])), Verdict::NotTcp);
    check_passed(&ethernet(0x0806, &[], &[0; 28]), Verdict::NotIp);
}

#[test]
fn what_is_for_no_listener_is_told() {
    check_passed(&framed(&ipv4(V4, TCP, &[], 0, &tcp(80, SYN))), Verdict::NoListener);
    check_passed(&framed(&ipv4(OTHER_V4, TCP, &[], 0, &tcp(EXACT, SYN))), Verdict::NoListener);
    let mut for_other_host = framed(&ipv4(V4, TCP, &[], 0, &tcp(EXACT, SYN)));
    for_other_host[0] = 2;
    check_passed(&for_other_host, Verdict::NotForInterface);
}

#[test]
fn a_wildcard_counts_what_is_for_a_local_address() {
    check(&framed(&ipv4(V4, TCP, &[], 0, &tcp(WILDCARD, SYN))), Verdict::Counted, WILDCARD_ID, 1, 40);
    check_passed(&framed(&ipv4(OTHER_V4, TCP, &[], 0, &tcp(WILDCARD, SYN))), Verdict::NotLocal);
    check_passed(&framed(&ipv6(V6, TCP, &tcp(WILDCARD, SYN))), Verdict::NotLocal);
}

#[test]
fn a_link_without_a_header_is_read_from_the_ip_header_on() {
    let Some(bpffs) = bpffs() else { return };
    let bpf = loaded(&bpffs);
    // A test packet always has an Ethernet header: its destination's first byte stands for the IP version.
    let mut frame = vec![0; 64];
    run_passed(&bpf, PROGRAM_IP, &frame);
    frame[0] = 0x45;
    frame[9] = UDP;
    run_passed(&bpf, PROGRAM_IP, &frame);
    // Both are for another host by their Ethernet address, unless it is that of `lo`.
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::NotIp, 1), (Verdict::NotForInterface, 1)]));
}

#[test]
fn counters_of_a_listener_begin_and_end_with_it() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = loaded(&bpffs);
    let frame = framed(&ipv4(V4, TCP, &[], 0, &tcp(EXACT, SYN)));
    run_passed(&bpf, PROGRAM_ETHERNET, &frame);
    let listener = key(BindAddress::Ip(V4.into()), EXACT);
    bpf.set_listener(listener, EXACT_ID, ListenerState::Draining).unwrap();
    run_passed(&bpf, PROGRAM_ETHERNET, &frame);
    assert_eq!(bpf.counters(EXACT_ID).unwrap().syns, 2);

    // A successor on the same key is not touched by the removal of the former.
    let successor = ListenerId(9);
    bpf.set_listener(listener, successor, ListenerState::Ready).unwrap();
    bpf.remove_listener(listener, EXACT_ID).unwrap();
    assert_eq!(bpf.counters(EXACT_ID).unwrap(), ListenerCounters::default());
    run_passed(&bpf, PROGRAM_ETHERNET, &frame);
    assert_eq!(bpf.counters(successor).unwrap().syns, 1);

    bpf.maps.counters.remove(&successor.0).unwrap();
    run_passed(&bpf, PROGRAM_ETHERNET, &frame);
    assert_eq!(verdicts(&bpf)[&Verdict::CounterMissing], 1);
    bpf.remove_listener(listener, successor).unwrap();
    bpf.remove_listener(listener, successor).unwrap();
    run_passed(&bpf, PROGRAM_ETHERNET, &frame);
    assert_eq!(verdicts(&bpf)[&Verdict::NoListener], 1);
}

#[test]
fn backends_are_replaced() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = Bpf::load(&bpffs.options()).unwrap();
    let entry = |last, weight| BackendEntry {
        address: SocketAddr::new(Ipv4Addr::new(10, 0, 0, last).into(), 80),
        weight,
    };
    let id = ListenerId(7);
    let stored = |bpf: &Bpf| {
        let mut stored: Vec<_> = bpf
            .maps
            .backends
            .iter()
            .map(|entry| entry.unwrap())
            .map(|(key, value)| {
                (key.listener_id, key.slot, address_of(value.address), value.port, value.weight)
            })
            .collect();
        stored.sort();
        stored
    };
    for backends in [
        vec![entry(1, 1), entry(2, 1), entry(3, 5)],
        vec![entry(1, 1), entry(4, 1)],
        vec![entry(1, 1), entry(4, 2), entry(5, 0)],
        vec![],
    ] {
        bpf.set_backends(id, backends.clone()).unwrap();
        let expected: Vec<_> = (0..)
            .zip(&backends)
            .map(|(slot, backend)| (7, slot, backend.address.ip(), 80, backend.weight))
            .collect();
        assert_eq!(stored(&bpf), expected);
    }
    // What has not changed is not written.
    bpf.set_backends(id, vec![entry(1, 1)]).unwrap();
    bpf.maps.backends.remove(&BackendKey { listener_id: 7, slot: 0 }).unwrap();
    bpf.set_backends(id, vec![entry(1, 1), entry(2, 1)]).unwrap();
    assert_eq!(stored(&bpf).len(), 1);
}

#[test]
fn a_full_map_is_named_with_the_entry() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = Bpf::load(&bpffs.options()).unwrap();
    let addresses: Vec<IpAddr> = (0..=layout::LOCAL_ADDRESSES_CAPACITY)
        .map(|index| Ipv4Addr::from_bits(0x0a00_0000 + index).into())
        .collect();
    let problems = bpf.attach(&[interface(&addresses)], &BTreeSet::new());
    let messages: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(messages, ["cannot write to map local_addresses, entry 10.0.16.0: the map is full"]);
    // It lasts, and is not told again.
    assert!(bpf.attach(&[interface(&addresses)], &BTreeSet::new()).is_empty());
    assert!(bpf.attach(&[interface(&addresses[1..])], &BTreeSet::new()).is_empty());
}

#[test]
fn pins_are_ours_alone_and_vanish_with_us() {
    let Some(bpffs) = bpffs() else { return };
    let options = bpffs.options();
    let bpf = Bpf::load(&options).unwrap();
    let pinned = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
    };
    let folders = folders(bpf.pin_dir());
    let found: BTreeSet<String> = folders.iter().flat_map(|folder| pinned(folder)).collect();
    let maps = PINNED_MAPS.iter().map(|map| map.name);
    let programs = [PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER].into_iter();
    assert_eq!(found, maps.chain(programs).map(str::to_owned).collect());
    match Bpf::load(&options) {
        Err(error @ LoadError::InUse { .. }) => {
            assert!(error.to_string().contains("another agent"), "{error}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("two agents have the same pins"),
    }
    bpf.close();
    assert!(!options.pin_dir.exists());
}

#[test]
fn stale_pins_are_replaced() {
    let Some(bpffs) = bpffs() else { return };
    let options = bpffs.options();
    let directory = programs_folder(&options.pin_dir);
    fs::create_dir_all(&directory).unwrap();
    let stale = unpinned();
    // What a map of another layout under our name would be, and one that there is no longer.
    stale.map(layout::VERDICTS).unwrap().pin(directory.join(layout::LISTENERS)).unwrap();
    stale.map(layout::VERDICTS).unwrap().pin(directory.join("former")).unwrap();
    let bpf = Bpf::load(&options).unwrap();
    let listeners = MapData::from_pin(map_path(bpf.pin_dir(), layout::LISTENERS)).unwrap();
    assert_eq!(listeners.info().unwrap().key_size(), 20);
    assert!(!directory.join("former").exists());
}

#[test]
fn connections_of_another_version_are_not_run_over() {
    let Some(bpffs) = bpffs() else { return };
    let options = bpffs.options();
    let foreign = options.pin_dir.join("v99");
    fs::create_dir_all(foreign.join("links")).unwrap();
    let mut other = unpinned();
    other.map(layout::VERDICTS).unwrap().pin(foreign.join("flows")).unwrap();
    // What only has such a name is somebody else's, and stays.
    load_after(&options).unwrap().close();
    other.map(layout::VERDICTS).unwrap().pin(foreign.join("links/7_ingress")).unwrap();
    let is_refused = || match load_after(&options) {
        Err(error @ LoadError::ForeignLayout { .. }) => {
            assert!(error.to_string().contains("forwarder cleanup --yes"), "{error}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("loaded beside connections that it does not know"),
    };
    is_refused();

    // Where it attached by clsact, and pinned maps alone: they have entries.
    fs::remove_file(foreign.join("links/7_ingress")).unwrap();
    fs::remove_file(foreign.join("flows")).unwrap();
    let mut flows: BpfHashMap<_, [u8; size_of::<FourTuple>()], [u8; size_of::<Flow>()]> =
        other.map_mut(FLOWS).unwrap().try_into().unwrap();
    flows.insert([1; _], [1; _], 0).unwrap();
    other.map(FLOWS).unwrap().pin(foreign.join("flows")).unwrap();
    is_refused();
}

#[test]
fn maps_of_another_version_are_lost_and_nothing_else() {
    let Some(bpffs) = bpffs() else { return };
    let options = BpfOptions { most_pairs: Some(16), ..bpffs.options() };
    in_namespace(|_| {
        let interfaces = interfaces();
        let start = || {
            let mut bpf = load_after(&options).unwrap();
            assert!(bpf.attach(&interfaces, &BTreeSet::from([BindAddress::Any])).is_empty());
            bpf
        };
        let opened = |bpf: &Bpf| {
            let pairs: BpfHashMap<_, u32, Pair> = bpf.ebpf.map(PAIRS).unwrap().try_into().unwrap();
            pairs.get(&PAIR, 0).ok().map(|pair| pair.opened)
        };
        // Dies with a pair and a verdict that has been counted, and has pinned these maps in another version.
        let leave = |names: &[&str]| {
            let mut bpf = start();
            write_pair(&mut bpf, Pair { opened: 42, ..Pair::default() });
            write_flows(&mut bpf, &[frames::flow_v4()]);
            run(&bpf, PROGRAM_ETHERNET, &[0; 64]);
            assert!(!verdicts(&bpf).is_empty());
            bpf.leave();
            drop(bpf);
            fs::create_dir_all(options.pin_dir.join("v99")).unwrap();
            for name in names {
                fs::rename(map_path(&options.pin_dir, name), options.pin_dir.join("v99").join(name)).unwrap();
            }
        };
        leave(&[layout::VERDICTS]);
        let mut bpf = start();
        assert_eq!((opened(&bpf), verdicts(&bpf)), (Some(42), BTreeMap::new()));
        assert!(!options.pin_dir.join("v99").exists());
        bpf.leave();
        drop(bpf);

        leave(&[FLOWS, PAIRS]);
        let bpf = start();
        assert_eq!(opened(&bpf), None);
        assert!(!verdicts(&bpf).is_empty());
        assert!(!options.pin_dir.join("v99").exists());
        bpf.close();
        assert!(!options.pin_dir.exists());
    });
}

/// An agent that runs removes what has ended itself; a directory that is somebody else's keeps it, and that is told.
#[test]
fn entries_that_cannot_be_removed_are_told() {
    let Some(bpffs) = bpffs() else { return };
    let options = bpffs.options();
    let mut bpf = load_after(&options).unwrap();
    assert!(flows::forget(&options.pin_dir, []).is_ok());
    bpf.pins.leave();
    drop(bpf);
    assert!(flows::forget(&options.pin_dir, []).is_ok());
    chown(&options.pin_dir, Some(65_534), None).unwrap();
    let refused = flows::forget(&options.pin_dir, []).unwrap_err().to_string();
    assert!(refused.starts_with("cannot remove connections that have ended from map flows"), "{refused}");
    assert!(refused.contains("65534"), "{refused}");
}

#[test]
fn what_is_left_is_found_by_the_next_one() {
    let Some(bpffs) = bpffs() else { return };
    let options = BpfOptions { most_pairs: Some(16), ..bpffs.options() };
    in_namespace(|_| {
        let interfaces = interfaces();
        let bound = BTreeSet::from([BindAddress::Any]);
        let mut first = Bpf::load(&options).unwrap();
        assert!(first.attach(&interfaces, &bound).is_empty());
        write_pair(&mut first, Pair { opened: 42, ..Pair::default() });
        first.leave();
        drop(first);
        let links = || fs::read_dir(programs_folder(&options.pin_dir).join("links")).map(Iterator::count);
        if AttachKind::of_kernel() == AttachKind::Tcx {
            assert_eq!(links().unwrap(), 2 * interfaces.len());
        }
        // One that forwards no connections of its own serves those that it finds all the same.
        let mut second = load_after(&BpfOptions { most_pairs: None, ..options.clone() }).unwrap();
        assert!(second.attach(&interfaces, &bound).is_empty());
        assert_eq!(pair(&second).opened, 42);
        second.close();
        assert!(!options.pin_dir.exists());
    });
}

#[test]
fn another_file_system_is_refused() {
    let Some(_bpffs) = bpffs() else { return };
    let directory = tempfile::tempdir().unwrap();
    let options = BpfOptions {
        pin_dir: directory.path().join("forwarder"),
        trace: false,
        most_pairs: None,
        most_direct: 0,
        xdp: Xdp::Off,
        syn_cookies_above: 0,
    };
    match Bpf::load(&options) {
        Err(error @ LoadError::NotBpffs { .. }) => {
            assert!(error.to_string().contains("mount -t bpf -o mode=0700 bpf /sys/fs/bpf"), "{error}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("pinned to another file system"),
    }
}

#[tokio::test]
async fn programs_that_log_are_loaded() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = Bpf::load(&BpfOptions { trace: true, ..bpffs.options() }).unwrap();
    assert!(bpf.take_log().unwrap().is_some());
    assert!(bpf.take_log().unwrap().is_none());
    let syn = framed(&ipv6(V6, TCP, &tcp(EXACT, SYN)));
    bpf.set_listener(key(BindAddress::Ip(V6.into()), EXACT), EXACT_ID, ListenerState::Ready).unwrap();
    run_passed(&bpf, PROGRAM_ETHERNET, &syn);
    assert_eq!(bpf.counters(EXACT_ID).unwrap().syns, 1);
}

#[test]
fn the_probe_leaves_nothing() {
    let Some(_bpffs) = bpffs() else { return };
    assert!(!probe(true).unwrap().kernel.is_empty());
}

/// Runs `ip` with arguments that have no blanks in them.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_ascii_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Moves this thread into a network namespace.
fn enter(name: &str) {
    let namespace = fs::File::open(format!("/run/netns/{name}")).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// Runs `body` in a network namespace of its own, in which `lo` is up.
fn in_namespace(body: impl FnOnce(&str) + Send) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("fwd-{}-bpf{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    ip(&format!("netns add {name}"));
    ip(&format!("-n {name} link set lo up"));
    let outcome = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(&name);
            body(&name);
        });
        thread.join()
    });
    ip(&format!("netns delete {name}"));
    outcome.unwrap();
}

fn filters(namespace: &str, interface: &str) -> usize {
    let arguments = ["-n", namespace, "filter", "show", "dev", interface, "ingress"];
    let output = Command::new("tc").args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains(PROGRAM_ETHERNET)).count()
}

/// Connects through an interface that programs hang on, and expects what they count.
fn counts_a_connection(kind: AttachKind) {
    let Some(bpffs) = bpffs() else { return };
    in_namespace(|namespace| {
        let interfaces = interfaces();
        assert_eq!(interfaces.len(), 1, "{interfaces:?}");
        let load = || {
            let mut bpf = Bpf::load(&bpffs.options()).unwrap();
            let links = (kind == AttachKind::Clsact).then(|| bpf.pins.links().unwrap());
            bpf.attachments = Attachments::new(kind, Stay::Nothing(links));
            bpf
        };
        if kind == AttachKind::Clsact {
            // What an agent leaves that is killed: the filter.
            let mut dead = load();
            assert!(dead.attach(&interfaces, &BTreeSet::from([BindAddress::Any])).is_empty());
            dead.attachments.leave();
            dead.pins.leave();
            drop(dead);
            assert_eq!(filters(namespace, "lo"), 1);
        }

        let mut bpf = load();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let id = ListenerId(1);
        bpf.set_listener(key(BindAddress::Any, address.port()), id, ListenerState::Ready).unwrap();
        let bound = BTreeSet::from([BindAddress::Any]);
        assert!(bpf.attach(&interfaces, &bound).is_empty());
        assert!(bpf.attach(&interfaces, &bound).is_empty());
        assert_eq!(bpf.attachments(), [Attachment { interface: "lo".to_owned(), kind, xdp: None }]);

        drop(TcpStream::connect(address).unwrap());
        let counters = bpf.counters(id).unwrap();
        assert_eq!(counters.syns, 1);
        assert!(counters.packets >= 2 && counters.bytes >= 2 * 40, "{counters:?}");
        if kind == AttachKind::Clsact {
            assert_eq!(filters(namespace, "lo"), 1);
        }

        // No listener wants the interface any more.
        assert!(bpf.attach(&interfaces, &BTreeSet::new()).is_empty());
        assert!(bpf.attachments().is_empty());
        drop(TcpStream::connect(address).unwrap());
        assert_eq!(bpf.counters(id).unwrap().syns, 1);

        // One that fails does not concern the other, and is told once.
        let mut with_missing = interfaces.clone();
        let gone = interface(&[V4.into()]);
        let odd = InterfaceKind::Unsupported(32);
        with_missing.insert(0, Interface { index: 98, name: "odd0".to_owned(), kind: odd, ..gone.clone() });
        // One that has just gone away is none.
        with_missing.insert(0, Interface { index: 99, name: "gone0".to_owned(), ..gone });
        let problems = bpf.attach(&with_missing, &bound);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].to_string().contains("interface odd0"), "{}", problems[0]);
        assert!(bpf.attach(&with_missing, &bound).is_empty());
        assert_eq!(bpf.attachments().len(), 1);

        bpf.close();
        assert_eq!(filters(namespace, "lo"), 0);
    });
}

#[test]
fn a_connection_is_counted_by_tcx() {
    if AttachKind::of_kernel() == AttachKind::Tcx {
        counts_a_connection(AttachKind::Tcx);
    }
}

#[test]
fn a_connection_is_counted_by_clsact() {
    counts_a_connection(AttachKind::Clsact);
}
