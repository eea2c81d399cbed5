use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn start(pace: Pace, path: &Path) -> watch::Receiver<Arc<Loaded>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let source = FileSource::new(path);
    tokio::spawn(async move { watch_at(pace, source, sender, &Notify::new(), watch::channel(None).0).await });
    receiver
}

async fn wait_for(
    receiver: &mut watch::Receiver<Arc<Loaded>>,
    what: &str,
    is_there: impl Fn(&Loaded) -> bool,
) {
    let outcome = timeout(DEADLINE, receiver.wait_for(|loaded| is_there(loaded))).await;
    assert!(matches!(outcome, Ok(Ok(_))), "{what}");
}

fn has(name: &str) -> impl Fn(&Loaded) -> bool {
    move |loaded| loaded.manifests.namespaces.contains_key(name)
}

/// Events alone, for the poll is later than the deadline.
const EVENTS: Pace = Pace {
    settled: Settling { quiet: Duration::from_millis(5), patience: Duration::from_millis(100) },
    open: Settling { quiet: Duration::from_millis(10), patience: Duration::from_secs(1) },
    poll: Duration::from_hours(1),
};

#[tokio::test]
async fn events_are_followed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("conf");
    let mut receiver = start(EVENTS, &path);
    wait_for(&mut receiver, "a missing folder is a problem", |it| it.problems.len() == 1).await;
    fs::create_dir(&path).unwrap();
    wait_for(&mut receiver, "the folder is created", |it| {
        it.problems.iter().all(|it| it.message.contains("holds no"))
    })
    .await;
    fs::write(path.join("a.yaml"), namespace("a")).unwrap();
    wait_for(&mut receiver, "a file is created", has("a")).await;
    fs::write(path.join(".new"), namespace("b")).unwrap();
    fs::rename(path.join(".new"), path.join("a.yaml")).unwrap();
    wait_for(&mut receiver, "a file is replaced", |it| has("b")(it) && !has("a")(it)).await;
    fs::create_dir(path.join("sub")).unwrap();
    fs::write(path.join("sub/c.yaml"), namespace("c")).unwrap();
    wait_for(&mut receiver, "a subfolder is created", has("c")).await;
    fs::write(path.join("sub/c.yaml"), namespace("d")).unwrap();
    wait_for(&mut receiver, "a file in a subfolder is changed", has("d")).await;
    fs::remove_dir_all(&path).unwrap();
    wait_for(&mut receiver, "the folder is removed", |it| !it.problems.is_empty()).await;
    fs::create_dir(&path).unwrap();
    fs::write(path.join("e.yaml"), namespace("e")).unwrap();
    wait_for(&mut receiver, "the folder is created again", |it| has("e")(it) && it.problems.is_empty()).await;
}

#[tokio::test]
async fn a_complete_write_of_a_known_file_is_not_waited_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.yaml");
    fs::write(&path, namespace("a")).unwrap();
    let labelled = |label: &str| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{l: {label}}}}}\n")
    };
    let has_label = |label: &'static str| {
        move |loaded: &Loaded| {
            let namespace = loaded.manifests.namespaces.get("a");
            namespace.is_some_and(|it| it.metadata.labels.get("l").is_some_and(|found| found == label))
        }
    };
    // Later than the deadline.
    let open = Settling { quiet: Duration::from_hours(1), patience: Duration::from_hours(1) };
    let mut receiver = start(Pace { open, ..EVENTS }, folder.path());
    wait_for(&mut receiver, "the first version", has("a")).await;
    fs::write(folder.path().join(".new"), labelled("moved")).unwrap();
    fs::rename(folder.path().join(".new"), &path).unwrap();
    wait_for(&mut receiver, "moved into place", has_label("moved")).await;
    fs::write(&path, labelled("closed")).unwrap();
    wait_for(&mut receiver, "written and closed", has_label("closed")).await;

    // One whose writer is not done is waited for.
    receiver.mark_unchanged();
    let mut writer = fs::File::options().append(true).open(&path).unwrap();
    writeln!(writer, "# more").unwrap();
    assert!(timeout(Duration::from_millis(200), receiver.changed()).await.is_err());
    write!(writer, "---\n{}", namespace("b")).unwrap();
    drop(writer);
    wait_for(&mut receiver, "closed at last", has("b")).await;
}

#[tokio::test]
async fn links_are_swapped_as_in_a_mounted_config_map() {
    let folder = TempDir::new().unwrap();
    for (version, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(folder.path().join(version)).unwrap();
        fs::write(folder.path().join(version).join("x.yaml"), namespace(name)).unwrap();
    }
    symlink("..1", folder.path().join("..data")).unwrap();
    symlink("..data/x.yaml", folder.path().join("x.yaml")).unwrap();
    let mut of_folder = start(EVENTS, folder.path());
    let mut of_file = start(EVENTS, &folder.path().join("x.yaml"));
    wait_for(&mut of_folder, "the first version", has("a")).await;
    wait_for(&mut of_file, "the first version", has("a")).await;
    symlink("..2", folder.path().join("..tmp")).unwrap();
    fs::rename(folder.path().join("..tmp"), folder.path().join("..data")).unwrap();
    wait_for(&mut of_folder, "the second version", has("b")).await;
    wait_for(&mut of_file, "the second version", has("b")).await;
}

#[tokio::test]
async fn without_events_the_poll_notices() {
    let folder = TempDir::new().unwrap();
    let target = TempDir::new().unwrap();
    // The target of a link is not watched.
    fs::write(target.path().join("t"), namespace("a")).unwrap();
    symlink(target.path().join("t"), folder.path().join("x.yaml")).unwrap();
    let pace = Pace { poll: Duration::from_millis(20), ..EVENTS };
    let mut receiver = start(pace, folder.path());
    wait_for(&mut receiver, "the first version", has("a")).await;
    fs::write(target.path().join("t"), namespace("other")).unwrap();
    wait_for(&mut receiver, "the second version", has("other")).await;
}

#[tokio::test]
async fn nothing_new_is_not_published() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("a.yaml"), namespace("a")).unwrap();
    let mut receiver = start(EVENTS, folder.path());
    wait_for(&mut receiver, "the first version", has("a")).await;
    receiver.mark_unchanged();
    fs::write(folder.path().join("a.yaml"), namespace("a")).unwrap();
    fs::write(folder.path().join("b.txt"), "").unwrap();
    assert!(timeout(Duration::from_millis(300), receiver.changed()).await.is_err());
}

#[tokio::test]
async fn it_ends_when_nobody_listens() {
    let folder = TempDir::new().unwrap();
    let (sender, receiver) = watch::channel(Arc::default());
    let task = tokio::spawn(watch(folder.path().to_owned(), None, sender, Arc::default()));
    drop(receiver);
    timeout(DEADLINE, task).await.expect("in time").expect("no panic");
}
