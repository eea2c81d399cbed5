//! Direct listeners: tells the programs which endpoints they may choose, and says why where they may not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::state::AgentState;
use forwarder_dataplane::listener::{BoundListener, RouteSnapshot};
use forwarder_dataplane::offload::tc::Offloader;
use forwarder_dataplane::reconciler::{InForce, SocketState};
use forwarder_dataplane::relay::Tier;
use forwarder_dataplane::upstream::ConnectSettings;
use forwarder_gateway::model::{Datapath, ListenerKey};
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::flows::targets::{DirectRefusal, Share, Targets};
use forwarder_kernel::maps::{DatapathError, ListenerId};

/// What the weight of a backend is multiplied with, so that it can be shared by most numbers of endpoints without a rest.
const PARTS: u64 = 720_720;

/// The direct listeners.
pub(super) struct DirectListeners {
    offloader: Arc<Offloader>,
    targets: Targets,
    connect: ConnectSettings,
    /// The listeners that lead programs to endpoints, and where to.
    leading: BTreeMap<ListenerKey, (ListenerId, [u64; 2])>,
    /// Those of which the interface of an endpoint had no programs, the last time.
    unattached: BTreeSet<ListenerId>,
    was_on: bool,
    is_settled: bool,
    has_failed: bool,
}

impl DirectListeners {
    /// None yet; `None` where there may be none.
    ///
    /// # Errors
    /// The maps cannot be opened.
    pub(super) fn open(
        offloader: &Arc<Offloader>,
        pin_dir: &std::path::Path,
        connect: ConnectSettings,
    ) -> Result<Option<Self>, DatapathError> {
        if offloader.flows.room_for_direct() == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            offloader: Arc::clone(offloader),
            targets: Targets::open(pin_dir)?,
            connect,
            leading: BTreeMap::new(),
            unattached: BTreeSet::new(),
            was_on: true,
            is_settled: false,
            has_failed: false,
        }))
    }

    /// Has the programs know what is in force now, and the paths to it; yields the listeners that are to be direct, and why those are
    /// not that are not.
    pub(super) fn update(&mut self, shared: &AgentState) -> BTreeMap<ListenerKey, Result<bool, String>> {
        let flows = &self.offloader.flows;
        let has_begun = flows.begin_direct();
        if let Err(error) = self.targets.set_links(flows) {
            if !std::mem::replace(&mut self.has_failed, true) {
                tracing::warn!(%error, "cannot tell the programs by which interfaces answers may leave: clients behind those that are missing have their connections accepted");
            }
        } else {
            self.has_failed = false;
        }
        let (is_on, ports) = (shared.toggles.is_on(Tier::Direct), self.connect.ports.of_direct());
        let (wanted, unchecked) = {
            let in_force = shared.in_force();
            let (wanted, datapath) = (wanted(&in_force), in_force.datapath.as_ref());
            let is_unchecked = |id| datapath.is_none_or(|datapath| !datapath.are_clients_checked(id));
            let ids = wanted.iter().map(|(_, bound)| bound.id);
            let unchecked: BTreeSet<_> = ids.filter(|id| is_unchecked(*id)).collect();
            (wanted, unchecked)
        };
        let mut told = BTreeMap::new();
        let mut leading = BTreeMap::new();
        // Not while what is in force is locked: the kernel is asked for routes.
        for (key, bound) in &wanted {
            let words = match (&ports, has_begun) {
                _ if !is_on => Err("an operator has switched the tier off".to_owned()),
                // In a moment.
                (_, Some(false)) => Ok([0; 2]),
                (_, None) => Err("programs of a former agent still hang on an interface; the log says why they cannot be replaced".to_owned()),
                _ if unchecked.contains(&bound.id) => Err("the programs do not know which clients it lets in; the log says why".to_owned()),
                (None, _) => Err("there are no local ports of its own: see --source-ports".to_owned()),
                (Some(ports), Some(true)) => self.set(bound.id, &bound.serving.load_full(), ports),
            };
            let words = words.unwrap_or_else(|reason| {
                told.insert(*key, Err(reason));
                [0; 2]
            });
            told.entry(*key).or_insert(Ok(words != [0; 2]));
            leading.insert(*key, (bound.id, words));
        }
        leading.retain(|_, (_, words)| *words != [0; 2]);
        let mut in_force = shared.in_force();
        for (key, (id, words)) in &leading {
            if !write(&mut in_force, *key, *id, *words) {
                told.insert(*key, Ok(false));
            }
        }
        for (key, (id, _)) in std::mem::take(&mut self.leading) {
            if leading.get(&key).is_none_or(|(leading, _)| *leading != id) {
                write(&mut in_force, key, id, [0; 2]);
            }
        }
        drop(in_force);
        self.targets.keep(|id| leading.values().any(|(leading, _)| *leading == id));
        self.targets.settle();
        (self.leading, self.was_on) = (leading, is_on);
        self.is_settled = !self.has_failed && told.values().all(|told| *told == Ok(true));
        told
    }

    /// Whether nothing is to be done until something changes that somebody tells of.
    pub(super) fn is_settled(&self, shared: &AgentState) -> bool {
        self.is_settled && self.was_on == shared.toggles.is_on(Tier::Direct)
    }

    /// Writes the endpoints of a listener; none where that is to be tried again in a moment.
    fn set(
        &mut self,
        id: ListenerId,
        serving: &RouteSnapshot,
        ports: &RangeInclusive<u16>,
    ) -> Result<[u64; 2], String> {
        let shares = shares(serving, &self.connect.source_addresses)?;
        match self.targets.set(&self.offloader.flows, id, &shares, ports) {
            // Programs were asked for on the interface just now: who attaches them tells, or says why not.
            Err(DirectRefusal::Endpoint { reason: FallbackReason::NotAttached, .. })
                if self.unattached.insert(id) =>
            {
                Ok([0; 2])
            }
            Err(refusal) => Err(refusal.to_string()),
            Ok(words) => {
                self.unattached.remove(&id);
                Ok(words)
            }
        }
    }
}

/// The listeners that are to be direct, and are bound.
fn wanted(in_force: &InForce) -> Vec<(ListenerKey, Arc<BoundListener>)> {
    let bound = in_force.sockets.iter().filter_map(|(key, state)| match state {
        SocketState::Bound(bound) => Some((*key, Arc::clone(bound))),
        SocketState::Failed(_) => None,
    });
    bound.filter(|(_, bound)| bound.serving.load().listener.settings.datapath == Datapath::Direct).collect()
}

/// The shares of a listener's endpoints: each once for each of the node's addresses to connect from.
///
/// # Errors
/// A share of its connections leads nowhere: a program does not reset, but a socket's connections are.
fn shares(serving: &RouteSnapshot, sources: &[IpAddr]) -> Result<Vec<Share>, String> {
    let Some(route) = &serving.listener.route else { return Err("it has no route".to_owned()) };
    let mut shares = Vec::new();
    for (backend, upstream) in
        route.backends.iter().zip(&serving.upstreams).filter(|(backend, _)| backend.weight > 0)
    {
        let Some(upstream) = upstream else {
            return Err("one of its backends is invalid, whose share of connections is reset".to_owned());
        };
        let endpoints = Arc::clone(upstream.endpoints.load().eligible());
        if endpoints.is_empty() {
            return Err(format!("its backend {} has no endpoint", upstream.key));
        }
        for endpoint in endpoints.iter().copied() {
            let sources = sources.iter().filter(|source| source.is_ipv4() == endpoint.is_ipv4());
            let mut sources: Vec<_> = sources.map(|source| Some(*source)).collect();
            if sources.is_empty() {
                sources.push(None);
            }
            let share = u64::from(backend.weight) * PARTS / endpoints.len() as u64 / sources.len() as u64;
            shares.extend(sources.into_iter().map(|source| Share { endpoint, source, share }));
        }
    }
    Ok(shares)
}

/// Has programs find the endpoints of a listener; tells whether they do.
fn write(in_force: &mut InForce, key: ListenerKey, id: ListenerId, words: [u64; 2]) -> bool {
    let Some(datapath) = &mut in_force.datapath else { return false };
    match datapath.set_targets(key, id, words) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, listener = %key, "cannot tell the programs where a direct listener leads: its connections are accepted, or go where they went");
            false
        }
    }
}
