//! SYNs of clients that listeners do not let in.

use aya::maps::LpmTrie;
use forwarder_common::layout::{CLIENT_RULES, CLIENT_RULES_CAPACITY, ClientNetwork};
use forwarder_gateway::allowed::AllowedAddresses;

use super::frames::{Frame, TC_ACT_SHOT, flow_v4, tuple};
use super::xdp_tests::{XDP_DROP, XDP_PASS, cost_at_xdp, loaded_at_xdp, run_at_xdp};
use super::*;

fn clients(rules: &[&str]) -> Arc<AllowedAddresses> {
    Arc::new(AllowedAddresses::new(rules.iter().map(|rule| rule.parse().unwrap()).collect()))
}

/// A segment with these flags from a client to a listener.
fn segment(client: &str, listener: &str, flags: u8) -> Vec<u8> {
    Frame { flags, ..Frame::new(tuple(client, listener)) }.encode()
}

/// Whether the ingress program drops the SYN of a client.
fn drops(bpf: &Bpf, client: &str, listener: &str) -> bool {
    match run(bpf, PROGRAM_ETHERNET, &segment(client, listener, SYN)).0 {
        TC_ACT_SHOT => true,
        TC_ACT_UNSPEC => false,
        other => panic!("{client}: {other}"),
    }
}

/// The numbers of the rules that stand in the map.
fn numbers(bpf: &Bpf) -> BTreeSet<u32> {
    let map = MapData::from_pin(map_path(bpf.pin_dir(), CLIENT_RULES)).unwrap();
    let map: LpmTrie<_, ClientNetwork, u32> = Map::LpmTrie(map).try_into().unwrap();
    map.keys().map(|key| key.unwrap().data().rules).collect()
}

/// Waits until they are such: what is removed waits for a grace period.
#[track_caller]
fn wait_numbers(bpf: &Bpf, are_such: impl Fn(&BTreeSet<u32>) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !are_such(&numbers(bpf)) {
        assert!(Instant::now() < deadline, "{:?}", numbers(bpf));
        thread::yield_now();
    }
}

#[test]
fn the_narrowest_network_around_a_client_decides() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = loaded(&bpffs);
    let (v4, v6) = (key(BindAddress::Ip(V4.into()), EXACT), key(BindAddress::Ip(V6.into()), EXACT));
    let rules = clients(&["!10.0.0.0/8", "10.1.0.0/16", "!10.1.2.3", "!2001:db8:1::/48", "2001:db8:1::7"]);
    bpf.set_clients(v4, EXACT_ID, &rules, 0).unwrap();
    bpf.set_clients(v6, EXACT_V6_ID, &rules, 0).unwrap();
    assert_eq!(numbers(&bpf).len(), 1, "listeners share them");
    let (to_v4, to_v6) = (format!("{V4}:{EXACT}"), format!("[{V6}]:{EXACT}"));
    for (client, is_dropped) in [
        ("10.0.0.0:1", true),
        ("10.255.255.255:1", true),
        ("11.0.0.0:1", false),
        ("9.255.255.255:1", false),
        ("10.1.0.1:1", false),
        ("10.1.2.3:1", true),
        ("10.1.2.4:1", false),
    ] {
        assert_eq!(drops(&bpf, client, &to_v4), is_dropped, "{client}");
    }
    for (client, is_dropped) in [
        ("[2001:db8:1::1]:1", true),
        ("[2001:db8:1::7]:1", false),
        ("[2001:db8:2::1]:1", false),
        ("[::10.0.0.1]:1", false),
    ] {
        assert_eq!(drops(&bpf, client, &to_v6), is_dropped, "{client}");
    }
    assert_eq!(bpf.counters(EXACT_ID).unwrap().denied, 3);
    assert_eq!(bpf.counters(EXACT_V6_ID).unwrap().denied, 1);
    assert_eq!(verdicts(&bpf)[&Verdict::ClientDenied], 4);
    // The other listener has none, and what is no SYN goes on.
    assert!(!drops(&bpf, "10.0.0.1:1", &format!("{V4}:{WILDCARD}")));
    for flags in [ACK, SYN_ACK] {
        run_passed(&bpf, PROGRAM_ETHERNET, &segment("10.0.0.1:1", &to_v4, flags));
    }
}

#[test]
fn rules_of_ipv6_say_nothing_of_clients_of_ipv4() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = loaded(&bpffs);
    let (to_v4, to_v6) = (format!("{V4}:{EXACT}"), format!("[{V6}]:{EXACT}"));
    let set = |bpf: &mut Bpf, rules: &[&str]| {
        bpf.set_clients(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, &clients(rules), 0).unwrap();
        bpf.set_clients(key(BindAddress::Ip(V6.into()), EXACT), EXACT_V6_ID, &clients(rules), 0).unwrap();
    };
    let dropped = |bpf: &Bpf| [drops(bpf, "10.0.0.1:1", &to_v4), drops(bpf, "[2001:db8::1]:1", &to_v6)];
    set(&mut bpf, &["!::/0"]);
    assert_eq!(dropped(&bpf), [false, true]);
    set(&mut bpf, &["!0.0.0.0/0"]);
    assert_eq!(dropped(&bpf), [true, false]);
    set(&mut bpf, &["!0.0.0.0/0", "!::/0", "10.0.0.0/8"]);
    assert_eq!(dropped(&bpf), [false, true]);
    set(&mut bpf, &[]);
    assert_eq!(dropped(&bpf), [false, false]);
}

#[test]
fn rules_go_with_the_last_listener_that_has_them() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = loaded(&bpffs);
    let listener = key(BindAddress::Ip(V4.into()), EXACT);
    let to = format!("{V4}:{EXACT}");
    bpf.set_clients(listener, EXACT_ID, &clients(&["!10.0.0.0/8"]), 0).unwrap();
    let first = numbers(&bpf);
    bpf.set_clients(key(BindAddress::Any, WILDCARD), WILDCARD_ID, &clients(&["!10.0.0.0/8"]), 0).unwrap();
    bpf.set_clients(listener, EXACT_ID, &clients(&["!10.0.0.0/9"]), 0).unwrap();
    assert!(drops(&bpf, "10.0.0.1:1", &to) && !drops(&bpf, "10.128.0.1:1", &to));
    assert!(numbers(&bpf).is_superset(&first), "the other listener has them");
    bpf.remove_listener(key(BindAddress::Any, WILDCARD), WILDCARD_ID).unwrap();
    wait_numbers(&bpf, |numbers| numbers.is_disjoint(&first));
    assert!(drops(&bpf, "10.0.0.1:1", &to), "those of the first listener stay");
    // A state that is written does not undo them.
    bpf.set_listener(listener, EXACT_ID, ListenerState::Draining).unwrap();
    assert!(drops(&bpf, "10.0.0.1:1", &to));
}

/// What a former agent's listeners refer to holds until they are replaced.
#[test]
fn the_next_agent_gives_rules_other_numbers() {
    let Some(bpffs) = bpffs() else { return };
    let options = BpfOptions { most_pairs: Some(16), ..bpffs.options() };
    let mut former = Bpf::load(&options).unwrap();
    let listener = key(BindAddress::Ip(V4.into()), EXACT);
    let to = format!("{V4}:{EXACT}");
    former.set_clients(listener, EXACT_ID, &clients(&["!10.0.0.0/8"]), 0).unwrap();
    former.set_listener(listener, EXACT_ID, ListenerState::Ready).unwrap();
    // Without connections there would be nothing to take over.
    write_flows(&mut former, &[flow_v4()]);
    former.leave();
    drop(former);
    let mut bpf = load_after(&options).unwrap();
    assert!(bpf.attach(&[interface(&[V4.into()])], &BTreeSet::new()).is_empty());
    assert!(drops(&bpf, "10.0.0.1:1", &to), "the former's rule");
    // Another listener comes first, which has the number of the former's.
    let other = key(BindAddress::Any, WILDCARD);
    bpf.set_clients(other, EXACT_ID, &clients(&["!192.0.2.0/24"]), 0).unwrap();
    bpf.set_listener(other, EXACT_ID, ListenerState::Ready).unwrap();
    assert!(drops(&bpf, "10.0.0.1:1", &to));
    bpf.set_clients(listener, EXACT_V6_ID, &clients(&["!10.1.0.0/16"]), 0).unwrap();
    assert!(drops(&bpf, "10.0.0.1:1", &to), "until the listener is set");
    bpf.set_listener(listener, EXACT_V6_ID, ListenerState::Ready).unwrap();
    assert!(!drops(&bpf, "10.0.0.1:1", &to) && drops(&bpf, "10.1.0.1:1", &to));
    bpf.remove_former_listeners().unwrap();
    wait_numbers(&bpf, |numbers| numbers.len() <= 2);
    assert!(drops(&bpf, "10.1.0.1:1", &to));
}

/// Neither the new ones nor those of before hold, and no program chooses the endpoint: who accepts looks at the client.
#[test]
fn rules_that_find_no_room_are_told_and_leave_clients_to_the_socket() {
    let Some(bpffs) = bpffs() else { return };
    let mut bpf = loaded(&bpffs);
    let listener = key(BindAddress::Ip(V4.into()), EXACT);
    bpf.set_clients(listener, EXACT_ID, &clients(&["!10.0.0.0/8"]), 0).unwrap();
    bpf.set_targets(listener, EXACT_ID, [1, 1]).unwrap();
    let count = CLIENT_RULES_CAPACITY + 1;
    let mut many: Vec<_> =
        (0..count).map(|host| format!("!{}", Ipv4Addr::from(0x0b00_0000 + host)).parse().unwrap()).collect();
    let error =
        bpf.set_clients(listener, EXACT_ID, &Arc::new(AllowedAddresses::new(many.clone())), 0).unwrap_err();
    assert!(error.to_string().contains("client_rules"), "{error}");
    assert!(!bpf.are_clients_checked(EXACT_ID));
    wait_numbers(&bpf, BTreeSet::is_empty);
    assert!(!drops(&bpf, "10.0.0.1:1", &format!("{V4}:{EXACT}")));
    assert_eq!(bpf.maps.value(EXACT_ID).targets, [0; 2]);
    // There is room again for what found none.
    let half = AllowedAddresses::new(many.split_off(many.len() / 2));
    let (half, rest) = (Arc::new(half), Arc::new(AllowedAddresses::new(many)));
    let other = key(BindAddress::Any, WILDCARD);
    bpf.set_clients(other, WILDCARD_ID, &rest, 0).unwrap();
    bpf.set_clients(listener, EXACT_ID, &half, 0).unwrap_err();
    bpf.remove_listener(other, WILDCARD_ID).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !bpf.are_clients_checked(EXACT_ID) {
        assert!(Instant::now() < deadline);
        bpf.attach(&[interface(&[V4.into()])], &BTreeSet::new());
    }
    let refused = half.rules()[0].range.addr();
    assert!(drops(&bpf, &format!("{refused}:1"), &format!("{V4}:{EXACT}")));
}

#[test]
fn a_program_at_xdp_drops_what_the_one_at_tc_would() {
    let Some(bpffs) = bpffs() else { return };
    let (mut bpf, program) = loaded_at_xdp(&bpffs, Xdp::Drop, 0);
    let rules = clients(&["!192.0.2.0/24", "192.0.2.7", "!2001:db8:1::/48"]);
    bpf.set_clients(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, &rules, 0).unwrap();
    bpf.set_clients(key(BindAddress::Ip(V6.into()), EXACT), EXACT_V6_ID, &rules, 0).unwrap();
    let (to_v4, to_v6) = (format!("{V4}:{EXACT}"), format!("[{V6}]:{EXACT}"));
    let refused = Frame { flags: SYN, ..Frame::new(tuple("192.0.2.1:1", &to_v4)) };
    let tagged = |tag: [u8; 2]| {
        let mut frame = refused.encode();
        frame.splice(12..12, [&tag[..], &[0, 5]].concat());
        frame
    };
    let extended = framed(&ipv6(V6, 0, &extension(TCP, 1, &tcp(EXACT, SYN))));
    let mut from_network = extended.clone();
    from_network[22..38].copy_from_slice(&"2001:db8:1::9".parse::<Ipv6Addr>().unwrap().octets());
    for (what, frame, is_dropped) in [
        ("a refused client", refused.encode(), true),
        ("with options", Frame { ip_options: vec![1; 40], ..refused.clone() }.encode(), true),
        ("for a VLAN interface", tagged([0x81, 0]), false),
        ("with the tag of a service", tagged([0x88, 0xa8]), false),
        ("over IPv6", segment("[2001:db8:1::1]:1", &to_v6, SYN), true),
        ("behind extension headers", from_network, true),
        ("of another network", extended, false),
        ("another client", segment("192.0.2.7:1", &to_v4, SYN), false),
        ("another port", segment("192.0.2.1:1", &format!("{V4}:{WILDCARD}"), SYN), false),
        ("an answer", segment("192.0.2.1:1", &to_v4, SYN_ACK), false),
        ("an acknowledgement", segment("192.0.2.1:1", &to_v4, ACK), false),
        ("a truncated one", refused.encode()[..40].to_vec(), false),
        ("no TCP", framed(&ipv4(V4, UDP, &[], 0, &tcp(EXACT, SYN))), false),
        ("no IP", [&[0; 12][..], &[0x08, 0x06], &[0; 46]].concat(), false),
    ] {
        let action = if is_dropped { XDP_DROP } else { XDP_PASS };
        assert_eq!(run_at_xdp(&bpf, program, &frame).0, action, "{what}");
        if is_dropped {
            assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame).0, TC_ACT_SHOT, "{what}, at TC");
        }
    }
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::ClientDenied, 8)]));
    assert_eq!(
        bpf.counters(EXACT_ID).unwrap(),
        ListenerCounters { denied: 4, ..ListenerCounters::default() }
    );
    assert_eq!(bpf.counters(EXACT_V6_ID).unwrap().denied, 4);
}

/// At XDP nothing counts, because what is let in there comes to TC.
#[test]
fn a_client_is_limited_by_what_has_come_to_tc() {
    const RATE: u32 = 10;
    let Some(bpffs) = bpffs() else { return };
    let (mut bpf, program) = loaded_at_xdp(&bpffs, Xdp::Drop, 0);
    let all = clients(&[]);
    bpf.set_clients(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, &all, RATE).unwrap();
    bpf.set_clients(key(BindAddress::Ip(V6.into()), EXACT), EXACT_V6_ID, &all, RATE).unwrap();
    let (to_v4, to_v6) = (format!("{V4}:{EXACT}"), format!("[{V6}]:{EXACT}"));
    for (client, to, another, same) in [
        ("192.0.2.1:1", &to_v4, "192.0.2.2:1", "192.0.2.1:2"),
        ("[2001:db8:1::1]:1", &to_v6, "[2001:db8:1:1::1]:1", "[2001:db8:1::2]:1"),
    ] {
        let at_xdp = |bpf: &Bpf, client| run_at_xdp(bpf, program, &segment(client, to, SYN)).0;
        for _ in 0..3 * RATE {
            assert_eq!(at_xdp(&bpf, client), XDP_PASS);
        }
        let begun = Instant::now();
        let passed = (0..3 * RATE).filter(|_| !drops(&bpf, client, to)).count();
        // It may have come back to one more in each tenth of a second, and two at the edges.
        let most = u128::from(RATE) + begun.elapsed().as_millis() / 100 + 2;
        assert!(passed >= RATE as usize && passed as u128 <= most, "{client}: {passed} of {most}");
        assert!(!drops(&bpf, another, to), "{another}");
        let deadline = Instant::now() + Duration::from_secs(10);
        // Exhausted once more, XDP drops too.
        while at_xdp(&bpf, client) == XDP_PASS {
            assert!(Instant::now() < deadline, "{client}");
            drops(&bpf, same, to);
        }
        while drops(&bpf, client, to) {
            assert!(Instant::now() < deadline, "{client} never comes again");
        }
    }
    assert!(verdicts(&bpf)[&Verdict::ClientLimited] > 0);
    let limited = [EXACT_ID, EXACT_V6_ID].map(|id| bpf.counters(id).unwrap().limited);
    assert_eq!(limited.iter().sum::<u64>(), verdicts(&bpf)[&Verdict::ClientLimited]);
    bpf.set_clients(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, &all, 0).unwrap();
    assert!((0..3 * RATE).all(|_| !drops(&bpf, "192.0.2.1:1", &to_v4)), "0 is any number");
}

/// Tells what a frame costs at XDP; nothing is asserted of it, for it is the machine's.
#[test]
fn what_a_frame_costs_at_xdp() {
    let Some(bpffs) = bpffs() else { return };
    let (mut bpf, program) = loaded_at_xdp(&bpffs, Xdp::Drop, 0);
    let to = format!("{V4}:{EXACT}");
    for count in [1, 1000_u32] {
        let hosts = (0..count).map(|host| Ipv4Addr::from(0xc000_0200 + host * 7));
        let rules = hosts.map(|host| format!("!{host}").parse().unwrap()).collect();
        let rules = Arc::new(AllowedAddresses::new(rules));
        bpf.set_clients(key(BindAddress::Ip(V4.into()), EXACT), EXACT_ID, &rules, 0).unwrap();
        for (what, frame, action) in [
            ("a SYN that is dropped", segment("192.0.2.0:1", &to, SYN), XDP_DROP),
            ("a SYN that is let in", segment("192.0.2.1:1", &to, SYN), XDP_PASS),
            ("another packet", segment("192.0.2.1:1", &to, ACK), XDP_PASS),
        ] {
            let least = cost_at_xdp(&bpf, program, &frame, action);
            println!("{what}, of {count} networks: {least:?}");
        }
    }
}
