#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

mod kept;

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::symlink;

use expect_test::{Expect, expect};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use forwarder_gateway::manifests::NamespacedName;

/// A folder, a source for it, and what it says.
struct Fixture {
    folder: TempDir,
    source: FileSource,
}

impl Fixture {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let source = FileSource::new(folder.path());
        Self { folder, source }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn show(&mut self) -> String {
        let loaded = self.source.load();
        let folder = format!("{}/", self.folder.path().display());
        let mut out = String::new();
        for id in self.source.held.keys() {
            let at = loaded.locations.lookup(id, "").unwrap();
            writeln!(out, "{id} at {at}").unwrap();
        }
        for problem in &*loaded.problems {
            writeln!(out, "{:?} {problem}", problem.severity).unwrap();
        }
        out.replace(&folder, "").replace(folder.trim_end_matches('/'), "FOLDER")
    }

    fn check(&mut self, expected: Expect) {
        expected.assert_eq(&self.show());
    }
}

fn check(text: impl AsRef<[u8]>, expected: Expect) {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", text);
    fixture.check(expected);
}

const CLASS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tcp}
spec: {controllerName: forwarder.dev/tcp}
";

fn service(name: &str, port: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n"
    )
}

#[test]
fn every_kind_is_read() {
    let mut fixture = Fixture::new();
    fixture.write(
        "all.yaml",
        format!(
            "{CLASS}{}---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: Gateway
metadata: {{name: g}}
spec: {{gatewayClassName: tcp, listeners: [{{name: l, port: 1, protocol: TCP}}]}}
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {{name: r}}
spec: {{parentRefs: [{{name: g}}], rules: [{{}}, {{}}]}}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{name: rg, namespace: other}}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: TCPRoute, namespace: default}}]
  to: [{{group: '', kind: Service}}]
---
apiVersion: v1
kind: Namespace
metadata: {{name: other, namespace: default, labels: {{a: b}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ListenerSet
metadata: {{name: ls}}
spec: {{parentRef: {{name: g, namespace: other}}, listeners: [{{name: l, port: 1, protocol: TCP}}]}}
---
apiVersion: discovery.k8s.io/v1beta1
kind: EndpointSlice
metadata: {{name: s-1, labels: {{kubernetes.io/service-name: s}}}}
addressType: IPv4
endpoints: [{{addresses: [10.0.0.1], topology: {{zone: a}}, conditions: {{ready: null}}}}]
ports: [{{name: '', port: 8080}}]
",
            service("s", "80")
        ),
    );
    fixture.check(expect![[r#"
        EndpointSlice default/s-1 at all.yaml:41
        Gateway default/g at all.yaml:15
        GatewayClass tcp at all.yaml:2
        ListenerSet default/ls at all.yaml:36
        Namespace other at all.yaml:32
        ReferenceGrant other/rg at all.yaml:25
        Service default/s at all.yaml:7
        TCPRoute default/r at all.yaml:20
    "#]]);
    let manifests = fixture.source.load().manifests;
    assert!(manifests.namespaces["other"].metadata.namespace.is_empty());
    assert_eq!(manifests.gateways[&NamespacedName::new("default", "g")].metadata.namespace, "default");
    let slices = &manifests.endpoint_slices[&NamespacedName::new("default", "s")];
    assert_eq!(slices["s-1"].endpoints[0].addresses, ["10.0.0.1"]);
}

#[test]
fn broken_documents() {
    check(
        format!("a: [\n{}", service("ok", "80")),
        expect![[r#"
        Service default/ok at a.yaml:3
        Error a.yaml:1: the document is not YAML: unclosed bracket '[' (Malformed)
    "#]],
    );
    check(
        "kind: Service\n---\napiVersion: v1\n---\napiVersion: 1\nkind: Service\n",
        expect![[r#"
            Error a.yaml:1: apiVersion: is required, as a text: the document is no Kubernetes object without apiVersion (Malformed)
            Error a.yaml:3: kind: is required, as a text: the document is no Kubernetes object without kind (Malformed)
            Error a.yaml:5: apiVersion: is required, as a text: the document is no Kubernetes object without apiVersion (Malformed)
        "#]],
    );
    check(
        "- a\n---\ntext\n---\n1\n---\n~\n---\n{}\n",
        expect![[r#"
            Error a.yaml:1: the document is not a map: a Kubernetes object has apiVersion and kind (Malformed)
            Error a.yaml:3: the document is not a map: a Kubernetes object has apiVersion and kind (Malformed)
            Error a.yaml:5: the document is not a map: a Kubernetes object has apiVersion and kind (Malformed)
            Error a.yaml:9: apiVersion: is required, as a text: the document is no Kubernetes object without apiVersion (Malformed)
        "#]],
    );
    check(
        "apiVersion: v1\nkind: Service\nmetadata:\n  generateName: x-\n",
        expect![[r#"
            Error a.yaml:3: metadata.name: a Service needs a name: generateName is only for objects that an API server creates (Malformed)
        "#]],
    );
    check(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: 5\n",
        expect![[r#"
            Error a.yaml:4: metadata.name: a Service needs a name, as a text (Malformed)
        "#]],
    );
    check(
        "apiVersion: v1\nkind: Service\nmetadata: x\n",
        expect![[r#"
        Error a.yaml:3: metadata.name: a Service needs a name, as a text (Malformed)
    "#]],
    );
    check(
        "apiVersion: v1\nkind: Service\nmetadata:\n\tname: a\n",
        expect![[r#"
            Error a.yaml:4: the document is not YAML: tabs disallowed within this context (block indentation) (Malformed)
        "#]],
    );
    check(
        format!("{}\n{}", "[".repeat(100_000), service("ok", "1")),
        expect![[r#"
            Service default/ok at a.yaml:3
            Error a.yaml:1: the document is not YAML: recursion limit exceeded (Malformed)
        "#]],
    );
}

#[test]
fn other_kinds_and_versions() {
    check(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: app, namespace: n}
---
apiVersion: networking.istio.io/v1
kind: Gateway
---
apiVersion: gateway.networking.k8s.io/v2
kind: TCPRoute
metadata: {name: r}
---
apiVersion: v2
kind: Service
metadata: {name: r}
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XListenerSet
metadata: {name: ls}
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: ListenerSet
metadata: {name: ls}
",
        expect![[r#"
            Warning a.yaml:2: HTTPRoute web: kind: HTTPRoute is not supported and is ignored: routes are TCPRoutes (UnsupportedKind)
            Warning a.yaml:6: Deployment n/app: kind: Deployment of apps is not read and is ignored (UnsupportedKind)
            Warning a.yaml:10: kind: Gateway of networking.istio.io is not read and is ignored (UnsupportedKind)
            Error a.yaml:13: TCPRoute default/r: apiVersion: version "v2" of TCPRoute is not read: use gateway.networking.k8s.io/v1 or gateway.networking.k8s.io/v1alpha2; the object is refused (UnsupportedKind)
            Error a.yaml:17: Service default/r: apiVersion: version "v2" of Service is not read: use v1; the object is refused (UnsupportedKind)
            Warning a.yaml:21: XListenerSet ls: kind: XListenerSet of gateway.networking.x-k8s.io is not read and is ignored (UnsupportedKind)
            Error a.yaml:25: ListenerSet default/ls: apiVersion: version "v1alpha2" of ListenerSet is not read: use gateway.networking.k8s.io/v1; the object is refused (UnsupportedKind)
        "#]],
    );
}

#[test]
fn every_wrong_field_is_reported_with_its_line() {
    check(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: g
  labels:
    app.kubernetes.io/name: 1
spec:
  gatewayClassName: [x]
  listeners:
  - name: a
    port: eighty
    protocol: TCP
  - name: b
    port: 0
    protocol: TCP
    allowedRoutes:
      namespaces:
        from: Others
  - name: c
    port: 70000
    protocol: true
  - TCP
",
        expect![[r#"
            Error a.yaml:7: Gateway default/g: metadata.labels[app.kubernetes.io/name]: expected a string, found the number 1; the object is refused (Invalid)
            Error a.yaml:9: Gateway default/g: spec.gatewayClassName: expected a string, found a list; the object is refused (Invalid)
            Error a.yaml:12: Gateway default/g: spec.listeners[0].port: expected a whole number, found the text "eighty"; the object is refused (Invalid)
            Error a.yaml:15: Gateway default/g: spec.listeners[1].port: port 0 is out of range: use 1 to 65535; the object is refused (Invalid)
            Error a.yaml:19: Gateway default/g: spec.listeners[1].allowedRoutes.namespaces.from: "Others" is not one of All, Same, Selector, None; the object is refused (Invalid)
            Error a.yaml:21: Gateway default/g: spec.listeners[2].port: port 70000 is out of range: use 1 to 65535; the object is refused (Invalid)
            Error a.yaml:22: Gateway default/g: spec.listeners[2].protocol: expected a string, found true; the object is refused (Invalid)
            Error a.yaml:23: Gateway default/g: spec.listeners[3]: expected a map, found the text "TCP"; the object is refused (Invalid)
        "#]],
    );
    check(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata:
  name: r
spec:
  rules:
  - backendRefs:
    - name: s
      port: 80.5
      weight: -1
    - name: t
      port: 80.0
      weight: '5'
",
        expect![[r#"
            Error a.yaml:10: TCPRoute default/r: spec.rules[0].backendRefs[0].port: expected a whole number, found the number 80.5; the object is refused (Invalid)
            Error a.yaml:11: TCPRoute default/r: spec.rules[0].backendRefs[0].weight: weight -1 is out of range: use 0 to 1000000; the object is refused (Invalid)
            Error a.yaml:14: TCPRoute default/r: spec.rules[0].backendRefs[1].weight: expected a whole number, found the text "5"; the object is refused (Invalid)
        "#]],
    );
    check(
        "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: s
addressType: IPv4
endpoints:
- addresses:
  - 10.0.0.1
- addresses:
  - 10.0.0.1
  - 10.0.0.300
  conditions:
    ready: 'yes'
",
        expect![[r#"
            Warning a.yaml:4: EndpointSlice default/s: metadata.labels: the label kubernetes.io/service-name is missing: the EndpointSlice belongs to no Service and is ignored (Invalid)
            Error a.yaml:12: EndpointSlice default/s: endpoints[1].addresses[1]: "10.0.0.300" is not the IPv4 address of an endpoint; the object is refused (Invalid)
            Error a.yaml:14: EndpointSlice default/s: endpoints[1].conditions.ready: expected true or false, found the text "yes"; the object is refused (Invalid)
        "#]],
    );
}

#[test]
fn lists_are_expanded() {
    check(
        "
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: a}
  spec: {ports: [{port: 1}]}
- apiVersion: v1
  kind: ServiceList
  items:
  - metadata: {name: b}
    spec: {ports: [{port: 0}]}
- null
---
apiVersion: v1
kind: List
items: {}
---
apiVersion: v1
kind: List
items: []
---
apiVersion: v1
kind: List
",
        expect![[r#"
            Service default/a at a.yaml:5
            Error a.yaml:13: Service default/b: spec.ports[0].port: port 0 is out of range: use 1 to 65535; the object is refused (Invalid)
            Error a.yaml:14: the document is not a map: a Kubernetes object has apiVersion and kind (Malformed)
            Error a.yaml:16: items: is not a list (Malformed)
            Warning a.yaml:24: kind: List of core is not read and is ignored (UnsupportedKind)
        "#]],
    );
    let mut json = Fixture::new();
    json.write(
        "a.json",
        "{\"apiVersion\":\"v1\",\"kind\":\"NamespaceList\",\n\"items\":[{\"metadata\":{\"name\":\"a\"}}]}",
    );
    json.check(expect![[r#"
        Namespace a at a.json:2
    "#]]);
}

#[test]
fn text_that_is_not_utf_8() {
    check(
        b"a: 1\nb: \xff\n",
        expect![[r#"
        Error a.yaml:2: the file is not UTF-8: invalid byte at offset 8 (Malformed)
    "#]],
    );
    check(
        b"\xff\xfea\0:\0",
        expect![[r#"
        Error a.yaml:1: the file is UTF-16: save it as UTF-8 (Malformed)
    "#]],
    );
    check(
        b"",
        expect![[r#"
        Warning FOLDER: holds no object: there is nothing to serve (Unreadable)
    "#]],
    );
    check(
        "\u{feff}apiVersion: v1\r\nkind: Namespace\r\nmetadata:\r\n  name: A\r\n",
        expect![[r#"
            Error a.yaml:4: Namespace A: metadata.name: "A" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit; the object is refused (Invalid)
        "#]],
    );
}

#[test]
fn files_that_cannot_be_read() {
    let mut fixture = Fixture::new();
    fixture.write("ok.yaml", CLASS);
    let large = fs::File::create(fixture.path("large.yaml")).unwrap();
    large.set_len(50 << 20).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, fixture.path("fifo.yaml"), rustix::fs::Mode::RUSR).unwrap();
    symlink("/dev/zero", fixture.path("device.yaml")).unwrap();
    symlink("/proc/self/mem", fixture.path("failing.yaml")).unwrap();
    symlink("nowhere", fixture.path("dangling.yaml")).unwrap();
    symlink("nowhere", fixture.path("dangling")).unwrap();
    symlink("self.yaml", fixture.path("self.yaml")).unwrap();
    symlink("ping", fixture.path("pong")).unwrap();
    symlink("pong", fixture.path("ping")).unwrap();
    symlink(".", fixture.path("folder")).unwrap();
    fs::create_dir(fixture.path("folder.yaml")).unwrap();
    fixture.write("folder.yaml/inner.yml", service("inner", "1"));
    fixture.write("note.txt", "not: [read");
    fixture.write(".hidden.yaml", "not: [read");
    fixture.write("..data/x.yaml", "not: [read");
    symlink("..data/linked", fixture.path("linked.json")).unwrap();
    fixture.write("..data/linked", service("linked", "1"));
    fixture.write("1/2/3/4/5/6/7/8/deep.yaml", service("deep", "1"));
    fixture.write("1/2/3/4/5/6/7/8/9/deeper.yaml", service("deeper", "1"));
    fixture.check(expect![[r#"
        GatewayClass tcp at ok.yaml:2
        Service default/deep at 1/2/3/4/5/6/7/8/deep.yaml:2
        Service default/inner at folder.yaml/inner.yml:2
        Service default/linked at linked.json:2
        Warning 1/2/3/4/5/6/7/8/9: is deeper than 8 folders and is not read (Unreadable)
        Error dangling.yaml: cannot read: No such file or directory (os error 2) (Unreadable)
        Error device.yaml: is neither a file nor a folder: pipes, sockets and devices are not read (Unreadable)
        Error failing.yaml: cannot read: Input/output error (os error 5) (Unreadable)
        Error fifo.yaml: is neither a file nor a folder: pipes, sockets and devices are not read (Unreadable)
        Error folder: the link leads back to a folder that it is in: remove it (Unreadable)
        Error large.yaml: the file is too large (50 MiB): at most 32 MiB are read (Unreadable)
        Error ping: cannot read: Too many levels of symbolic links (os error 40) (Unreadable)
        Error pong: cannot read: Too many levels of symbolic links (os error 40) (Unreadable)
        Error self.yaml: cannot read: Too many levels of symbolic links (os error 40) (Unreadable)
    "#]]);
}

#[test]
fn a_path_that_is_a_file_or_nothing() {
    let mut fixture = Fixture::new();
    fixture.check(expect![[r#"
        Warning FOLDER: the folder holds no *.yaml, *.yml or *.json file: there is nothing to serve (Unreadable)
    "#]]);
    fixture.source = FileSource::new(fixture.path("config"));
    fixture.check(expect![[r#"
        Error config: cannot read: No such file or directory (os error 2) (Unreadable)
    "#]]);
    fixture.write("config", CLASS);
    fixture.check(expect![[r#"
        GatewayClass tcp at config:2
    "#]]);
    fs::remove_file(fixture.path("config")).unwrap();
    fixture.check(expect![[r#"
        GatewayClass tcp at config:2
        Error config: cannot read: No such file or directory (os error 2); the object read from it before stays in force (Unreadable)
    "#]]);
    rustix::fs::mkfifoat(rustix::fs::CWD, fixture.path("config"), rustix::fs::Mode::RUSR).unwrap();
    fixture.check(expect![[r#"
        GatewayClass tcp at config:2
        Error config: is neither a file nor a folder: pipes, sockets and devices are not read; the object read from it before stays in force (Unreadable)
    "#]]);
}

#[test]
fn the_first_of_two_counts() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", format!("{}{}", service("s", "1"), service("s", "2")));
    fixture.write("b/a.yaml", service("s", "3"));
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Error a.yaml:10: Service default/s: there is an object of this name already at a.yaml:2: this one is ignored; remove it, or give it another name (DuplicateObject)
        Error b/a.yaml:2: Service default/s: there is an object of this name already at a.yaml:2: this one is ignored; remove it, or give it another name (DuplicateObject)
    "#]]);
    // The one that was in force stays so even if its file breaks, rather than the other taking over.
    fixture.write("a.yaml", "a: [");
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Warning a.yaml: a document is not recognised, so that nothing is taken away; the object read from it before stays in force (Malformed)
        Error a.yaml:1: the document is not YAML: unclosed bracket '[' (Malformed)
        Error b/a.yaml:2: Service default/s: there is an object of this name already at a.yaml:2: this one is ignored; remove it, or give it another name (DuplicateObject)
    "#]]);
    let service = &fixture.source.load().manifests.services[&NamespacedName::new("default", "s")];
    assert_eq!(service.spec.ports[0].port, 1);
}

#[test]
fn an_invalid_document_keeps_the_last_good_version() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", service("s", "1"));
    let before = fixture.source.load();
    fixture.write("a.yaml", format!("# moved\n{}{}", service("s", "70000"), service("t", "eighty")));
    fixture.check(expect![[r#"
        Service default/s at a.yaml:3
        Error a.yaml:9: Service default/s: spec.ports[0].port: port 70000 is out of range: use 1 to 65535; the version before stays in force (Invalid)
        Error a.yaml:17: Service default/t: spec.ports[0].port: expected a whole number, found the text "eighty"; the object is refused (Invalid)
    "#]]);
    let after = fixture.source.load();
    let name = NamespacedName::new("default", "s");
    assert!(Arc::ptr_eq(&before.manifests.services[&name], &after.manifests.services[&name]));

    fixture.write("a.yaml", service("s", "1").replace("v1", "v9"));
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Error a.yaml:2: Service default/s: apiVersion: version "v9" of Service is not read: use v1; the version before stays in force (UnsupportedKind)
    "#]]);
    fixture.write("a.yaml", service("s", "2"));
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
    "#]]);
    assert_eq!(fixture.source.load().manifests.services[&name].spec.ports[0].port, 2);
    fixture.write("a.yaml", "");
    fixture.check(expect![[r#"
        Warning FOLDER: holds no object: there is nothing to serve (Unreadable)
    "#]]);
}

#[test]
fn a_broken_file_takes_nothing_away() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", format!("{}{}", service("s", "1"), service("t", "1")));
    fixture.write("b.yaml", service("u", "1"));
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Service default/t at a.yaml:10
        Service default/u at b.yaml:2
    "#]]);
    // The document of `t` is broken, so that it is not known whether `t` was removed.
    fixture
        .write("a.yaml", format!("{}{}", service("s", "1"), service("t", "1").replace("kind:", "kind: [")));
    fs::remove_file(fixture.path("b.yaml")).unwrap();
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Service default/t at a.yaml:10
        Warning a.yaml: a document is not recognised, so that nothing is taken away; the object read from it before stays in force (Malformed)
        Error a.yaml:12: the document is not YAML: illegal placement of ':' indicator (Malformed)
    "#]]);
    fixture.write("a.yaml", b"\xff");
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Service default/t at a.yaml:10
        Error a.yaml:1: the file is not UTF-8: invalid byte at offset 0; the 2 objects read from it before stay in force (Malformed)
    "#]]);
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    symlink("nowhere", fixture.path("a.yaml")).unwrap();
    fixture.check(expect![[r#"
        Service default/s at a.yaml:2
        Service default/t at a.yaml:10
        Error a.yaml: cannot read: No such file or directory (os error 2); the 2 objects read from it before stay in force (Unreadable)
    "#]]);
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    fixture.write("b.yaml", "# nothing");
    fixture.check(expect![[r#"
        Warning FOLDER: holds no object: there is nothing to serve (Unreadable)
    "#]]);
}

#[test]
fn a_folder_that_vanished_takes_nothing_away() {
    let mut fixture = Fixture::new();
    fixture.write("conf/a.yaml", service("s", "1"));
    fixture.write("conf/b.yaml", "a: [");
    fixture.source = FileSource::new(fixture.path("conf"));
    fixture.show();
    fs::rename(fixture.path("conf"), fixture.path("gone")).unwrap();
    fixture.check(expect![[r#"
        Service default/s at conf/a.yaml:2
        Error conf: cannot read: No such file or directory (os error 2); the object read from it before stays in force (Unreadable)
    "#]]);
    fs::rename(fixture.path("gone"), fixture.path("conf")).unwrap();
    fixture.check(expect![[r#"
        Service default/s at conf/a.yaml:2
        Error conf/b.yaml:1: the document is not YAML: unclosed bracket '[' (Malformed)
    "#]]);
}

#[test]
fn unchanged_objects_are_shared() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", format!("{}{}", service("s", "1"), service("t", "1")));
    let before = fixture.source.load();
    assert_eq!(before, fixture.source.load());
    fixture.write("a.yaml", format!("# comment\n{}{}", service("s", "1"), service("t", "2")));
    let after = fixture.source.load();
    let (s, t) = (NamespacedName::new("default", "s"), NamespacedName::new("default", "t"));
    assert!(Arc::ptr_eq(&before.manifests.services[&s], &after.manifests.services[&s]));
    assert!(!Arc::ptr_eq(&before.manifests.services[&t], &after.manifests.services[&t]));
    assert_ne!(before.locations, after.locations);
}

#[test]
fn problems_of_later_stages_get_their_line() {
    let mut fixture = Fixture::new();
    fixture.write(
        "a.yaml",
        "
apiVersion: v1
kind: Service
metadata:
  name: s
  annotations:
    forwarder.dev/idle: a
    forwarder.dev/idle.more: b
spec:
  ports:
  - port: 1
  - name: x
    port: 2
"
        .replace("- port: 1", "- {name: y, port: 1}"),
    );
    let loaded = fixture.source.load();
    assert_eq!(*loaded.problems, []);
    let object =
        ObjectRef::new(forwarder_gateway::manifests::Kind::Service, &NamespacedName::new("default", "s"));
    for (field, line) in [
        ("", 2),
        ("spec", 9),
        ("spec.ports[0].port", 11),
        ("spec.ports[1].port", 13),
        ("spec.ports[1].protocol", 12),
        ("spec.ports[7].port", 10),
        ("spec.type", 9),
        ("status", 2),
        ("metadata.annotations[forwarder.dev/idle]", 7),
        ("metadata.annotations[\"forwarder.dev/idle\"]", 7),
        ("metadata.annotations.forwarder.dev/idle", 7),
        ("metadata.annotations.forwarder.dev/idle.more", 8),
        ("metadata.annotations[forwarder.dev/none]", 6),
        ("[[..]", 2),
    ] {
        let mut problem = Problem::error(Reason::Invalid, object.clone(), field, "");
        loaded.locations.locate(&mut problem);
        assert_eq!(problem.location.unwrap().line, line, "{field}");
    }
    let mut elsewhere = Problem::error(
        Reason::Invalid,
        ObjectRef::cluster(forwarder_gateway::manifests::Kind::Namespace, "x"),
        "",
        "",
    );
    loaded.locations.locate(&mut elsewhere);
    assert_eq!(elsewhere.location, None);
}

/// Text that gets past the first checks more often than random bytes do.
fn near_manifests() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("apiVersion: v1\n".to_owned()),
        Just("apiVersion: gateway.networking.k8s.io/v1\n".to_owned()),
        Just("kind: Service\n".to_owned()),
        Just("kind: Gateway\n".to_owned()),
        Just("kind: List\nitems:\n- ".to_owned()),
        Just("metadata: {name: a, labels: {a: &x b}}\n".to_owned()),
        Just("spec:\n  listeners:\n  - *x\n".to_owned()),
        Just("spec: {ports: [{port: 1}]}\n".to_owned()),
        Just("---\n".to_owned()),
        Just("...\n".to_owned()),
        Just("  ".to_owned()),
        "[\\[\\]{}:,&*!|>'\"%@`#?~\t\r\n -]{1,4}",
        "\\PC{0,8}",
    ];
    prop::collection::vec(word, 0..24).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(first in prop::collection::vec(any::<u8>(), 0..256), second in near_manifests()) {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", first);
        fixture.write("b.yaml", &second);
        fixture.source.load();
        fixture.write("a.yaml", second);
        let loaded = fixture.source.load();
        for problem in &*loaded.problems {
            prop_assert!(problem.location.is_some(), "{problem}");
            prop_assert!(!problem.message.contains('\n'), "{problem}");
        }
    }
}

#[test]
fn a_typo_leaves_the_version_before_in_force() {
    let route = |kind: &str, field: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r}}\nspec:\n  parentRefs:\n  - name: gw\n    \
             {field}: a\n  rules: [{{backendRefs: [{{name: s, port: 1}}]}}]\n"
        )
    };
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", route("TCPRoute", "sectionName"));
    fixture.check(expect![[r#"
        TCPRoute default/r at a.yaml:1
    "#]]);
    fixture.write("a.yaml", route("TCPRoute", "sectionname"));
    fixture.check(expect![[r#"
        TCPRoute default/r at a.yaml:1
        Error a.yaml:7: TCPRoute default/r: spec.parentRefs[0].sectionname: unknown field (did you mean sectionName?); the version before stays in force (UnknownField)
    "#]]);
    fixture.write("a.yaml", route("TcpRoute", "sectionName"));
    fixture.check(expect![[r#"
        TCPRoute default/r at a.yaml:1
        Warning a.yaml: a document is not recognised, so that nothing is taken away; the object read from it before stays in force (Malformed)
        Error a.yaml:1: TcpRoute r: kind: unknown kind TcpRoute of gateway.networking.k8s.io (did you mean TCPRoute?) (UnsupportedKind)
    "#]]);
}
