//! What the agent changes in the maps while programs read them.

use std::net::Ipv4Addr;

use aya::maps::HashMap as BpfHashMap;
use forwarder_common::flow::{
    DIRECTION_RESPONSE, FLOW_BY_STACK, Flow, NextHop, STATE_OFFLOADED, STATE_OVER, STATE_RESET,
};
use forwarder_common::layout::FLOWS;
use forwarder_common::tuple::FourTuple;

use super::frames::{flow_v4, flow_v6, known_clocks, with_flow};
use super::{PAIR, write_flows};
use crate::bpf::Bpf;

fn flow_at(bpf: &Bpf, key: FourTuple) -> Flow {
    let flows: BpfHashMap<_, FourTuple, Flow> = bpf.ebpf.map(FLOWS).unwrap().try_into().unwrap();
    flows.get(&key, 0).unwrap()
}

#[test]
fn both_flows_of_a_pair_are_changed_in_place() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        let Some((_bpffs, mut bpf)) = with_flow(key, flow, known_clocks()) else { return };
        let reverse = flow.out.reversed();
        let opposite = Flow { out: key.reversed(), direction: DIRECTION_RESPONSE, ..flow };
        write_flows(&mut bpf, &[(reverse, opposite)]);
        let change = |flow: Flow, interface| Flow {
            interface,
            next_hop: NextHop::new(Ipv4Addr::new(192, 0, 2, 254).into()),
            mtu: 1400,
            hop_limit: 7,
            arrival: 12 - interface,
            acknowledged: 4_000_000_000 + interface,
            flags: FLOW_BY_STACK,
            state: STATE_RESET,
            ..flow
        };
        let changed = [(key, change(flow, 5)), (reverse, change(opposite, 7))];
        bpf.updates.set_flows(&changed).unwrap();
        assert_eq!(changed.map(|(key, _)| (key, flow_at(&bpf, key))), changed);
    }
}

#[test]
fn a_state_never_goes_back() {
    let (key, flow) = flow_v4();
    let over = Flow { state: STATE_OVER, ..flow };
    let Some((_bpffs, bpf)) = with_flow(key, over, known_clocks()) else { return };
    let late = Flow { state: STATE_OFFLOADED, interface: 9, ..flow };
    bpf.updates.set_flows(&[(key, late), (flow.out.reversed(), late)]).unwrap();
    assert_eq!(flow_at(&bpf, key), over);
}

#[test]
fn the_flow_that_came_after_a_pair_is_left_alone() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, flow, known_clocks()) else { return };
    let former = Flow { pair: PAIR - 1, state: STATE_OVER, ..flow };
    bpf.updates.set_flows(&[(key, former), (flow.out.reversed(), former)]).unwrap();
    assert_eq!(flow_at(&bpf, key), flow);
}
