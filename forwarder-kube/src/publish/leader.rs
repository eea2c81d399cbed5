//! Which of the agents writes the statuses: the one that holds a Lease.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use kube_lease_manager::LeaseManagerBuilder;
use tokio::sync::watch;

use super::Identity;
use forwarder_runtime::error::one_line;

/// How long the Lease holds without being renewed, in seconds, and how long before its end it is renewed.
const DURATION: u64 = 15;
const GRACE: u64 = 5;
/// How long to wait where the Lease cannot be had at all.
const RETRY: Duration = Duration::from_secs(5);

/// Takes part in the election as long as somebody wants to know the result.
pub(super) fn elect(client: Client, identity: Arc<Identity>) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        let mut has_failed = false;
        loop {
            tokio::select! {
                () = sender.closed() => return,
                failure = take_part(&client, &identity, &sender) => {
                    sender.send_replace(false);
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(
                            error = failure,
                            "cannot take part in the election of the agent that writes statuses, which may be out of date meanwhile; traffic is not \
                             affected; trying again"
                        );
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    });
    receiver
}

/// Takes part until that fails; yields why.
async fn take_part(client: &Client, identity: &Identity, sender: &watch::Sender<bool>) -> String {
    let manager = LeaseManagerBuilder::new(client.clone(), lease_name(identity))
        .with_namespace(&identity.namespace)
        .with_identity(identity.holder())
        .with_duration(DURATION)
        .with_grace(GRACE)
        .build()
        .await;
    let manager = match manager {
        Ok(manager) => manager,
        Err(error) => return one_line(&error),
    };
    let (mut states, task) = manager.watch().await;
    loop {
        let is_leader = *states.borrow_and_update();
        if sender.send_if_modified(|before| std::mem::replace(before, is_leader) != is_leader) {
            tracing::info!(
                is_leader,
                lease = lease_name(identity),
                "election of the agent that writes statuses"
            );
        }
        let has_ended = tokio::select! {
            changed = states.changed() => changed.is_err(),
            lost = lost(client, identity, is_leader) => return lost,
        };
        if has_ended {
            drop(states);
            return match task.await {
                Ok(Ok(_)) => "the election ended".to_owned(),
                Ok(Err(error)) => one_line(&error),
                Err(error) => error.to_string(),
            };
        }
    }
}

/// Waits until the Lease is not what the election takes it for: it is not made again once it has been deleted, and who
/// holds it goes on to believe so.
async fn lost(client: &Client, identity: &Identity, is_leader: bool) -> String {
    let leases = Api::<Lease>::namespaced(client.clone(), &identity.namespace);
    loop {
        tokio::time::sleep(Duration::from_secs(DURATION)).await;
        // An API server that does not answer has not given the Lease to anybody else.
        let Ok(lease) = leases.get_opt(&lease_name(identity)).await else { continue };
        let Some(lease) = lease else { return "the Lease was deleted".to_owned() };
        let holder = lease.spec.and_then(|spec| spec.holder_identity);
        if is_leader && holder.as_ref() != Some(&identity.holder()) {
            return format!("the Lease is held by {}", holder.unwrap_or_default());
        }
    }
}

fn lease_name(identity: &Identity) -> String {
    format!("forwarder-{}", identity.installation())
}
