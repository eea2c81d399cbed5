//! Entries removed and made anew on one CPU, while the ingress program meets packets of them on another.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap as BpfHashMap, MapData};
use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use forwarder_common::PROGRAM_ETHERNET;
use forwarder_common::flow::{Flow, Pair};
use forwarder_common::layout::{FLOWS, PAIRS};
use forwarder_common::packet::FLAG_ACK;
use forwarder_common::tuple::FourTuple;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::frames::{Field, Frame, flow_v4, flow_v6, with_flow};
use crate::bpf::Bpf;
use crate::maps::gate::Gate;
use crate::maps::versions::map_path;

/// For how long packets meet entries that come and go.
const DURATION: Duration = Duration::from_secs(2);
/// How many packets one call of the kernel runs.
const PACKETS: u32 = 2_000;
const NUMBERS: [u32; 2] = [21, 22];

/// A flow that leaves its packets as they are, and another one, of another pair, that does too.
fn flows((key, flow): (FourTuple, Flow)) -> [(FourTuple, Flow); 2] {
    NUMBERS.map(|pair| {
        let port = u16::try_from(pair).unwrap();
        let key = FourTuple { source_port: key.source_port + port, ..key };
        let unchanged = Flow {
            out: key,
            pair,
            sequence_shift: 0,
            acknowledgement_shift: 0,
            source_scale: 7,
            target_scale: 7,
            hop_limit: Frame::new(key).hop_limit,
            ..flow
        };
        (key, unchanged)
    })
}

/// What was found of entries that belong to another connection than the packet's.
#[derive(Debug, Default)]
struct Foreign {
    /// Calls of which a packet was translated by such a flow.
    translated: u64,
    /// Pairs that were written without a packet of their own.
    written: u64,
}

type Maps = (BpfHashMap<MapData, FourTuple, Flow>, BpfHashMap<MapData, u32, Pair>);

fn open(bpf: &Bpf) -> Maps {
    let open = |name| MapData::from_pin(map_path(bpf.pin_dir(), name)).unwrap();
    (
        aya::maps::Map::HashMap(open(FLOWS)).try_into().unwrap(),
        aya::maps::Map::HashMap(open(PAIRS)).try_into().unwrap(),
    )
}

fn insert((flows, pairs): &mut Maps, (key, flow): &(FourTuple, Flow)) {
    flows.insert(key, flow, 0).unwrap();
    pairs.insert(flow.pair, Pair::default(), 0).unwrap();
}

/// Removes a flow and its pair; whether a packet was noted of it.
fn remove((flows, pairs): &mut Maps, (key, flow): &(FourTuple, Flow)) -> bool {
    let noted = pairs.get(&flow.pair, 0).unwrap().request.packets > 0;
    pairs.remove(&flow.pair).unwrap();
    flows.remove(key).unwrap();
    noted
}

fn pin_to(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).unwrap();
}

/// Runs packets of the first flow on one CPU, while `exchange` removes one of the two and makes the other, time and again, on
/// another. Returns what was found, and how often they were exchanged.
fn stress(
    flow: (FourTuple, Flow),
    exchange: impl FnOnce(&Bpf, [(FourTuple, Flow); 2], &dyn Fn() -> bool) -> (u64, u64) + Send,
) -> Option<(Foreign, u64)> {
    let flows = flows(flow);
    let (_bpffs, bpf) = with_flow(flow.0, flow.1, Pair::default())?;
    insert(&mut open(&bpf), &flows[0]);
    let frame = Frame {
        flags: FLAG_ACK,
        options: vec![Field::Sack(vec![[1, 2], [3, 4], [5, 6]]), Field::Nop, Field::Nop],
        payload: vec![0; 100],
        ..Frame::new(flows[0].0)
    };
    let packet = frame.encode();
    let (ends, translated) = (AtomicBool::new(false), AtomicU64::new(0));
    let (exchanges, written) = thread::scope(|scope| {
        scope.spawn(|| {
            pin_to(1);
            let program: &SchedClassifier = bpf.ebpf.program(PROGRAM_ETHERNET).unwrap().try_into().unwrap();
            let mut out = vec![0; packet.len() + 64];
            while !ends.load(Ordering::Relaxed) {
                let options = TestRunOptions {
                    data_in: Some(&packet),
                    data_out: Some(&mut out),
                    repeat: PACKETS,
                    ..TestRunOptions::default()
                };
                program.test_run(options).unwrap();
                if out[..packet.len()] != packet {
                    translated.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let exchanging = scope.spawn(|| {
            pin_to(0);
            let started = Instant::now();
            exchange(&bpf, flows, &|| started.elapsed() < DURATION)
        });
        let result = exchanging.join();
        ends.store(true, Ordering::Relaxed);
        result.unwrap()
    });
    Some((Foreign { translated: translated.into_inner(), written }, exchanges))
}

/// Exchanges them at once, against the rule.
fn at_once(bpf: &Bpf, [own, foreign]: [(FourTuple, Flow); 2], goes_on: &dyn Fn() -> bool) -> (u64, u64) {
    let (mut maps, mut exchanges, mut written) = (open(bpf), 0, 0);
    while goes_on() {
        remove(&mut maps, &own);
        insert(&mut maps, &foreign);
        written += u64::from(remove(&mut maps, &foreign));
        insert(&mut maps, &own);
        exchanges += 1;
    }
    (exchanges, written)
}

/// Exchanges them as the agent does.
fn by_gate(bpf: &Bpf, [own, foreign]: [(FourTuple, Flow); 2], goes_on: &dyn Fn() -> bool) -> (u64, u64) {
    let (mut maps, mut removed_from) = (open(bpf), open(bpf));
    let (noted, told) = std::sync::mpsc::channel();
    let gate = Gate::start("gate", move |batch: Vec<(FourTuple, Flow)>| {
        pin_to(0);
        for entry in batch {
            noted.send(remove(&mut removed_from, &entry)).unwrap();
        }
    })
    .unwrap();
    let (mut exchanges, mut written) = (0, 0);
    let mut exchange = |old, new| {
        gate.condemn(old);
        gate.hasten();
        let _permit = gate.permit_blocking();
        insert(&mut maps, &new);
        told.recv().unwrap()
    };
    while goes_on() {
        exchange(own, foreign);
        written += u64::from(exchange(foreign, own));
        exchanges += 1;
    }
    (exchanges, written)
}

#[test]
fn no_packet_meets_another_connections_flow_or_pair() {
    if thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        super::skip("two CPUs");
        return;
    }
    for flow in [flow_v4(), flow_v6()] {
        // What the rule is good for: since Linux 6.1 there are some.
        let Some((against, exchanges)) = stress(flow, at_once) else { return };
        println!("{exchanges} exchanges at once: {against:?}");
        let Some((found, exchanges)) = stress(flow, by_gate) else { return };
        println!("{exchanges} exchanges by the gate: {found:?}");
        assert!(exchanges > 0);
        assert_eq!((found.translated, found.written), (0, 0), "by elements that were used again");
    }
}
