//! Tests of what is found and removed of dead agents; see [`crate::programs::cleanup`].

use super::*;
use crate::maps::versions::programs_folder;
use crate::programs::attach::Stay;
use crate::programs::cleanup::{Leftover, find};

#[test]
fn the_filters_of_a_killed_agent_are_found_and_removed_and_no_others() {
    let (Some(bpffs), Some(other)) = (bpffs(), bpffs()) else { return };
    in_namespace(|namespace| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let interfaces = interfaces();
        let found = || runtime.block_on(find(&bpffs.options().pin_dir)).unwrap().leftovers;
        assert!(found().is_empty(), "{:?}", found());

        let mut agents = [&bpffs, &other].map(|bpffs| {
            let mut bpf = Bpf::load(&bpffs.options()).unwrap();
            let links = bpf.pins.links().unwrap();
            bpf.attachments = Attachments::new(AttachKind::Clsact, Stay::Programs(links));
            for name in [PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP] {
                load_program(&mut bpf.ebpf, name).unwrap();
            }
            assert!(bpf.attach(&interfaces, &BTreeSet::from([BindAddress::Any])).is_empty());
            bpf
        });
        assert_eq!(filters(namespace, "lo"), 2);
        let [killed, _running] = &mut agents;
        killed.attachments.leave();
        killed.pins.leave();
        let pinned = programs_folder(killed.pin_dir());
        let [killed, running] = agents;
        drop(killed);

        // By their pins; and where these are lost, by the maps that they use.
        let ours = |found: &[Leftover]| found.iter().filter(|one| matches!(one, Leftover::Filter(_))).count();
        assert_eq!(ours(&found()), 2, "{:?}", found());
        fs::remove_dir_all(pinned.join("links")).unwrap();
        let leftovers = found();
        assert_eq!(ours(&leftovers), 2, "{leftovers:?}");
        for leftover in &leftovers {
            leftover.remove().unwrap();
        }
        assert_eq!(filters(namespace, "lo"), 1);
        assert!(found().is_empty());
        assert!(leftovers[0].remove().is_err());
        running.close();
        assert_eq!(filters(namespace, "lo"), 0);
    });
}
