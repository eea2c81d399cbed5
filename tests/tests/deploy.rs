//! What a cluster is given: the Helm chart, the manifests for kustomize, and the examples.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use forwarder_tests::ApiServer;
use forwarder_tests::agent::binary;
use forwarder_tests::apiserver::{ADMIN, Channel, require_kubernetes};
use forwarder_tests::chart::{
    MONITORED, NAMESPACE, chart, container, objects, only, plain, render, tool, workspace,
};
use forwarder_tests::process;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The text of every string in a value.
fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(values) => values.iter().flat_map(strings).collect(),
        Value::Object(values) => values.values().flat_map(strings).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

/// The rules of every role among objects: the namespace of the role, a resource, and its verbs.
fn permissions(objects: &[Value]) -> BTreeMap<(String, String), BTreeSet<String>> {
    let mut found: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    let roles = objects.iter().filter(|object| object["kind"] == "ClusterRole" || object["kind"] == "Role");
    for role in roles {
        let namespace = role["metadata"]["namespace"].as_str().unwrap_or("*");
        for rule in role["rules"].as_array().expect("a list") {
            assert!(rule["nonResourceURLs"].is_null());
            for resource in strings(&rule["resources"]) {
                // Whole objects that are not the agent's own are written by name alone, and of DaemonSets it sees its own.
                let is_named = rule["resourceNames"].is_array();
                match resource {
                    "gatewayclasses" => assert_eq!(strings(&rule["verbs"]).contains(&"patch"), is_named),
                    "daemonsets" => assert!(is_named),
                    _ => {}
                }
                let verbs = strings(&rule["verbs"]).into_iter().map(str::to_owned);
                found.entry((namespace.to_owned(), resource.to_owned())).or_default().extend(verbs);
            }
        }
    }
    found
}

/// What holds of every installation.
fn check(objects: &[Value]) {
    let container = container(objects);
    assert_eq!(
        container["securityContext"],
        json!({
            "runAsUser": 0,
            "runAsGroup": 0,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE", "NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]},
            "seLinuxOptions": {"level": "s0", "type": "spc_t"},
        })
    );
    let daemon_set = only(objects, "DaemonSet");
    let pod = &daemon_set["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(pod["hostNetwork"], true);
    assert!(pod["hostPID"].is_null() && pod["hostIPC"].is_null());
    assert_eq!(daemon_set["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"], 0);
    let labels = &daemon_set["spec"]["template"]["metadata"]["labels"];
    for (label, value) in daemon_set["spec"]["selector"]["matchLabels"].as_object().expect("an object") {
        assert_eq!(labels[label], *value);
    }
    for ((namespace, resource), verbs) in permissions(objects) {
        let place = format!("{resource} in {namespace}: {verbs:?}");
        assert!(!resource.contains('*') && !verbs.contains("*"), "{place}");
        let may_write = verbs.iter().any(|verb| !["get", "list", "watch"].contains(&verb.as_str()));
        let is_written = resource.ends_with("/status")
            || ["gatewayclasses", "events", "leases"].contains(&resource.as_str());
        assert!(!may_write || is_written, "{place}");
        assert!(!resource.starts_with("secrets") && !resource.starts_with("configmaps"), "{place}");
    }
    for binding in
        objects.iter().filter(|object| object["kind"].as_str().expect("a text").ends_with("RoleBinding"))
    {
        assert_eq!(binding["subjects"].as_array().expect("a list").len(), 1);
        assert_eq!(binding["subjects"][0]["name"], pod["serviceAccountName"]);
    }
}

/// The names of the classes that the agent may write as a whole.
fn classes_written(objects: &[Value]) -> Value {
    let of_cluster = objects.iter().filter(|object| object["kind"] == "ClusterRole");
    let mut rules = of_cluster.flat_map(|role| role["rules"].as_array().expect("a list"));
    let rule = rules.find(|rule| {
        rule["resources"] == json!(["gatewayclasses"]) && strings(&rule["verbs"]).contains(&"patch")
    });
    rule.expect("a rule")["resourceNames"].clone()
}

fn environment(objects: &[Value]) -> BTreeMap<&str, &Value> {
    let variables = container(objects)["env"].as_array().expect("a list");
    variables.iter().map(|variable| (variable["name"].as_str().expect("a text"), variable)).collect()
}

#[test]
fn helm_finds_no_fault_with_the_chart() {
    let Some(helm) = tool("helm") else { return };
    for values in [&[][..], &MONITORED] {
        process::stdout(Command::new(&helm).args(["lint", "--strict"]).args(values).arg(chart())).unwrap();
    }
}

#[test]
fn the_agent_gets_the_least_that_it_needs() {
    let Some(helm) = tool("helm") else { return };
    check(&objects(&render(&helm, &MONITORED).unwrap()).unwrap());
    let objects = objects(&render::<&str>(&helm, &[]).unwrap()).unwrap();
    check(&objects);
    let permissions = permissions(&objects);
    let verbs = |namespace: &str, resource: &str| {
        let verbs = permissions.get(&(namespace.to_owned(), resource.to_owned()));
        verbs.map(|verbs| verbs.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
    };
    for resource in ["gateways", "listenersets", "tcproutes", "referencegrants", "services", "namespaces"] {
        assert_eq!(verbs("*", resource).as_deref(), Some("get list watch"), "{resource}");
    }
    assert_eq!(verbs("*", "endpointslices").as_deref(), Some("get list watch"));
    assert_eq!(verbs("*", "customresourcedefinitions").as_deref(), Some("get list watch"));
    assert_eq!(verbs("*", "gatewayclasses").as_deref(), Some("get list patch watch"));
    for kind in ["gatewayclasses", "gateways", "listenersets", "tcproutes"] {
        assert_eq!(verbs("*", &format!("{kind}/status")).as_deref(), Some("patch"), "{kind}");
    }
    assert_eq!(classes_written(&objects), json!(["forwarder"]));
    assert_eq!(verbs("*", "events").as_deref(), Some("create patch"));
    assert_eq!(verbs("forwarder-system", "pods").as_deref(), Some("get list watch"));
    let of_leases = "create delete get list patch update watch";
    assert_eq!(verbs("forwarder-system", "leases").as_deref(), Some(of_leases));
    assert_eq!(verbs("forwarder-system", "daemonsets").as_deref(), Some("get"));
    assert_eq!(permissions.len(), 17, "{permissions:?}");
}

#[test]
fn namespaces_that_are_not_served_are_not_seen() {
    let Some(helm) = tool("helm") else { return };
    let rendered = render(&helm, &["--set-json=watchNamespaces=[\"one\",\"two\"]"]).unwrap();
    let objects = objects(&rendered).unwrap();
    check(&objects);
    assert_eq!(environment(&objects)["FORWARDER_WATCH_NAMESPACES"]["value"], "one,two");
    let of_cluster = ["customresourcedefinitions", "gatewayclasses", "gatewayclasses/status", "namespaces"];
    let of_release = ["daemonsets", "leases", "pods"];
    let of_namespace = [
        "endpointslices",
        "events",
        "gateways",
        "gateways/status",
        "listenersets",
        "listenersets/status",
        "referencegrants",
        "services",
        "tcproutes",
        "tcproutes/status",
    ];
    let expected: BTreeSet<(String, String)> = [
        ("*", &of_cluster[..]),
        ("forwarder-system", &of_release),
        ("one", &of_namespace),
        ("two", &of_namespace),
    ]
    .into_iter()
    .flat_map(|(namespace, resources)| {
        resources.iter().map(move |resource| (namespace.to_owned(), (*resource).to_owned()))
    })
    .collect();
    assert_eq!(permissions(&objects).into_keys().collect::<BTreeSet<_>>(), expected);
    // Each role is bound.
    let of_kind = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).count();
    assert_eq!((of_kind("Role"), of_kind("RoleBinding")), (3, 3));
}

#[test]
fn values_reach_the_agent() {
    let Some(helm) = tool("helm") else { return };
    let values = [
        "--set-json=settings={\"maxPairs\":1000000,\"halfClosedTimeout\":\"1h 30m\",\"hold\":\"0\",\"workers\":4}",
        "--set=drainTimeoutSeconds=300,admin.address=::1,admin.port=9903,bpf.pinDirectory=second",
        "--set=controllerName=example.com/second,gatewayClass.name=second,gatewayClass.otherNames={third}",
        "--set-json=admin.hosts=[\"metrics.example.com\",\"node\"]",
        "--set-json=extraArgs=[\"--egress=stack\"]",
        "--set-json=extraEnv=[{\"name\":\"RUST_BACKTRACE\",\"value\":\"1\"}]",
    ];
    let objects = objects(&render(&helm, &values).unwrap()).unwrap();
    check(&objects);
    let environment = environment(&objects);
    for (name, value) in [
        ("FORWARDER_MAX_PAIRS", "1000000"),
        ("FORWARDER_HALF_CLOSED_TIMEOUT", "1h 30m"),
        ("FORWARDER_HOLD", "0"),
        ("FORWARDER_WORKERS", "4"),
        ("FORWARDER_DRAIN_TIMEOUT", "300s"),
        ("FORWARDER_ADMIN", "[::1]:9903"),
        ("FORWARDER_ADMIN_HOSTS", "metrics.example.com,node"),
        ("FORWARDER_ADMIN_SOCKET", "/run/forwarder/admin.sock"),
        ("FORWARDER_PIN_DIR", "/bpf/second"),
        ("FORWARDER_CONTROLLER_NAME", "example.com/second"),
        ("RUST_BACKTRACE", "1"),
    ] {
        assert_eq!(environment.get(name).map(|variable| &variable["value"]), Some(&json!(value)), "{name}");
    }
    assert!(!environment.contains_key("FORWARDER_EGRESS"), "what nobody sets has the agent's own default");
    assert_eq!(container(&objects)["args"], json!(["agent", "--egress=stack"]));
    assert_eq!(container(&objects)["livenessProbe"]["httpGet"]["host"], "::1");
    assert_eq!(only(&objects, "GatewayClass")["spec"]["controllerName"], "example.com/second");
    assert_eq!(classes_written(&objects), json!(["second", "third"]));
    let pod = &only(&objects, "DaemonSet")["spec"]["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 310);
}

#[test]
fn nodes_without_a_bpf_file_system_have_nothing_of_it_mounted() {
    let Some(helm) = tool("helm") else { return };
    let objects = objects(&render(&helm, &["--set=bpf.enabled=false"]).unwrap()).unwrap();
    let volumes = &only(&objects, "DaemonSet")["spec"]["template"]["spec"]["volumes"];
    for list in [volumes, &container(&objects)["volumeMounts"]] {
        let names: Vec<_> = list.as_array().unwrap().iter().map(|entry| &entry["name"]).collect();
        assert_eq!(names, ["state", "run"]);
    }
}

#[test]
fn the_agent_knows_every_variable_that_it_is_given() {
    let Some(helm) = tool("helm") else { return };
    let usage = process::stdout(Command::new(binary()).args(["agent", "--help"])).unwrap();
    let settings: serde_json::Map<String, Value> = serde_saphyr::from_str::<Value>(
        &fs::read_to_string(chart().join("values.yaml")).unwrap(),
    )
    .unwrap()["settings"]
        .as_object()
        .unwrap()
        .clone();
    // One value that each of the settings may have.
    let value = |name: &str| match name {
        "datapath" | "egress" | "sourcePorts" => "auto",
        "onRemoval" => "keep",
        "maxPairs" | "maxDirect" | "synCookiesAbove" | "clientRate" | "workers" => "1",
        "sockmapMemory" => "1MiB",
        "listenerPorts" => "{!1-1023,80-88}",
        "endpointCidrs" | "clientCidrs" => "{!10.0.0.0/8,10.1.0.0/16}",
        "xdp" => "native",
        _ => "1s",
    };
    let set: Vec<String> =
        settings.keys().map(|name| format!("--set=settings.{name}={}", value(name))).collect();
    let arguments: Vec<&str> = set
        .iter()
        .map(String::as_str)
        .chain(["--set-json=watchNamespaces=[\"a\"]", "--set-json=admin.hosts=[\"a\"]"])
        .collect();
    let objects = objects(&render(&helm, &arguments).unwrap()).unwrap();
    let environment = environment(&objects);
    assert!(environment.len() > settings.len());
    for name in environment.keys() {
        assert!(usage.contains(&format!("[env: {name}=")), "the agent takes no {name}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let Some(helm) = tool("helm") else { return };
    for (argument, word) in [
        ("--set=imgae.tag=1", "imgae"),
        ("--set=settings.datapath=fast", "datapath"),
        ("--set=settings.maxPair=1", "maxPair"),
        ("--set=settings.hold=soon", "hold"),
        ("--set=settings.listenerPorts={mysql}", "listenerPorts"),
        ("--set=settings.endpointCidrs={db}", "endpointCidrs"),
        ("--set=settings.clientCidrs={everybody}", "clientCidrs"),
        ("--set=settings.xdp=fast", "xdp"),
        ("--set=drainTimeoutSeconds=30s", "drainTimeoutSeconds"),
        ("--set=controllerName=forwarder", "controllerName"),
        ("--set=admin.port=0", "port"),
        ("--set=admin.address=off", "address"),
        ("--set-json=admin.hosts=[\"a:9902\"]", "hosts"),
        ("--set=bpf.pinDirectory=a.b", "pinDirectory"),
        ("--set=state.hostPath=var/lib", "hostPath"),
        ("--set-json=capabilities=[\"ALL\"]", "capabilities"),
        ("--set-json=capabilities=[\"CAP_BPF\"]", "capabilities"),
        ("--set-json=watchNamespaces=[\"a,b\"]", "watchNamespaces"),
        ("--set=updateStrategy.maxUnavailable=0", "maxUnavailable"),
        ("--set=image.digest=abc", "digest"),
        ("--set=serviceMonitor.enabled=true", "loopback"),
    ] {
        let error = render(&helm, &[argument]).expect_err(argument).to_string();
        assert!(error.contains(word), "{argument}: {error}");
    }
}

#[test]
fn every_value_is_described() {
    let values = fs::read_to_string(chart().join("values.yaml")).unwrap();
    let readme = fs::read_to_string(chart().join("README.md")).unwrap();
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let values: Value = serde_saphyr::from_str(&values).unwrap();
    for (name, value) in values.as_object().unwrap() {
        let properties = &schema["properties"][name];
        assert!(properties.is_object(), "{name} is not in the schema");
        // What has properties of its own is described by these.
        let inner = properties["properties"]
            .as_object()
            .filter(|_| name != "seLinuxOptions" && name != "seccompProfile");
        let Some(inner) = inner else {
            assert!(readme.contains(&format!("`{name}`")), "README.md does not tell of {name}");
            continue;
        };
        let known: BTreeSet<_> = inner.keys().collect();
        assert_eq!(value.as_object().unwrap().keys().collect::<BTreeSet<_>>(), known, "{name}");
        for key in known {
            assert!(readme.contains(&format!("`{name}.{key}`")), "README.md does not tell of {name}.{key}");
        }
    }
}

#[test]
fn the_manifests_for_kustomize_are_the_charts_defaults() {
    let Some(helm) = tool("helm") else { return };
    let path = workspace().join("deploy/kustomize/base/forwarder.yaml");
    let header = "# What the Helm chart makes of its defaults: change the chart, and run\n\
                  # `UPDATE_EXPECT=1 cargo test --package forwarder-tests --test deploy`.\n";
    let expected = format!("{header}{}", plain(&helm).unwrap());
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, &expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap();
    assert!(found == expected, "{} is not what the chart makes: UPDATE_EXPECT=1 rewrites it", path.display());

    let Some(kubectl) = tool("kubectl") else { return };
    let build = |folder: &str| {
        let folder = workspace().join("deploy/kustomize").join(folder);
        objects(&process::stdout(Command::new(&kubectl).arg("kustomize").arg(folder)).unwrap()).unwrap()
    };
    let base = build("base");
    check(&base);
    assert_eq!(only(&base, "Namespace")["metadata"]["name"], "forwarder-system");
    let overlay = build("overlays/example");
    check(&overlay);
    assert_eq!(container(&overlay)["image"], "registry.example.com/forwarder:0.1.0");
    let (of_base, of_overlay) = (environment(&base), environment(&overlay));
    assert!(of_base.iter().all(|(name, variable)| of_overlay.get(name) == Some(variable)));
    assert_eq!(of_overlay["FORWARDER_HOLD"]["value"], "60s");

    // Of the node's BPF file system the agent has its own directory alone, which the kubelet makes.
    for objects in [&base, &overlay] {
        let of_pins = |list: &Value| {
            let all = list.as_array().expect("a list").iter();
            all.filter(|one| one["name"] == "pins").cloned().collect::<Vec<_>>()
        };
        let volume = json!({ "path": "/sys/fs/bpf/forwarder", "type": "DirectoryOrCreate" });
        let pod = &only(objects, "DaemonSet")["spec"]["template"]["spec"];
        assert_eq!(of_pins(&pod["volumes"]), [json!({ "name": "pins", "hostPath": volume })]);
        let mounts = of_pins(&container(objects)["volumeMounts"]);
        let place = &environment(objects)["FORWARDER_PIN_DIR"]["value"];
        assert_eq!(mounts, [json!({ "name": "pins", "mountPath": place })]);
    }

    // Cleaning up concerns the pins of the very installation.
    let cleanup = build("cleanup");
    let pod = &only(&cleanup, "DaemonSet")["spec"]["template"]["spec"];
    let pins = |variable: &Value| {
        variable["name"] == "FORWARDER_PIN_DIR" && *variable == *of_base["FORWARDER_PIN_DIR"]
    };
    assert!(pod["initContainers"][0]["env"].as_array().unwrap().iter().any(pins));
    assert_eq!(pod["initContainers"][0]["image"], container(&base)["image"]);
}

/// Validates files together, as `kubectl apply` would see them.
fn validate(files: &[&str]) -> Value {
    let folder = TempDir::with_prefix("forwarder-tests-").expect("a folder");
    for file in files {
        fs::copy(workspace().join("examples/kubernetes").join(file), folder.path().join(file))
            .expect("a copy");
    }
    let mut command = Command::new(binary());
    command.args(["validate", "--output", "json"]).arg(folder.path());
    serde_json::from_str(&process::stdout(&mut command).expect("a report")).expect("valid text")
}

#[test]
fn the_examples_are_valid() {
    for routes in ["routes-v1.yaml", "routes-v1alpha2.yaml"] {
        let report = validate(&["gatewayclass.yaml", "gateway.yaml", "databases.yaml", routes]);
        let reasons: BTreeSet<&str> = report["problems"]
            .as_array()
            .unwrap()
            .iter()
            .map(|problem| problem["reason"].as_str().unwrap())
            .collect();
        // Files have neither StatefulSets nor the EndpointSlices that a cluster makes of them.
        assert_eq!(reasons, BTreeSet::from(["NoEndpoints", "UnsupportedKind"]), "{routes}");
        let listeners = report["listeners"].as_array().unwrap();
        let leads: Vec<(&Value, &Value)> =
            listeners.iter().map(|listener| (&listener["listener"], &listener["route"])).collect();
        assert_eq!(
            leads,
            [
                (&json!("databases/databases/orders"), &json!("databases/orders")),
                (&json!("databases/databases/users"), &json!("databases/users")),
            ]
        );
    }
}

/// Has an API server check a file or, with `-k`, a folder, without keeping anything of it.
fn dry_run(server: &ApiServer, flag: &str, path: &Path) {
    let path = path.to_str().expect("a path in UTF-8");
    let arguments = ["apply", "--server-side", "--dry-run=server", "--validate=strict", flag, path];
    let printed = server.kubectl(ADMIN, &arguments).expect("an API server that takes it");
    assert!(printed.lines().count() > 0 && printed.lines().all(|line| line.contains("dry run")), "{printed}");
}

#[test]
fn an_api_server_takes_what_it_would_be_given() {
    if !require_kubernetes() {
        return;
    }
    let Some(helm) = tool("helm") else { return };
    let server = ApiServer::start().unwrap();
    let api = server.api().unwrap();
    api.install_crds("v1.6.1", Channel::Standard).unwrap();
    // A dry run makes no namespace for what comes after it.
    for namespace in [NAMESPACE, "databases", "a"] {
        api.create_namespace(namespace).unwrap();
    }
    let folder = TempDir::new().unwrap();
    // The kinds of monitoring are not installed here.
    for (name, values) in
        [("defaults.yaml", None), ("namespaces.yaml", Some("--set-json=watchNamespaces=[\"a\"]"))]
    {
        let file = folder.path().join(name);
        fs::write(&file, render(&helm, &values.into_iter().collect::<Vec<_>>()).unwrap()).unwrap();
        dry_run(&server, "-f", &file);
    }
    for overlay in ["base", "overlays/example"] {
        dry_run(&server, "-k", &workspace().join("deploy/kustomize").join(overlay));
    }
    for file in ["gatewayclass.yaml", "gateway.yaml", "databases.yaml", "routes-v1.yaml"] {
        dry_run(&server, "-f", &workspace().join("examples/kubernetes").join(file));
    }
}
