//! Listeners that ask for a tier which this node does not have.

use std::collections::BTreeMap;

use super::list;
use crate::model::{Datapath, ListenerKey, ListenerParent, Listeners};
use crate::problem::{Problem, Reason};

/// Why tiers of the kernel do not work on this node, each as a sentence without a final period. `None` for one that works, and for one
/// that nobody has tried.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MissingTiers {
    /// Tier `tc`.
    pub tc: Option<String>,
    /// Tier `sockmap`.
    pub sockmap: Option<String>,
    /// Tier `direct`.
    pub direct: Option<String>,
    /// Why tier `direct`, which works here, does not serve listeners that ask for it.
    pub refused_direct: BTreeMap<ListenerKey, String>,
}

impl MissingTiers {
    /// Why there is no tier `tc` for a listener that asks for it by annotation, if the agent's own setting is another tier.
    pub const UNPREPARED: &str = "the agent's own --datapath is another tier, so that it has no map of pairs; start it with --datapath auto, and \
                                  name other tiers in annotations";

    /// Why there is no tier `direct` for a listener that asks for it by annotation, if the agent has not made room for it.
    pub const NO_ROOM_FOR_DIRECT: &str = "the agent has made no room for direct connections; start it with --max-direct, and with --datapath auto, tc or \
                                          direct";

    /// A warning for each Gateway and ListenerSet with listeners that ask for a missing tier by its name. They are served all the same, at
    /// another tier; who asks for `auto` leaves the choice to the agent, and is told nothing.
    pub fn problems(&self, listeners: &Listeners) -> Vec<Problem> {
        if *self == Self::default() {
            return Vec::new();
        }
        let mut asking: BTreeMap<(&ListenerParent, &str, &str), Vec<&str>> = BTreeMap::new();
        for (key, listener) in listeners {
            let reason = match listener.settings.datapath {
                Datapath::Tc => self.tc.as_deref(),
                Datapath::Sockmap => self.sockmap.as_deref(),
                Datapath::Direct => {
                    self.direct.as_deref().or_else(|| self.refused_direct.get(key).map(String::as_str))
                }
                Datapath::Auto | Datapath::Splice | Datapath::Copy => None,
            };
            if let Some(reason) = reason {
                let tier = listener.settings.datapath.as_str();
                let name = listener.name.section.as_str();
                let names = asking.entry((&listener.name.parent, tier, reason)).or_default();
                // One that is bound at several addresses is one listener.
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        let problem = |((parent, tier, reason), names): ((&ListenerParent, &str, &str), Vec<&str>)| {
            let (listeners, ask) = if names.len() == 1 { ("listener", "asks") } else { ("listeners", "ask") };
            let instead = if tier == Datapath::Direct.as_str() {
                "accepted, as with `auto`,"
            } else {
                "forwarded at tier splice"
            };
            let message = format!(
                "{listeners} {} {ask} for tier {tier}, which does not work on this node: {reason}; connections are {instead} instead",
                list(&names)
            );
            // By annotation, or by a setting of the agent: no field of the object has to be wrong.
            Problem::warning(Reason::TierUnavailable, parent.object(), "", message)
        };
        asking.into_iter().map(problem).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;
    use std::sync::Arc;

    use super::*;
    use crate::manifests::NamespacedName;
    use crate::model::{BindAddress, Listener, ListenerKey, ListenerName, ListenerSettings};

    fn listeners(wanted: &[(&str, u16, Datapath)]) -> Listeners {
        let listener = |(section, port, datapath): &(&str, u16, Datapath)| {
            let key = ListenerKey { address: BindAddress::Any, port: NonZeroU16::new(*port).unwrap() };
            let parent = ListenerParent::Gateway(NamespacedName::new("db", "gw"));
            let name = ListenerName { parent, section: (*section).to_owned() };
            let settings = ListenerSettings { datapath: *datapath, ..ListenerSettings::default() };
            (key, Arc::new(Listener { name, settings, route: None }))
        };
        wanted.iter().map(listener).collect()
    }

    #[test]
    fn who_asks_for_a_missing_tier_by_name_is_told_why_it_is_missing() {
        let listeners = listeners(&[
            ("a", 1, Datapath::Tc),
            ("b", 2, Datapath::Auto),
            ("c", 3, Datapath::Tc),
            ("d", 4, Datapath::Sockmap),
        ]);
        let missing = MissingTiers { tc: Some("no BTF".to_owned()), ..MissingTiers::default() };
        let problems: Vec<String> = missing.problems(&listeners).iter().map(ToString::to_string).collect();
        let expected = "Gateway db/gw: listeners a, c ask for tier tc, which does not work on this node: no BTF; connections \
                        are forwarded at tier splice instead (TierUnavailable)";
        assert_eq!(problems, [expected]);
        assert_eq!(MissingTiers::default().problems(&listeners), []);
        let sockmap = MissingTiers { sockmap: Some("an old kernel".to_owned()), ..missing };
        assert_eq!(sockmap.problems(&listeners).len(), 2);
    }

    #[test]
    fn a_listener_that_cannot_be_direct_is_told_why() {
        let listeners = listeners(&[("a", 1, Datapath::Direct), ("b", 2, Datapath::Direct)]);
        let refused_direct =
            BTreeMap::from([(*listeners.keys().next().unwrap(), "it has no route".to_owned())]);
        let missing = MissingTiers { refused_direct, ..MissingTiers::default() };
        let [problem] = &missing.problems(&listeners)[..] else { panic!("one problem") };
        let expected = "listener a asks for tier direct, which does not work on this node: it has no route; connections are accepted, as \
                        with `auto`, instead";
        assert_eq!(problem.message, expected);
        let missing = MissingTiers { direct: Some(MissingTiers::NO_ROOM_FOR_DIRECT.to_owned()), ..missing };
        let [problem] = &missing.problems(&listeners)[..] else { panic!("one problem") };
        assert!(problem.message.starts_with("listeners a, b ask for tier direct"), "{}", problem.message);
    }

    #[test]
    fn a_listener_at_two_addresses_is_named_once() {
        let listeners = listeners(&[("a", 1, Datapath::Tc), ("a", 2, Datapath::Tc)]);
        let missing = MissingTiers { tc: Some("no BTF".to_owned()), ..MissingTiers::default() };
        let [problem] = &missing.problems(&listeners)[..] else { panic!("one problem") };
        assert!(problem.message.starts_with("listener a asks for tier tc"), "{}", problem.message);
    }
}
