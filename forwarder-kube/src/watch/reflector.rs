//! One watch: lists the objects of a kind, follows their changes, and tells the store.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use kube::core::{DynamicObject, PartialObjectMeta, Resource};
use kube::discovery::ApiResource;
use kube::runtime::utils::{Backoff, ResetTimerBackoff};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::kinds;
use super::object::Received;
use super::records::ObservedObject;
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{Kind, Metadata, Namespace, ObjectRef, SERVICE_NAME_LABEL};
use forwarder_runtime::error::one_line;

/// How many objects one answer holds. A page is held as a whole while it is decoded, and a slice has up to 1,000
/// endpoints.
const PAGE: u32 = 250;
const PAGE_OF_SLICES: u32 = 50;

/// What one watch follows.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Scope {
    pub(super) kind: Kind,
    /// In this namespace only.
    pub(super) namespace: Option<String>,
}

/// What a watch tells.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) scope: Scope,
    /// Which of the watches that the scope has had, one after another.
    pub(super) epoch: u64,
    pub(super) news: News,
}

/// What has happened.
#[derive(Debug)]
pub(super) enum News {
    /// All objects will follow.
    ListBegins,
    /// An object is there, or has changed.
    Put(Box<Item>),
    /// An object is gone.
    Gone(ObjectRef),
    /// All objects have been told; what was not is gone.
    ListEnds,
    /// The API server did not answer as it should; it is asked again.
    Failed(WatchFailure),
}

/// An object.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) id: ObjectRef,
    pub(super) manifest: Result<Manifest, String>,
    pub(super) record: ObservedObject,
}

/// Why a watch does not go on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct WatchFailure {
    pub(super) message: String,
    /// The status code of the answer, if there was one.
    pub(super) code: Option<u16>,
}

/// Follows a scope until nobody listens.
pub(super) async fn reflect(
    client: Client,
    scope: Scope,
    resource: ApiResource,
    epoch: u64,
    messages: mpsc::Sender<Message>,
) {
    let teller = Teller { scope, epoch, messages };
    match teller.scope.kind {
        Kind::GatewayClass => teller.follow(client, resource, Manifest::GatewayClass).await,
        Kind::Gateway => teller.follow(client, resource, Manifest::Gateway).await,
        Kind::ListenerSet => teller.follow(client, resource, Manifest::ListenerSet).await,
        Kind::TcpRoute => teller.follow(client, resource, Manifest::TcpRoute).await,
        Kind::ReferenceGrant => teller.follow(client, resource, Manifest::ReferenceGrant).await,
        Kind::Service => teller.follow(client, resource, Manifest::Service).await,
        Kind::EndpointSlice => teller.follow(client, resource, Manifest::EndpointSlice).await,
        Kind::Namespace => {
            // Their labels are all that matters.
            let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(client, &resource);
            teller.tell(|| watcher(api.clone(), config(PAGE)), namespace).await;
        }
    }
}

/// The changes of the CRDs, by their metadata.
pub(super) fn crds(client: Client) -> mpsc::Receiver<watcher::Event<PartialObjectMeta<DynamicObject>>> {
    let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(client, &kinds::crds());
    events("CustomResourceDefinitions", move || watcher(api.clone(), config(PAGE)))
}

/// What a watch tells, tried again whenever it fails. It ends when nobody listens any more.
pub(crate) fn events<K, W>(
    what: &'static str,
    start: impl Fn() -> W + Send + 'static,
) -> mpsc::Receiver<watcher::Event<K>>
where
    K: Send + 'static,
    W: Stream<Item = watcher::Result<watcher::Event<K>>> + Send,
{
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut watch = std::pin::pin!(paced(start));
        let mut has_failed = false;
        while let Some(event) = watch.next().await {
            match event {
                Ok(event) => {
                    has_failed &= matches!(event, watcher::Event::Init);
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                Err(failure) => {
                    if failure.code != Some(410) && !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(
                            what,
                            error = failure.message,
                            "a watch of the Kubernetes API failed; trying again"
                        );
                    }
                }
            }
        }
    });
    receiver
}

/// The API server ends a watch after so many seconds, and it is begun again where it was. Silence for longer than that
/// means a dead connection: not every API server tells something in each minute where nothing changes.
pub(crate) const WATCH_SECONDS: u32 = 80;
/// A watch that is too old more than once in this time waits as after any other failure.
const EXPIRED_AGAIN: Duration = Duration::from_secs(30);

fn config(page: u32) -> watcher::Config {
    watcher::Config::default().page_size(page).timeout(WATCH_SECONDS)
}

/// From half a second to some ten, at random: hundreds of agents must not come back in one moment, nor minutes late.
fn backoff() -> impl Backoff {
    let delays = backon::ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        // The jitter is on top of it, and as large.
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times();
    ResetTimerBackoff::new(watcher::ExponentialBackoff::from(delays), Duration::from_mins(2))
}

/// What a watch tells. After a failure it waits before it goes on, and begins anew where it could not go on.
fn paced<K, W>(start: impl Fn() -> W) -> impl Stream<Item = Result<watcher::Event<K>, WatchFailure>>
where
    W: Stream<Item = watcher::Result<watcher::Event<K>>>,
{
    let first = (Box::pin(start()), start, Pace::new(), None);
    stream::unfold(first, |(mut watch, start, mut pace, delay)| async move {
        if let Some(delay) = delay {
            sleep(delay).await;
        }
        let event = watch.next().await?;
        let delay = pace.after(event.as_ref());
        let event = event.map_err(|error| {
            if is_refused_for_its_age(&error) {
                watch.set(start());
            }
            failure(&error)
        });
        Some((event, (watch, start, pace, delay)))
    })
}

/// How long is waited before the next request.
struct Pace {
    delays: Box<dyn Backoff + Send>,
    /// When what was remembered was too old last.
    expired: Option<Instant>,
}

impl Pace {
    fn new() -> Self {
        Self { delays: Box::new(backoff()), expired: None }
    }

    fn after<K>(&mut self, event: Result<&watcher::Event<K>, &watcher::Error>) -> Option<Duration> {
        match event {
            // The list that follows may fail like the one before.
            Ok(watcher::Event::Init) => None,
            Ok(_) => {
                self.delays.reset();
                None
            }
            // All that is asked for is to list everything again, as after each restart of an API server: at once, once.
            Err(error) if failure(error).code == Some(410) => {
                let now = Instant::now();
                let is_again = self.expired.replace(now).is_some_and(|before| now - before < EXPIRED_AGAIN);
                if is_again { self.delays.next() } else { None }
            }
            Err(_) => self.delays.next(),
        }
    }
}

struct Teller {
    scope: Scope,
    epoch: u64,
    messages: mpsc::Sender<Message>,
}

impl Teller {
    async fn follow<T>(self, client: Client, resource: ApiResource, wrap: fn(Arc<T>) -> Manifest)
    where
        T: DeserializeOwned + Clone + Debug + Send + Sync + 'static,
    {
        let api = match &self.scope.namespace {
            Some(namespace) => Api::<Received<T>>::namespaced_with(client, namespace, &resource),
            None => Api::<Received<T>>::all_with(client, &resource),
        };
        let page = if self.scope.kind == Kind::EndpointSlice { PAGE_OF_SLICES } else { PAGE };
        let start = || watcher(api.clone(), config(page));
        self.tell(start, |received| {
            let record = received.record();
            (received.content.map(Arc::new).map(wrap), record)
        })
        .await;
    }

    async fn tell<K: Resource, W: Stream<Item = watcher::Result<watcher::Event<K>>> + Send>(
        self,
        start: impl Fn() -> W,
        read: impl Fn(K) -> (Result<Manifest, String>, ObservedObject),
    ) {
        let mut watch = std::pin::pin!(paced(start));
        while let Some(event) = watch.next().await {
            let put = |object: K| {
                let id = self.id(&object);
                let (manifest, record) = read(object);
                News::Put(Box::new(Item { id, manifest: manifest.map(slim), record }))
            };
            let news = match event {
                Ok(watcher::Event::Init) => News::ListBegins,
                Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => put(object),
                Ok(watcher::Event::Delete(object)) => News::Gone(self.id(&object)),
                Ok(watcher::Event::InitDone) => News::ListEnds,
                Err(failure) => News::Failed(failure),
            };
            let message = Message { scope: self.scope.clone(), epoch: self.epoch, news };
            if self.messages.send(message).await.is_err() {
                return;
            }
        }
    }

    fn id(&self, object: &impl Resource) -> ObjectRef {
        let meta = object.meta();
        ObjectRef {
            kind: self.scope.kind.as_str().to_owned(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        }
    }
}

fn namespace(object: PartialObjectMeta<DynamicObject>) -> (Result<Manifest, String>, ObservedObject) {
    let meta = object.meta();
    let metadata = Metadata {
        name: meta.name.clone().unwrap_or_default(),
        labels: meta.labels.clone().unwrap_or_default(),
        ..Metadata::default()
    };
    (Ok(Manifest::Namespace(Arc::new(Namespace { metadata }))), ObservedObject::default())
}

/// Leaves out what nobody reads. The annotations of slices and routes may hold a copy of the object.
fn slim(mut manifest: Manifest) -> Manifest {
    let metadata = match &mut manifest {
        Manifest::TcpRoute(object) => Arc::get_mut(object).map(|object| &mut object.metadata),
        Manifest::ReferenceGrant(object) => Arc::get_mut(object).map(|object| &mut object.metadata),
        Manifest::Service(object) => Arc::get_mut(object).map(|object| &mut object.metadata),
        Manifest::EndpointSlice(object) => Arc::get_mut(object).map(|object| &mut object.metadata),
        Manifest::GatewayClass(_)
        | Manifest::Gateway(_)
        | Manifest::ListenerSet(_)
        | Manifest::Namespace(_) => None,
    };
    if let Some(metadata) = metadata {
        metadata.annotations.clear();
        metadata.labels.retain(|key, _| key == SERVICE_NAME_LABEL);
    }
    manifest
}

/// Whether a watch was refused at its start, since nothing is remembered from there on. It would be tried again for ever
/// from the same version.
fn is_refused_for_its_age(error: &watcher::Error) -> bool {
    failure(error).code == Some(410) && matches!(error, watcher::Error::WatchStartFailed(_))
}

fn failure(error: &watcher::Error) -> WatchFailure {
    use watcher::Error;
    let code = match error {
        Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status))
        | Error::WatchFailed(kube::Error::Api(status))
        | Error::WatchError(status) => Some(status.code),
        Error::InitialListFailed(_)
        | Error::WatchStartFailed(_)
        | Error::WatchFailed(_)
        | Error::NoResourceVersion => None,
    };
    WatchFailure { message: one_line(error), code }
}
