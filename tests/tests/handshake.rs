//! Connections that are offloaded before their endpoint takes part in them.

use std::process::Command;
use std::time::Duration;

use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::{Forwarding, client, peer, process, wait_until};

const WAIT: Duration = Duration::from_secs(10);

/// The ACK that completes the handshake may be lost, or be ignored by an endpoint that waits for data
/// (`TCP_DEFER_ACCEPT`) or whose accept queue is full: the node takes the connection for established then, and the
/// endpoint does not.
#[test]
fn an_endpoint_that_has_not_completed_the_handshake_gets_what_is_sent() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let (agent, backend) = (&forwarding.agent, &forwarding.topology.backend1);
    let nft = |rules: &str| {
        backend.run(|| process::stdout(Command::new("nft").arg(rules))).expect("it works");
    };
    // The way is known to work: a later connection would leave its sockets at once.
    let _first = forwarding.connect_offloaded(1);
    let offloads = agent.metric("forwarder_offloads_total");
    let retransmitted = backend.counter("TCPSynRetrans").expect("a counter");
    // The endpoint hears of the connection a second after the client's handshake with the node, and of its completion
    // not at all.
    nft("add table ip deaf; \
         add chain ip deaf acks { type filter hook prerouting priority -300; }; \
         add chain ip deaf syns { type filter hook prerouting priority -200; }; \
         add rule ip deaf syns tcp dport 5000 tcp flags & (syn|ack) == syn drop; \
         add rule ip deaf acks tcp dport 5000 tcp flags & (syn|ack|fin|psh|rst) == ack drop");
    let stream = forwarding.connect().expect("connect");
    nft("flush chain ip deaf syns");
    wait_until("it is offloaded", WAIT, || agent.metric("forwarder_offloads_total") > offloads);
    wait_until("the endpoint repeats its SYN", WAIT, || {
        backend.counter("TCPSynRetrans").is_ok_and(|count| count > retransmitted)
    });
    nft("delete table ip deaf");

    stream.set_read_timeout(Some(WAIT)).expect("it works");
    client::ping(&stream, b"first").expect("an echo");
    assert_eq!(backend.counter("TSEcrRejected").unwrap_or_default(), 0, "the endpoint refused segments");
    forwarding.offload(&[stream]);
}
