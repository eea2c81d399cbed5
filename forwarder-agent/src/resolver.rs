//! Resolves what a source has loaded, with the settings of an agent.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::report::InputProblems;
use crate::settings::{Settings, SourceSettings};
use crate::view;
use forwarder_gateway::manifests::NamespacedName;
use forwarder_gateway::plan::Op;
use forwarder_gateway::resolve::{self, OwnSockets, ResolveSettings, Resolved};
use forwarder_source::Loaded;

/// Resolves what a source has loaded.
#[derive(Clone, Debug)]
pub struct Resolver(ResolveSettings);

/// What a source has loaded, resolved.
#[derive(Debug)]
pub struct Resolution {
    /// The result.
    pub resolved: Resolved,
    /// What is wrong.
    pub problems: InputProblems,
}

impl Resolver {
    /// A resolver without an agent.
    pub fn new(settings: ResolveSettings) -> Self {
        Self(settings)
    }

    /// A resolver for what the agent follows.
    pub(crate) fn of_agent(settings: &Settings) -> Self {
        let defaults = settings.listener_defaults.clone();
        let base = match settings.source {
            SourceSettings::Files { .. } => ResolveSettings::for_files(defaults),
            SourceSettings::Kube(_) => ResolveSettings::for_cluster(defaults),
        };
        Self(ResolveSettings {
            controller_name: settings.controller_name.clone(),
            listener_ports: settings.listener_ports.clone(),
            endpoint_addresses: settings.endpoint_addresses.clone(),
            own: OwnSockets { admin: settings.admin.address, ..OwnSockets::default() },
            ..base
        })
    }

    /// Sets by which addresses the node is reached; tells whether they are others than before.
    pub(crate) fn set_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let before = std::mem::replace(&mut self.0.own.addresses, addresses);
        before != self.0.own.addresses
    }

    /// Brings what was resolved up to date with what was loaded, which differs in the EndpointSlices of `services` alone.
    pub(crate) fn update_endpoints(
        &self,
        resolved: &mut Resolved,
        loaded: &Loaded,
        services: &BTreeSet<NamespacedName>,
    ) -> Vec<Op> {
        resolve::update_endpoints(resolved, &loaded.manifests, &self.0, services)
    }

    /// Resolves.
    pub fn resolve(&self, loaded: &Loaded) -> Resolution {
        let resolved = resolve::resolve(&loaded.manifests, &self.0);
        Resolution { problems: InputProblems::new(loaded, resolved.problems.clone()), resolved }
    }
}

impl Resolution {
    /// The state that an agent would have, without anything live.
    pub fn state(&self) -> view::State {
        let table = &self.resolved.table;
        view::State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listeners: table
                .listeners
                .iter()
                .map(|(key, listener)| view::listener(*key, listener, table))
                .collect(),
            problems: self.problems.list().iter().map(Into::into).collect(),
            datapath: None,
            statuses: view::statuses(&self.resolved.statuses),
        }
    }
}
