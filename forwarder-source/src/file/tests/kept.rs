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
    fixture.check(expect![[r#"
        Warning FOLDER: holds no object: there is nothing to serve (Unreadable)
    "#]]);
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

/// A Gateway with listeners, each a map.
fn gateway(listeners: &[&str]) -> String {
    let listeners = listeners.iter().map(|one| format!("  - {{{one}, protocol: TCP}}\n"));
    let listeners = listeners.collect::<Vec<_>>().concat();
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g}}\nspec:\n  gatewayClassName: tcp\n  \
         listeners:\n{listeners}"
    )
}

/// The listeners in force: name and port.
fn listeners(fixture: &mut Fixture) -> Vec<(String, i64)> {
    let manifests = fixture.source.load().manifests;
    let gateway = &manifests.gateways[&NamespacedName::new("default", "g")];
    let served = gateway.spec.listeners.iter().filter(|listener| listener.refused.is_none());
    served.map(|listener| (listener.name.clone(), listener.port)).collect()
}

fn pairs(expected: &[(&str, i64)]) -> Vec<(String, i64)> {
    expected.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect()
}

const A: &str = "name: a, port: 1";
const B: &str = "name: b, port: 2";
const C: &str = "name: c, port: 3";

#[test]
fn a_wrong_listener_leaves_the_others() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", gateway(&[A, "name: b, port: x", C]));
    fixture.check(expect![[r#"
        Gateway default/g at a.yaml:1
        Error a.yaml:8: Gateway default/g: spec.listeners[1].port: expected a whole number, found the text "x"; the listener is refused (Invalid)
    "#]]);
    assert_eq!(listeners(&mut fixture), pairs(&[("a", 1), ("c", 3)]));
    // What concerns the whole object refuses it.
    fixture.write("b.yaml", gateway(&[A, "name: b, port: x"]).replace("name: g", "name: h, lables: {}"));
    fixture.check(expect![[r#"
        Gateway default/g at a.yaml:1
        Error a.yaml:8: Gateway default/g: spec.listeners[1].port: expected a whole number, found the text "x"; the listener is refused (Invalid)
        Error b.yaml:3: Gateway default/h: metadata.lables: unknown field (did you mean labels?); the object is refused (UnknownField)
        Error b.yaml:8: Gateway default/h: spec.listeners[1].port: expected a whole number, found the text "x"; the object is refused (Invalid)
    "#]]);
}

#[test]
fn a_wrong_listener_stays_as_it_was_and_none_is_taken_away_until_it_is_right() {
    for (now, in_force, said) in [
        // Another one changes meanwhile.
        (
            &["name: a, port: 9", "name: b, port: x"][..],
            &[("a", 9), ("b", 2)][..],
            "the version of the listener before",
        ),
        // Which name is misspelt, and which gone?
        (&[A, "nmae: b, port: 2"], &[("a", 1), ("b", 2)], "no other is taken away: b"),
        (&[A, "name: B, port: 2"], &[("a", 1), ("b", 2)], "no other is taken away: b"),
        // Copied, and not renamed: above and below.
        (&["name: a, port: 5", A, B], &[("a", 1), ("b", 2)], "the version of the listener before"),
        (&[A, "name: a, port: 5", B], &[("a", 1), ("b", 2)], "the version of the listener before"),
        // Its port has been given to another one.
        (&["name: a, port: 2", "name: b, port: x"], &[("a", 2)], "the listener is refused"),
    ] {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", gateway(&[A, B]));
        assert_eq!(listeners(&mut fixture), pairs(&[("a", 1), ("b", 2)]));
        fixture.write("a.yaml", gateway(now));
        for _ in 0..2 {
            assert_eq!(listeners(&mut fixture), pairs(in_force), "{now:?}");
            let problems = fixture.source.load().problems;
            assert!(problems.iter().any(|problem| problem.message.contains(said)), "{now:?}: {problems:?}");
            restart(&mut fixture);
        }
        fixture.write("a.yaml", gateway(&[C]));
        assert_eq!(listeners(&mut fixture), pairs(&[("c", 3)]));
    }
}
