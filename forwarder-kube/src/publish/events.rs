//! Events of objects, for people: `kubectl describe` shows them.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::Instant;

use super::Identity;
use super::patch::Warning;
use crate::watch::{ObservedObject, Served};
use forwarder_gateway::manifests::ObjectRef;
use forwarder_runtime::error::one_line;

/// Tells events, in bounds.
pub(super) struct Events {
    recorder: Recorder,
    allowance: Allowance,
}

impl Events {
    pub(super) fn new(client: Client, identity: &Identity) -> Self {
        let reporter =
            Reporter { controller: identity.controller.clone(), instance: Some(identity.holder()) };
        let allowance = Allowance { left: Allowance::MOST, since: Instant::now() };
        Self { recorder: Recorder::new(client, reporter), allowance }
    }

    /// Tells people, by events of the object, which conditions have turned bad.
    pub(super) fn tell(
        &mut self,
        id: &ObjectRef,
        record: &ObservedObject,
        warnings: Vec<Warning>,
        served: &Served,
    ) {
        let resource = served.values().find(|resource| resource.kind == id.kind);
        let reference = ObjectReference {
            api_version: resource.map(|resource| resource.api_version.clone()),
            kind: Some(id.kind.clone()),
            namespace: Some(id.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            name: Some(id.name.clone()),
            uid: Some(record.uid.clone()),
            ..ObjectReference::default()
        };
        for Warning { reason, message } in warnings {
            if !self.allowance.take() {
                tracing::debug!(object = %id, reason, "too many events: this one is in the status only");
                continue;
            }
            let (recorder, reference) = (self.recorder.clone(), reference.clone());
            tokio::spawn(async move {
                let note = Some(message).filter(|message| !message.is_empty());
                let event = Event {
                    type_: EventType::Warning,
                    reason,
                    note,
                    action: "Configure".to_owned(),
                    secondary: None,
                };
                if let Err(error) = recorder.publish(&event, &reference).await {
                    tracing::debug!(error = one_line(&error), "an event was not recorded");
                }
            });
        }
    }
}

/// How many events may be told: some at once, and then one a second.
#[derive(Debug)]
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    const MOST: u32 = 50;

    fn take(&mut self) -> bool {
        let seconds = self.since.elapsed().as_secs();
        self.since += Duration::from_secs(seconds);
        let more = u32::try_from(seconds).unwrap_or(Self::MOST);
        self.left = self.left.saturating_add(more).min(Self::MOST);
        let is_left = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}
