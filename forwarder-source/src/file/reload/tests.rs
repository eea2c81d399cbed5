use std::fs;
use std::os::unix::fs::symlink;

use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use forwarder_gateway::manifests::{Change, NamespacedName};

const FILES: [&str; 4] = ["a.yaml", "b.yaml", "c/d.yaml", "e.json"];

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

fn slice(name: &str, service: &str, address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, labels: {{kubernetes.io/service-name: \"{service}\"}}}}\n\
         addressType: IPv4\nports: [{{port: 80}}]\nendpoints: [{{addresses: [{address}]}}]\n"
    )
}

fn write(folder: &Path, name: &str, text: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    path
}

fn paths(paths: &[&PathBuf]) -> BTreeSet<PathBuf> {
    paths.iter().map(|path| (*path).clone()).collect()
}

/// What a source that holds the same would have published at once.
fn anew(source: &FileSource) -> Loaded {
    let mut loaded = Loaded { problems: Arc::clone(&source.loaded.problems), ..Loaded::default() };
    for (id, held) in &source.held {
        loaded.set(id, None, held);
    }
    loaded.manifests.refused = source.loaded.manifests.refused.clone();
    loaded.manifests.unread = Arc::clone(&source.loaded.manifests.unread);
    loaded
}

#[test]
fn a_changed_endpoint_is_read_alone() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "a.yaml", b"broken: [");
    write(folder.path(), "s.yaml", service("s", 80).as_bytes());
    let other = write(folder.path(), "t.yaml", slice("t", "s", "10.0.0.9").as_bytes());
    let path = write(folder.path(), "x.yaml", slice("x", "s", "10.0.0.1").as_bytes());
    let mut source = FileSource::new(folder.path());
    let before = source.load();
    assert_eq!(before.problems.len(), 1);
    // It would not be noticed, since it is not said to have changed.
    write(folder.path(), "t.yaml", b"");
    write(folder.path(), "x.yaml", slice("x", "s", "10.0.0.2").as_bytes());
    let after = source.reload(&paths(&[&path])).expect("the short way");
    let service = NamespacedName::new("default", "s");
    assert_eq!(after.manifests.endpoint_slices[&service]["x"].endpoints[0].addresses, ["10.0.0.2"]);
    assert_eq!(before.manifests.change_to(&after.manifests), Change::Endpoints([service].into()));
    assert!(Arc::ptr_eq(&before.problems, &after.problems));
    assert!(source.reload(&paths(&[&other])).is_none(), "an object went");
}

#[test]
fn whatever_concerns_more_than_one_file_takes_the_long_way() {
    let folder = TempDir::new().unwrap();
    let [a, b] = ["a.yaml", "b.yaml"].map(|name| folder.path().join(name));
    let mut source = FileSource::new(folder.path());
    let mut check = |what: &str, texts: [&str; 2], then: &str, changed: &PathBuf, is_short: bool| {
        fs::write(&a, texts[0]).unwrap();
        fs::write(&b, texts[1]).unwrap();
        source.load();
        fs::write(changed, then).unwrap();
        assert_eq!(source.reload(&paths(&[changed])).is_some(), is_short, "{what}");
    };
    let (s1, s2, t) = (service("s", 1), service("s", 2), service("t", 1));
    check("another port", [&s1, &t], &s2, &a, true);
    check("another version of it is refused", [&s1, &t], &service("s", 0), &a, true);
    check("another object", [&s1, &t], &service("u", 1), &a, false);
    check("one more object", [&s1, &t], &format!("{s1}---\n{}", service("u", 1)), &a, false);
    check("the same twice", [&s1, &t], &format!("{s1}---\n{s2}"), &a, false);
    check("one object less", [&s1, &t], "", &a, false);
    check("what stands elsewhere too", [&s1, &s2], &s2, &a, false);
    check("what stands elsewhere first", [&s1, &s2], &s1, &b, false);
    check("it breaks", [&s1, &t], "a: [", &a, false);
    check("it was broken", ["a: [", &t], &s1, &a, false);
    check("what was never accepted", [&service("v", 0), &t], &service("v", 1), &a, false);
    check("what was never accepted and is not now", [&service("v", 0), &t], &service("v", 1), &b, false);
}

#[test]
fn links_take_the_long_way() {
    let folder = TempDir::new().unwrap();
    let target = write(folder.path(), ".target", service("s", 1).as_bytes());
    let plain = write(folder.path(), "plain.yaml", service("t", 1).as_bytes());
    let link = folder.path().join("link.yaml");
    symlink(&target, &link).unwrap();
    let mut source = FileSource::new(folder.path());
    source.load();
    write(folder.path(), "plain.yaml", service("t", 2).as_bytes());
    assert!(source.reload(&paths(&[&plain])).is_some());
    // What is hidden, or no manifest, may be what a link leads to.
    assert!(source.reload(&paths(&[&target])).is_none());
    assert!(source.reload(&paths(&[&link])).is_none());
    fs::remove_file(&link).unwrap();
    source.load();
    let note = write(folder.path(), "note.txt", b"");
    assert!(source.reload(&paths(&[&target, &note])).is_some());
    fs::hard_link(&plain, folder.path().join("other")).unwrap();
    assert!(source.reload(&paths(&[&plain])).is_none());
}

#[derive(Clone, Debug)]
enum Edit {
    Write(&'static str, Vec<u8>),
    Remove(&'static str),
    Note(&'static str),
}

fn documents() -> impl Strategy<Value = String> {
    let name = || prop::sample::select(vec!["s", "t", "u"]);
    prop_oneof![
        2 => (name(), 0..3_u16).prop_map(|(name, port)| service(name, port)),
        6 => (name(), prop::sample::select(vec!["s", "s", "t", ""]), 1..4_u8)
            .prop_map(|(name, service, last)| slice(name, service, &format!("10.0.0.{last}"))),
        1 => name().prop_map(|name| slice(name, "s", "300.0.0.1")),
        1 => Just("a: [\n".to_owned()),
        1 => Just("kind: Deployment\napiVersion: apps/v1\n".to_owned()),
        1 => Just("# a comment\n".to_owned()),
    ]
}

fn edits() -> impl Strategy<Value = Edit> {
    let file = || prop::sample::select(FILES.to_vec());
    prop_oneof![
        8 => (file(), vec(documents(), 0..3)).prop_map(|(file, documents)| {
            Edit::Write(file, documents.join("---\n").into_bytes())
        }),
        1 => file().prop_map(|file| Edit::Write(file, b"\xff".to_vec())),
        1 => file().prop_map(Edit::Remove),
        1 => prop::sample::select(vec!["note.txt", ".hidden.yaml", "c/.x/y.yaml"]).prop_map(Edit::Note),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two sources see the same edits; one is told of the paths and may take the short way.
    #[test]
    fn the_short_way_leads_to_the_same(
        start in vec(vec(documents(), 0..2), FILES.len()),
        batches in vec(vec(edits(), 1..3), 1..12),
    ) {
        let folder = TempDir::new().unwrap();
        for (file, documents) in FILES.iter().zip(start) {
            write(folder.path(), file, documents.join("---\n").as_bytes());
        }
        let (mut told, mut full) = (FileSource::new(folder.path()), FileSource::new(folder.path()));
        prop_assert_eq!(told.load(), full.load());
        for batch in batches {
            let mut changed = BTreeSet::new();
            for edit in &batch {
                let (Edit::Write(file, _) | Edit::Remove(file) | Edit::Note(file)) = edit;
                let path = folder.path().join(file);
                match edit {
                    Edit::Write(file, text) => drop(write(folder.path(), file, text)),
                    Edit::Remove(_) => drop(fs::remove_file(&path)),
                    Edit::Note(file) => drop(write(folder.path(), file, b"not: [read")),
                }
                changed.insert(path);
            }
            let loaded = told.reload(&changed).unwrap_or_else(|| told.load());
            prop_assert_eq!(&loaded, &full.load(), "{:?}", batch);
            prop_assert_eq!(&loaded, &anew(&told));
            prop_assert_eq!(&told.scanned, &scan::scan(folder.path()).ok(), "{:?}", batch);
        }
    }
}
