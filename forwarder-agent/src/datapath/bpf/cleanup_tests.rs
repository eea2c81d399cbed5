//! Tests of what is found and removed of dead agents; see [`super::super::cleanup`].

use super::super::super::cleanup::{Leftover, Side, find};
use super::*;

#[test]
fn the_filters_of_a_killed_agent_are_found_and_removed() {
    let Some(bpffs) = bpffs() else { return };
    in_namespace(|namespace| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let interfaces = runtime.block_on(async { watch().await.unwrap().0.borrow().clone() });
        let found = || runtime.block_on(find(&bpffs.options().pin_dir)).unwrap();
        assert!(found().leftovers.is_empty(), "{:?}", found());

        let mut dead = unpinned();
        let mut attachments = Attachments::new(AttachKind::Clsact, None);
        assert!(attachments.update(&mut dead, &interfaces, &[&interfaces[0]]).is_empty());
        std::mem::forget(attachments);
        assert_eq!(filters(namespace, "lo"), 1);

        let leftovers = found().leftovers;
        let filter =
            Leftover::Filter { interface: "lo".to_owned(), side: Side::Ingress, program: PROGRAM_ETHERNET };
        assert_eq!(leftovers, [filter]);
        leftovers[0].remove().unwrap();
        assert_eq!(filters(namespace, "lo"), 0);
        assert!(found().leftovers.is_empty());
        assert!(leftovers[0].remove().is_err());
    });
}
