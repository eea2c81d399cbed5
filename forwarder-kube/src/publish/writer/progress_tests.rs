use kube::core::Status;

use super::*;
use forwarder_gateway::status::GatewayClassStatus;
use forwarder_source::Loaded;

const CLASS: &str = "forwarder";

/// A writer of which no request leaves.
fn writer() -> Writer {
    let client = Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
    let identity = Identity {
        controller: "forwarder.dev/tcp".to_owned(),
        namespace: "forwarder-system".to_owned(),
        node: "a".to_owned(),
        pod: None,
        pod_selector: String::new(),
    };
    Writer::new(client, Arc::new(identity), Arc::new(PublishHealth::new()))
}

/// A class that is to be accepted.
fn outcome() -> Publication {
    let conditions = vec![Condition::holds("Accepted", "Accepted", "", 1)];
    let mut loaded = Loaded::default();
    loaded.manifests.api_release = ApiRelease::Unknown;
    let mut outcome = Publication { loaded: Arc::new(loaded), ..Publication::default() };
    Arc::make_mut(&mut outcome.statuses)
        .gateway_classes
        .insert(CLASS.to_owned(), GatewayClassStatus { conditions });
    outcome
}

/// The class as it stands in a version, without a status.
fn records(version: &str) -> ObservedObjects {
    let record =
        ObservedObject { resource_version: version.to_owned(), generation: 1, ..ObservedObject::default() };
    let mut records = ObservedObjects::default();
    records.objects.insert(ObjectRef::cluster(Kind::GatewayClass, CLASS), Arc::new(record));
    records
}

/// Evaluates the class as it stands in a version; yields what is to be written, and when to look again.
fn evaluate(writer: &mut Writer, version: &str) -> (Vec<Write<Body>>, Option<Instant>) {
    let mut queue = VecDeque::new();
    let again = writer.evaluate(&outcome(), &records(version), Vec::new(), &mut queue);
    (queue.into(), again)
}

/// Ends a write as `what`; yields when to look again.
fn settle(
    writer: &mut Writer,
    write: Write<Body>,
    what: Result<Option<String>, kube::Error>,
) -> Option<Instant> {
    let Write { id, record, digest, is_status, warnings, what: _ } = write;
    writer.settle(Write { id, record, digest, is_status, warnings, what }, &Served::default())
}

fn conflict() -> kube::Error {
    kube::Error::Api(Box::new(Status::failure("somebody was faster", "Conflict").with_code(409)))
}

#[tokio::test]
async fn an_object_that_changes_while_it_is_written_is_looked_at_afterwards() {
    for answer in [Err(conflict()), Ok(Some("3".to_owned()))] {
        let mut writer = writer();
        let (mut queue, _) = evaluate(&mut writer, "1");
        let write = queue.pop().unwrap();
        // The watch is faster than the answer, and then tells nothing more.
        let (queue, _) = evaluate(&mut writer, "2");
        assert!(queue.is_empty(), "one write at a time");
        let again = settle(&mut writer, write, answer).expect("another look");
        sleep_until(again).await;
        let (queue, _) = evaluate(&mut writer, "2");
        assert_eq!(queue.first().unwrap().record.resource_version, "2");
    }
}

#[tokio::test]
async fn an_object_that_stays_as_it_was_written_is_left_to_the_watch() {
    for answer in [Err(conflict()), Ok(Some("2".to_owned()))] {
        let mut writer = writer();
        let (mut queue, _) = evaluate(&mut writer, "1");
        assert_eq!(settle(&mut writer, queue.pop().unwrap(), answer), None);
        let (queue, again) = evaluate(&mut writer, "1");
        assert!(queue.is_empty() && again.is_none(), "the version that was written from is stale");
    }
}
