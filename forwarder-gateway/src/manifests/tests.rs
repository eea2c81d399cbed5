use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn name(index: u16) -> NamespacedName {
    NamespacedName::new("default", format!("s-{index:04}"))
}

fn slices(version: u8) -> EndpointSlices {
    let slice = EndpointSlice { address_type: version.to_string(), ..EndpointSlice::default() };
    [("a".to_owned(), Arc::new(slice))].into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two sets that share most of a tree of several levels, compared by entry.
    #[test]
    fn a_change_is_what_differs_between_all_entries(
        size in 0..3000_u16,
        batches in vec(vec((0..3100_u16, prop::option::weighted(0.8, 0..3_u8)), 0..20), 1..8),
    ) {
        let mut current = Manifests::default();
        for index in 0..size {
            current.endpoint_slices.insert(name(index), slices(0));
        }
        for batch in batches {
            let before = current.clone();
            for (index, version) in batch {
                match version {
                    Some(version) => drop(current.endpoint_slices.insert(name(index), slices(version))),
                    None => drop(current.endpoint_slices.remove(&name(index))),
                }
            }
            let (old, new) = (&before.endpoint_slices, &current.endpoint_slices);
            let differs = |service: &&NamespacedName| {
                let version = |all: &OrdMap<NamespacedName, EndpointSlices>| {
                    all.get(*service).map(|slices| slices["a"].address_type.clone())
                };
                version(old) != version(new)
            };
            let differing: BTreeSet<_> = old.keys().chain(new.keys()).filter(differs).cloned().collect();
            prop_assert_eq!(before == current, differing.is_empty());
            prop_assert_eq!(before.change_to(&current), Change::Endpoints(differing));
        }
    }
}
