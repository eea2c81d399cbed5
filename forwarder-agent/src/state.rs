//! The state of a running agent, as the admin endpoint and the metrics read it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::report::Report;
use crate::settings::AdminSettings;
use crate::view;
use forwarder_dataplane::counters::{Counter, ListenerCounters, PerWorker, WorkerCounters};
use forwarder_dataplane::live::LiveConnections;
use forwarder_dataplane::offload::sockmap::SockmapPairs;
use forwarder_dataplane::offload::tier_toggles::TierToggles;
use forwarder_dataplane::reconciler::{InForce, SharedInForce, SocketState};
use forwarder_dataplane::relay::Tier;
use forwarder_dataplane::view::{DatapathTiers, TierState, TierView};
use forwarder_gateway::model::Datapath;
use forwarder_gateway::problem::Severity;
use forwarder_gateway::status::MissingTiers;
use forwarder_kube::publish::PublishHealth;
use forwarder_kube::watch::KubeHealth;
use forwarder_runtime::lock::lock;

/// How reading from a Kubernetes API, and writing to it, go.
#[derive(Debug)]
pub struct ClusterHealth {
    /// How the reading goes.
    pub source: Arc<KubeHealth>,
    /// How the writing goes.
    pub publish: Arc<PublishHealth>,
}

/// What the admin endpoint reads.
pub struct AgentState {
    /// Listeners, routes and endpoints in force.
    pub in_force: SharedInForce,
    /// What the input amounts to.
    pub report: Mutex<Report>,
    /// What workers counted.
    pub worker_counters: Arc<PerWorker<WorkerCounters>>,
    /// The connections that are open.
    pub connections: LiveConnections,
    /// Which of the kernel's tiers take connections.
    pub toggles: Arc<TierToggles>,
    /// How it goes with the Kubernetes API, where that is the source.
    pub cluster: Option<ClusterHealth>,
    /// Whether there may be direct connections.
    pub has_direct: bool,
    /// Which ways into the admin endpoint are open.
    pub admin: AdminHealth,
}

impl AgentState {
    pub(crate) fn report(&self) -> MutexGuard<'_, Report> {
        lock(&self.report)
    }

    pub(crate) fn in_force(&self) -> MutexGuard<'_, InForce> {
        lock(&self.in_force)
    }

    /// Why the agent is not ready; empty if it is: every listener that can be programmed is bound.
    pub fn unready(&self) -> Vec<String> {
        let report = self.report();
        if report.draining {
            return vec!["the agent is draining".to_owned()];
        }
        if report.updates.full == 0 {
            let what = if self.cluster.is_some() { "the Kubernetes API has" } else { "the manifests have" };
            return vec![format!("{what} not been read yet")];
        }
        drop(report);
        let serves_nothing = self.in_force().table.listeners.is_empty();
        // In a cluster, somebody else's mistake must not make every agent look broken.
        if serves_nothing && self.cluster.is_none() {
            let problems = self.report().input.list();
            if let Some(error) = problems.iter().find(|problem| problem.severity == Severity::Error) {
                return vec![format!("nothing is served: {error}")];
            }
        }
        let failures = self.in_force().bind_failures();
        failures.iter().map(|failure| format!("listener {}: {}", failure.listener, failure.message)).collect()
    }

    /// The tiers that do not work here, and why.
    pub fn missing_tiers(&self) -> MissingTiers {
        let report = self.report();
        let tc = || match &report.datapath.tc_error {
            Some(error) => format!("{error} (`forwarder probe` says more)"),
            None => MissingTiers::UNPREPARED.to_owned(),
        };
        let direct = || match report.datapath.direct_error.as_ref().or(report.datapath.tc_error.as_ref()) {
            Some(error) => format!("{error} (`forwarder probe` says more)"),
            None => MissingTiers::NO_ROOM_FOR_DIRECT.to_owned(),
        };
        MissingTiers {
            tc: self.connections.pairs.is_none().then(tc),
            sockmap: report.datapath.sockmap_error.clone(),
            direct: (!self.has_direct).then(direct),
            refused_direct: report.refused_direct.clone(),
        }
    }

    /// The tiers that take connections into the kernel.
    pub fn tiers(&self) -> DatapathTiers {
        let (has_failed, sockmap_error, direct_error) = {
            let datapath = &self.report().datapath;
            (datapath.tc_error.is_some(), datapath.sockmap_error.clone(), datapath.direct_error.clone())
        };
        let (pairs, sockmap) = (&self.connections.pairs, self.connections.sockmap.get());
        let is_tc_wanted =
            || self.in_force().table.listeners.values().any(|it| it.settings.datapath == Datapath::Tc);
        // Nobody misses a tier that neither the agent nor a listener asks for.
        let tc_error = self.missing_tiers().tc.filter(|_| has_failed || is_tc_wanted());
        let state = |tier, is_available: Option<bool>| match is_available {
            None => TierState::Unused,
            Some(false) => TierState::Unavailable,
            Some(true) if self.toggles.is_on(tier) => TierState::On,
            Some(true) => TierState::Off,
        };
        let has_tc = pairs.is_some().then_some(true).or(tc_error.is_some().then_some(false));
        DatapathTiers {
            tiers: vec![
                TierView {
                    tier: Tier::Direct,
                    state: state(
                        Tier::Direct,
                        self.has_direct.then_some(true).or(direct_error.is_some().then_some(false)),
                    ),
                    connections: pairs.as_ref().map_or(0, |pairs| pairs.count_direct()),
                    reason: direct_error,
                },
                TierView {
                    tier: Tier::Tc,
                    state: state(Tier::Tc, has_tc),
                    connections: pairs
                        .as_ref()
                        .map_or(0, |pairs| pairs.count().saturating_sub(pairs.count_direct())),
                    reason: tc_error,
                },
                TierView {
                    tier: Tier::Sockmap,
                    state: state(Tier::Sockmap, sockmap.map(Result::is_ok)),
                    connections: self.connections.sockmap().map_or(0, SockmapPairs::count),
                    reason: sockmap_error,
                },
            ],
        }
    }

    /// The state, for people and programs.
    pub fn state(&self) -> view::State {
        let is_direct = self.report().direct.clone();
        let in_force = self.in_force();
        let failures = in_force.bind_failures();
        let listeners = in_force.table.listeners.iter().map(|(key, listener)| {
            let mut row = view::listener(*key, listener, &in_force.table);
            match in_force.sockets.get(key) {
                Some(SocketState::Bound(bound)) => {
                    let sum = |field: fn(&ListenerCounters) -> u64| Some(bound.counters.sum(field));
                    row.id = Some(bound.id.0);
                    row.bound = Some(true);
                    row.direct = is_direct.get(key).copied();
                    row.connections = sum(|own| own.accepted.get());
                    row.active = Some(bound.counters.active());
                    row.received_bytes = sum(|own| own.received_bytes.iter().map(Counter::get).sum());
                    row.sent_bytes = sum(|own| own.sent_bytes.iter().map(Counter::get).sum());
                }
                Some(SocketState::Failed(_)) | None => row.bound = Some(false),
            }
            row.error =
                failures.iter().find(|failure| failure.key == *key).map(|failure| failure.message.clone());
            row
        });
        let listeners = listeners.collect();
        drop(in_force);
        let report = self.report();
        view::State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listeners,
            problems: report.problems().iter().map(Into::into).collect(),
            datapath: Some(report.datapath.clone()),
            statuses: view::statuses(&report.statuses),
        }
    }
}

/// A way into the endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum By {
    /// A TCP port.
    Tcp,
    /// A socket in the file system.
    Socket,
}

impl By {
    /// Its name, as it stands in metrics and the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Socket => "socket",
        }
    }
}

/// Which ways into the admin endpoint are open.
#[derive(Debug)]
pub struct AdminHealth(Mutex<[Option<bool>; 2]>);

impl AdminHealth {
    /// Nothing is open yet of what the settings ask for.
    pub(crate) fn new(settings: &AdminSettings) -> Self {
        let is_up = |is_wanted: bool| is_wanted.then_some(false);
        Self(Mutex::new([is_up(settings.address.is_some()), is_up(settings.socket.is_some())]))
    }

    /// Each way that is wanted, and whether it is open.
    pub fn ways(&self) -> impl Iterator<Item = (By, bool)> {
        let ways = *lock(&self.0);
        [By::Tcp, By::Socket].into_iter().zip(ways).filter_map(|(by, is_up)| Some((by, is_up?)))
    }

    pub(crate) fn set_up(&self, by: By) {
        let mut ways = lock(&self.0);
        if let Some(way) = ways.get_mut(by as usize) {
            *way = Some(true);
        }
    }
}
