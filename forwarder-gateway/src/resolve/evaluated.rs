//! What the passes find out about Gateways, ListenerSets and their listeners.

use std::collections::HashMap;
use std::num::NonZeroU16;

use crate::manifests::{Gateway, Kind, Listener, ListenerSet, Manifests, NamespacedName, Refused};
use crate::model::{ListenerName, ListenerParent, ListenerSettings};
use crate::problem::{Location, Problem, Reason};
use crate::status::list;

use super::addresses::Addresses;
use super::namespaces::AllowedNamespaces;

/// A Gateway of ours.
pub(super) struct EvaluatedGateway<'a> {
    pub(super) name: &'a NamespacedName,
    pub(super) gateway: &'a Gateway,
    /// Why it is not accepted as a whole; then none of its listeners is served.
    pub(super) rejection: Option<Rejection>,
    pub(super) addresses: Addresses,
    /// From which namespaces it takes ListenerSets.
    pub(super) allowed_listeners: AllowedNamespaces<'a>,
    /// The listeners of its own spec.
    pub(super) own: Listeners<'a>,
    /// The ListenerSets that name it, taken or not, oldest first.
    pub(super) sets: Vec<EvaluatedSet<'a>>,
}

impl<'a> EvaluatedGateway<'a> {
    /// Its own listeners, then each of its ListenerSets, as [`Place::set`] tells them.
    pub(super) fn parts(&self) -> impl Iterator<Item = Option<usize>> + use<> {
        std::iter::once(None).chain((0..self.sets.len()).map(Some))
    }

    /// Its own listeners, or those of one of its ListenerSets.
    pub(super) fn listeners(&self, set: Option<usize>) -> Option<&Listeners<'a>> {
        match set {
            None => Some(&self.own),
            Some(set) => self.sets.get(set).map(|set| &set.listeners),
        }
    }

    /// As [`Self::listeners`].
    pub(super) fn listeners_mut(&mut self, set: Option<usize>) -> Option<&mut Listeners<'a>> {
        match set {
            None => Some(&mut self.own),
            Some(set) => self.sets.get_mut(set).map(|set| &mut set.listeners),
        }
    }

    /// Whether its own listeners, or those of a ListenerSet, can be bound, as far as it depends on the Gateway.
    ///
    /// Whether a ListenerSet is served does not depend on the Gateway's own listeners, valid or not.
    pub(super) fn is_servable(&self, set: Option<usize>) -> bool {
        let is_refused = set.is_some_and(|set| self.sets.get(set).is_none_or(|set| set.rejection.is_some()));
        self.rejection.is_none() && !self.addresses.bind.is_empty() && !is_refused
    }

    /// The listeners that are to be bound, with their indices.
    pub(super) fn served_listeners(
        &self,
        set: Option<usize>,
    ) -> impl Iterator<Item = (usize, &EvaluatedListener<'a>)> {
        let listeners = self.listeners(set).filter(|_| self.is_servable(set));
        let listeners = listeners.map_or(&[][..], |listeners| &listeners.all);
        listeners.iter().enumerate().filter(|(_, listener)| listener.is_servable())
    }

    /// The listeners that are to be bound and that no route has attached to.
    pub(super) fn without_route(&self, manifests: &Manifests) -> impl Iterator<Item = Problem> {
        let all = self.parts().flat_map(|set| self.served_listeners(set));
        all.filter(|(_, listener)| listener.routes.is_empty()).map(|(index, listener)| {
            let (name, object) = (&listener.name.section, listener.name.parent.object());
            let refused = manifests.refused_that_refer_to(Kind::TcpRoute, &object);
            let refused: Vec<String> =
                refused.map(|(route, Refused { location, .. })| format!("{route} ({location})")).collect();
            let what = format!("listener {name} has no route");
            let reset = "its connections are reset";
            let (reason, message) = match (refused.as_slice(), manifests.unread.first()) {
                ([], None) => {
                    (Reason::NoRoute, format!("{what}: {reset}; name it in the parentRefs of a TCPRoute"))
                }
                ([], Some(location)) => (
                    Reason::Refused,
                    format!("{what}, unless it stands in what cannot be read ({location}): {reset} until that is corrected"),
                ),
                ([one], _) => {
                    (Reason::Refused, format!("{what}, and {one} is refused: {reset} until that is corrected"))
                }
                (more, _) => (
                    Reason::Refused,
                    format!("{what}, and {} are refused: {reset} until that is corrected", list(more)),
                ),
            };
            Problem::warning(reason, object, format!("spec.listeners[{index}]"), message)
        })
    }
}

/// A ListenerSet of a Gateway of ours.
pub(super) struct EvaluatedSet<'a> {
    pub(super) set: &'a ListenerSet,
    /// Why the Gateway does not take it, as a sentence; then none of its listeners is served.
    pub(super) rejection: Option<String>,
    pub(super) listeners: Listeners<'a>,
}

/// The listeners of one Gateway or ListenerSet.
pub(super) struct Listeners<'a> {
    pub(super) parent: ListenerParent,
    /// One for each listener of the spec, in its order.
    pub(super) all: Vec<EvaluatedListener<'a>>,
    /// Indices of listeners by name.
    pub(super) by_section: HashMap<&'a str, Vec<usize>>,
    /// Indices of listeners by port.
    pub(super) by_port: HashMap<i64, Vec<usize>>,
}

impl Listeners<'_> {
    /// Where the first listener is refused whose name cannot be told, or is that of another one.
    pub(super) fn doubtful(&self) -> Option<&Location> {
        let is_alone = |name: &str| self.by_section.get(name).is_some_and(|all| all.len() == 1);
        let mut doubtful = self.all.iter().filter(|it| it.spec.name.is_empty() || !is_alone(&it.spec.name));
        doubtful.find_map(|it| it.spec.refused.as_ref())
    }

    /// Whether two listeners have one name.
    pub(super) fn have_same_name(&self, one: usize, other: usize) -> bool {
        let name = |index| self.all.get(index).map(|listener: &EvaluatedListener<'_>| &listener.spec.name);
        name(one) == name(other)
    }
}

/// A listener of a Gateway of ours, or of one of its ListenerSets.
pub(super) struct EvaluatedListener<'a> {
    pub(super) spec: &'a Listener,
    pub(super) name: ListenerName,
    /// Its port; `None` where the spec's is out of range, which is a reason to refuse it.
    pub(super) port: Option<NonZeroU16>,
    /// Why it is not accepted.
    pub(super) rejection: Option<Rejection>,
    /// Which listeners of the Gateway and its ListenerSets it cannot share its port with, as a sentence.
    pub(super) conflict: Option<String>,
    pub(super) kinds: RouteKinds,
    pub(super) namespaces: AllowedNamespaces<'a>,
    pub(super) settings: ListenerSettings,
    /// The attached routes, oldest first: indices into the list of routes.
    pub(super) routes: Vec<usize>,
}

impl EvaluatedListener<'_> {
    pub(super) fn is_tcp(&self) -> bool {
        self.spec.protocol == "TCP"
    }

    /// Whether it is to be bound, as far as it depends on the listener. One that no kind of route can attach to is
    /// not: it could only reset connections.
    pub(super) fn is_servable(&self) -> bool {
        self.rejection.is_none() && self.conflict.is_none() && self.kinds.tcp_route
    }
}

/// Which kinds of routes a listener takes.
pub(super) struct RouteKinds {
    /// Whether TCPRoute is among them: no other kind can be.
    pub(super) tcp_route: bool,
    /// Kinds that were named and cannot be served, as a sentence.
    pub(super) invalid: Option<String>,
}

/// Where some listeners are found: at a Gateway, or at a ListenerSet of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The index of the Gateway.
    pub(super) gateway: usize,
    /// The index of the ListenerSet among those of the Gateway; `None` for the Gateway's own listeners.
    pub(super) set: Option<usize>,
}

/// Why something is not accepted.
#[derive(Clone, Debug)]
pub(super) struct Rejection {
    pub(super) reason: Reason,
    /// The sentence of the problem.
    pub(super) message: String,
}

impl Rejection {
    /// The reason as it stands in conditions: the Gateway API knows fewer than there are problems.
    pub(super) fn condition_reason(&self) -> &'static str {
        match self.reason {
            Reason::Invalid => Reason::UnsupportedValue.as_str(),
            reason => reason.as_str(),
        }
    }
}
