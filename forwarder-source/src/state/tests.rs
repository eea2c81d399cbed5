use super::*;
use crate::FileSource;

const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/quickstart");

fn of_files(folder: &Path) -> StateFile {
    StateFile::OfFiles { folder: folder.to_owned(), manifests: QUICKSTART.into() }
}

#[test]
fn what_is_written_is_read_again_and_by_the_other_commands_too() {
    let folder = tempfile::tempdir().unwrap();
    let loaded = FileSource::new(QUICKSTART).load();
    assert!(!loaded.manifests.tcp_routes.is_empty());
    for file in [StateFile::OfCluster(folder.path().to_owned()), of_files(folder.path())] {
        file.write(&loaded).unwrap();
        assert_eq!(file.read_now().unwrap().unwrap().manifests, loaded.manifests);
        let read = FileSource::new(file.path()).load();
        assert_eq!(read.problems.to_vec(), []);
        assert_eq!(read.manifests, loaded.manifests);
    }
}

#[test]
fn a_state_of_files_says_where_each_object_stands() {
    let folder = tempfile::tempdir().unwrap();
    let file = of_files(folder.path());
    let loaded = FileSource::new(QUICKSTART).load();
    file.write(&loaded).unwrap();
    let read = file.read_now().unwrap().unwrap();
    for (id, _) in loaded.manifests.each() {
        assert_eq!(read.locations.lookup(&id, ""), loaded.locations.lookup(&id, ""), "{id}");
    }
}

#[test]
fn a_refused_listener_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("gw.yaml");
    let text = "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: g}, spec: {gatewayClassName: c, listeners: \
                [{name: a, port: x, protocol: TCP}, {name: b, port: 2, protocol: TCP}]}}";
    fs::write(&manifests, text).unwrap();
    let file = StateFile::OfFiles { folder: folder.path().join("state"), manifests: manifests.clone() };
    file.write(&FileSource::new(&manifests).load()).unwrap();
    let read = file.read_now().unwrap().unwrap().manifests;
    let gateway = read.gateways.values().next().unwrap();
    let names: Vec<&str> = gateway.spec.listeners.iter().map(|listener| listener.name.as_str()).collect();
    assert_eq!(names, ["b"]);
}

#[test]
fn only_the_owner_may_read_it_and_nothing_is_left_beside_it() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let file = of_files(folder.path());
    file.write(&Loaded::default()).unwrap();
    assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn no_file_is_no_state_and_a_broken_one_is_an_error_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = StateFile::OfCluster(folder.path().to_owned());
    assert!(file.read_now().unwrap().is_none());
    fs::write(file.path(), "# comment\n---\n{\"kind\": \"Gateway\"}\n").unwrap();
    let error = file.read_now().unwrap_err().to_string();
    assert!(error.contains("line 3"), "{error}");
}

#[test]
fn a_state_of_other_manifests_or_of_another_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = of_files(folder.path());
    file.write(&FileSource::new(QUICKSTART).load()).unwrap();
    let other = StateFile::OfFiles { folder: folder.path().to_owned(), manifests: "/other".into() };
    let error = other.read_now().unwrap_err().to_string();
    assert!(error.contains(QUICKSTART), "{error}");

    let text = fs::read_to_string(file.path()).unwrap();
    for other in [text.replacen("\"version\":1", "\"version\":2", 1), text.replacen(HEAD, "# ", 1)] {
        assert_ne!(other, text);
        fs::write(file.path(), other).unwrap();
        let error = file.read_now().unwrap_err();
        assert!(matches!(error, StateError::Version { .. }), "{error}");
    }
}

#[test]
fn a_path_that_is_no_text_is_kept_as_it_is() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join(std::ffi::OsStr::from_bytes(b"m\xff"));
    fs::create_dir(&manifests).unwrap();
    fs::copy(Path::new(QUICKSTART).join("gateway.yaml"), manifests.join("gateway.yaml")).unwrap();
    let file = StateFile::OfFiles { folder: folder.path().join("state"), manifests: manifests.clone() };
    let loaded = FileSource::new(&manifests).load();
    file.write(&loaded).unwrap();
    let read = file.read_now().unwrap().unwrap();
    assert_eq!(read.manifests, loaded.manifests);
    for (id, _) in loaded.manifests.each() {
        assert_eq!(read.locations.lookup(&id, ""), loaded.locations.lookup(&id, ""), "{id}");
    }
}
