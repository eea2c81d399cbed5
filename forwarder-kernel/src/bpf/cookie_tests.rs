//! The SYN cookies by which the programs answer in a flood, byte by byte.

use std::net::UdpSocket;

use forwarder_common::PROGRAM_XDP_FORWARD;
use forwarder_common::packet::{FLAG_ACK, FLAG_SYN};

use super::direct_tests::usual_options;
use super::frames::{Field, Frame, LOOPBACK, TC_ACT_REDIRECT, bytes_of, checksum, flow_v4, flow_v6};
use super::xdp_tests::{OWN, XDP_PASS, XDP_TX, addressed, run_at_xdp, tells_targets};
use super::*;

/// Of the way back.
const MTU: u16 = 1400;
/// What is answered at TC.
const REDIRECTED: u32 = TC_ACT_REDIRECT.cast_unsigned();

/// Where a SYN is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Hook {
    Tc,
    Xdp,
}

/// Runs `body` with listening sockets that always answer with cookies, and programs that leave them one SYN in a second, at TC and at XDP.
fn with_flooded_listeners(rate: u32, body: impl Fn(&Bpf, Hook) + Sync) {
    for hook in [Hook::Tc, Hook::Xdp] {
        in_namespace(|_| {
            ip("link set lo mtu 1400");
            ip("address add 198.51.100.7/32 dev lo");
            // Sockets may be bound to it at once: on lo too, it is a task of the kernel that ends the check for duplicates.
            ip("address add 2001:db8::7/128 dev lo nodad");
            ip("route add 192.0.2.0/24 dev lo");
            ip("-6 route add 2001:db8::/120 dev lo");
            // There is one neighbour behind it, which the kernel knows once it has sent it something; by IPv6 each is one.
            UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", "192.0.2.1:9").unwrap();
            ip("neigh add 2001:db8::1 lladdr 00:00:00:00:00:00 dev lo nud permanent");
            for (setting, value) in
                [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"), ("ipv4/tcp_syncookies", "2")]
            {
                fs::write(format!("/proc/sys/net/{setting}"), value).unwrap();
            }
            let listen = |address: IpAddr| TcpListener::bind((address, EXACT)).unwrap();
            let _sockets = [IpAddr::from(V4), V6.into()].map(listen);
            let Some(bpffs) = bpffs() else { return };
            if hook == Hook::Xdp && !tells_targets() {
                return;
            }
            let xdp = if hook == Hook::Xdp { Xdp::Native } else { Xdp::Off };
            let options = BpfOptions { xdp, most_pairs: Some(16), syn_cookies_above: 1, ..bpffs.options() };
            let mut bpf = Bpf::load(&options).unwrap();
            for (address, id) in [(IpAddr::from(V4), EXACT_ID), (V6.into(), EXACT_V6_ID)] {
                let listener = key(BindAddress::Ip(address), EXACT);
                bpf.set_listener(listener, id, ListenerState::Ready).unwrap();
                bpf.set_clients(listener, id, &Arc::default(), rate).unwrap();
            }
            assert!(bpf.attach(&[interface(&[V4.into(), V6.into()])], &BTreeSet::new()).is_empty());
            if hook == Hook::Xdp {
                assert_eq!(bpf.xdp_error(), None);
                let own = Interface { index: LOOPBACK, hardware_address: Some(OWN), ..interface(&[]) };
                bpf.xdp.pretend(&own, true);
            }
            body(&bpf, hook);
        });
    }
}

/// What becomes of a frame of which several come: each CPU leaves one SYN in a second to the sockets.
fn run_frame(bpf: &Bpf, hook: Hook, frame: &[u8]) -> (u32, Vec<u8>) {
    const TIMES: usize = 6;
    let once = |_| match hook {
        Hook::Tc => {
            let (action, out) = run(bpf, PROGRAM_ETHERNET, frame);
            (action.cast_unsigned(), out)
        }
        Hook::Xdp => run_at_xdp(bpf, PROGRAM_XDP_FORWARD, &addressed(frame.to_vec())),
    };
    let left = if hook == Hook::Tc { TC_ACT_UNSPEC.cast_unsigned() } else { XDP_PASS };
    let mut outcomes = (0..TIMES).map(once);
    outcomes.find(|(action, _)| *action != left).unwrap_or_else(|| once(TIMES))
}

fn syn(is_v6: bool, options: Vec<Field>) -> Frame {
    let (tuple, _) = if is_v6 { flow_v6() } else { flow_v4() };
    Frame { flags: FLAG_SYN, acknowledgement: 0, options, payload: Vec::new(), ..Frame::new(tuple) }
}

/// Checks that `out` answers `syn`, and that its checksums are right.
#[track_caller]
fn check_answer(hook: Hook, syn: &Frame, out: &[u8]) {
    let is_v6 = address_of(syn.tuple.source).is_ipv6();
    let (ip, header) = (14, if is_v6 { 40 } else { 20 });
    let (frame, tcp) = (&out[..ip], &out[ip + header..]);
    let sent = syn.encode().len() - ip - header;
    let mss = MTU - if is_v6 { 60 } else { 40 };
    // At XDP the frame's length stays: the end of options follows, or there is no place for any.
    let mut options = [[2, 4].as_slice(), &mss.to_be_bytes()].concat();
    options.resize(if hook == Hook::Xdp { sent - 20 } else { 4 }, 0);
    let expected = Frame {
        tuple: syn.tuple.reversed(),
        hop_limit: 64,
        sequence: u32::from_be_bytes(tcp[4..8].try_into().unwrap()),
        acknowledgement: syn.sequence.wrapping_add(1),
        flags: FLAG_SYN | FLAG_ACK,
        window: 14_600,
        options: Vec::new(),
        payload: options,
        ..syn.clone()
    };
    // The options stand where the payload of one without does.
    let mut expected = expected.encode();
    let length = u8::try_from(tcp.len() / 4).unwrap();
    expected[ip + header + 12] = length << 4;
    assert_eq!(out.len(), expected.len());
    assert_eq!(tcp[..16], expected[ip + header..][..16]);
    assert_eq!(tcp[20..], expected[ip + header + 20..]);
    let (from, to) = (address_of(syn.tuple.destination), address_of(syn.tuple.source));
    let bytes = u32::try_from(tcp.len()).unwrap().to_be_bytes();
    let pseudo = [bytes_of(from), bytes_of(to), bytes.to_vec(), vec![0, 0, 0, 6]].concat();
    assert_eq!(checksum(&[&pseudo, tcp]), 0, "the checksum of TCP");
    // Of this interface, and of who is behind it.
    assert_eq!(frame[..12], [0; 12]);
    if is_v6 {
        assert_eq!(out[ip..ip + header], expected[ip..ip + header]);
    } else {
        assert_eq!(checksum(&[&out[ip..ip + header]]), 0, "the checksum of IP");
        assert_eq!(out[ip + 2..ip + 4], expected[ip + 2..ip + 4]);
        assert_eq!(out[ip + 12..ip + header], expected[ip + 12..ip + header]);
        assert_eq!(out[ip + 6..ip + 10], [0x40, 0, 64, 6]);
    }
}

#[test]
fn a_syn_of_a_flood_is_answered_at_both_hooks() {
    with_flooded_listeners(0, |bpf, hook| {
        let mss = |size: u16| Field::Other(2, size.to_be_bytes().to_vec());
        let usual = usual_options();
        let full = [usual.clone(), vec![Field::Other(30, vec![0; 18])]].concat();
        let mut answered = 0;
        for is_v6 in [false, true] {
            for options in [Vec::new(), vec![mss(1240)], usual.clone(), full.clone()] {
                let syn = syn(is_v6, options);
                let (action, out) = run_frame(bpf, hook, &syn.encode());
                assert_eq!(action, if hook == Hook::Tc { REDIRECTED } else { XDP_TX }, "{syn:?}");
                check_answer(hook, &syn, &out);
                answered += 1;
            }
        }
        assert!(verdicts(bpf)[&Verdict::CookieSent] >= answered);
    });
}

#[test]
fn what_the_stack_would_not_take_is_not_answered() {
    with_flooded_listeners(0, |bpf, hook| {
        let before = verdicts(bpf).get(&Verdict::CookieSent).copied();
        let plain = syn(false, Vec::new());
        // A TCP header that is shorter than any.
        let mut short = plain.encode();
        short[14 + 20 + 12] = 4 << 4;
        let with_options = Frame { ip_options: vec![1; 4], ..plain.clone() };
        // A hop-by-hop header of eight bytes.
        let mut extended = syn(true, Vec::new()).encode();
        extended[20] = 0;
        let length = u16::from_be_bytes([extended[18], extended[19]]) + 8;
        extended[18..20].copy_from_slice(&length.to_be_bytes());
        extended.splice(54..54, [6, 0, 1, 4, 0, 0, 0, 0]);
        let mut mapped = syn(true, Vec::new()).encode();
        mapped[22..38].copy_from_slice(&Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets());
        let passed = if hook == Hook::Tc { TC_ACT_UNSPEC.cast_unsigned() } else { XDP_PASS };
        for frame in [short, with_options.encode(), extended, mapped] {
            let (action, out) = run_frame(bpf, hook, &frame);
            assert_eq!((action, &out[12..]), (passed, &frame[12..]));
        }
        assert_eq!(verdicts(bpf).get(&Verdict::CookieSent).copied(), before);
    });
}

#[test]
fn how_often_a_client_comes_is_counted_where_it_is_limited() {
    with_flooded_listeners(1_000, |bpf, hook| {
        let (action, _) = run_frame(bpf, hook, &syn(false, vec![Field::Other(2, vec![5, 0xb4])]).encode());
        // TC counts, and then answers.
        assert_eq!(action, if hook == Hook::Tc { REDIRECTED } else { XDP_PASS });
    });
}
