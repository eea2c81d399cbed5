//! What is held from before, by this agent or by a former one.

use super::*;

/// The source of an agent that starts where this one was.
fn restart(fixture: &mut Fixture) {
    let before = fixture.source.load();
    fixture.source = FileSource::resume(fixture.source.path(), before);
}

#[test]
fn an_emptied_folder_takes_nothing_away_and_one_with_a_comment_does() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", service("s", "1"));
    fixture.show();
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    for _ in 0..2 {
        fixture.check(expect![[r#"
            Service default/s at a.yaml:2
            Error FOLDER: the folder holds no *.yaml, *.yml or *.json file any more; the object read from it before stays in force; to remove everything, leave one such file that holds nothing but a comment (Unreadable)
        "#]]);
        restart(&mut fixture);
    }
    fixture.write("none.yaml", "# nothing is forwarded here\n");
    fixture.check(expect![[""]]);
}

#[test]
fn the_last_good_version_outlives_a_restart() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", format!("{}{}", service("s", "1"), service("gone", "1")));
    fixture.write("b.yaml", service("t", "1"));
    fixture.write("c.yaml", service("removed", "1"));
    let before = fixture.source.load();
    // One is refused, one is in a broken file, one is removed with its file, and one out of a file that is whole.
    fixture.write("a.yaml", service("s", "70000"));
    fixture.write("b.yaml", "a: [");
    fs::remove_file(fixture.path("c.yaml")).unwrap();
    restart(&mut fixture);
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Service default/t at b.yaml:2
        Error a.yaml:8: Service default/s: spec.ports[0].port: port 70000 is out of range: use 1 to 65535; the version before stays in force (Invalid)
        Warning b.yaml: a document is not recognised, so that nothing is taken away; the object read from it before stays in force (Malformed)
        Error b.yaml:1: the document is not YAML: unclosed bracket '[' (Malformed)
    "#]]);
    let after = fixture.source.load().manifests;
    for name in ["s", "t"] {
        let name = NamespacedName::new("default", name);
        assert_eq!(after.services[&name], before.manifests.services[&name]);
    }
}

#[test]
fn manifests_that_are_missing_at_the_start_take_nothing_away() {
    let mut fixture = Fixture::new();
    fixture.write("conf/a.yaml", service("s", "1"));
    fixture.source = FileSource::new(fixture.path("conf"));
    fixture.show();
    restart(&mut fixture);
    fs::rename(fixture.path("conf"), fixture.path("elsewhere")).unwrap();
    fixture.check(expect![[r#"
        Service default/s at conf/a.yaml:2
        Error conf: cannot read: No such file or directory (os error 2); the object read from it before stays in force (Unreadable)
    "#]]);
}
