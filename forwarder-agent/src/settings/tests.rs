use super::*;

fn from_text(text: &str) -> Result<Options, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Options::from_file(file.path()).map_err(|error| error.to_string())
}

#[test]
fn a_flag_wins_over_the_file() {
    let file = from_text("workers: 7\nidleTimeout: 1h\nadmin: off\n").unwrap();
    let flags = Options { workers: Some(2), manifests: Some("m".into()), ..Options::default() };
    let settings = flags.or(file).validate().unwrap();
    assert_eq!(settings.workers, 2);
    assert_eq!(settings.listener_defaults.idle_timeout, Some(Duration::from_hours(1)));
    assert_eq!(settings.admin.address, None);
}

#[test]
fn a_rule_that_refuses_nothing_by_itself_is_refused() {
    let outcome = |text: &str| {
        let options = Options { manifests: Some("m".into()), ..from_text(text).unwrap() };
        options.validate().map(drop).map_err(|error| error.to_string())
    };
    let message = "setting listener-ports cannot be `1024-65535`: it changes nothing, because no rule with `!` refuses one of these \
                   ports; remove it, or add `!1-65535` to refuse all others";
    assert_eq!(outcome("listenerPorts: ['1024-65535']\n"), Err(message.to_owned()));
    assert_eq!(outcome("listenerPorts: ['!1-65535', '1024-65535']\n"), Ok(()));
    assert!(
        outcome("endpointCidrs: [10.0.0.0/8]\n")
            .unwrap_err()
            .contains("endpoint-cidrs cannot be `10.0.0.0/8`")
    );
    assert_eq!(outcome("endpointCidrs: ['!0.0.0.0/0', 10.0.0.0/8]\n"), Ok(()));
}

#[test]
fn networks_of_clients_say_something_or_are_refused() {
    let outcome = |text: &str| {
        let options = Options { manifests: Some("m".into()), ..from_text(text)? };
        let settings = options.validate().map_err(|error| error.to_string())?;
        Ok::<_, String>(settings.listener_defaults.client_cidrs.rules().len())
    };
    assert_eq!(outcome("clientCidrs: ['!10.0.0.0/8', 10.1.0.0/16]\n"), Ok(2));
    let error = outcome("clientCidrs: [10.0.0.0/8]\n").unwrap_err();
    assert!(error.contains("client-cidrs cannot be `10.0.0.0/8`: it changes nothing"), "{error}");
    let error = outcome("clientCidrs: ['!::ffff:10.0.0.0/104']\n").unwrap_err();
    assert!(error.contains("write it as one of IPv4"), "{error}");
    let error = outcome("clientRate: 1000001\n").unwrap_err();
    assert!(error.contains("client-rate cannot be 1000001"), "{error}");
    // Without quotes, `!` is a tag of YAML: never a list that refuses less than was meant.
    for text in [
        "clientCidrs: [!10.0.0.0/8]\n",
        "clientCidrs: [!10.0.0.0/8 10.1.0.0/16]\n",
        "clientCidrs:\n- !10.0.0.0/8\n",
    ] {
        outcome(text).expect_err(text);
    }
}

#[test]
fn the_admin_endpoint_has_a_socket_a_group_and_names() {
    let admin = |text: &str| {
        let options = Options { manifests: Some("m".into()), ..from_text(text).unwrap() };
        options.validate().map(|settings| settings.admin).map_err(|error| error.to_string())
    };
    let unset = admin("").unwrap();
    assert_eq!((unset.address, unset.group), (Some(ADMIN), None));
    assert_eq!(unset.socket.as_deref(), Some(Path::new(ADMIN_SOCKET)));
    assert_eq!(admin("adminSocket: off\n").unwrap().socket, None);
    assert_eq!(admin("adminSocketGroup: 27\n").unwrap().group, Some(GroupName::Id(27)));
    let named = admin("adminSocketGroup: sudo\nadminHosts: [metrics.example.com]\n").unwrap();
    assert_eq!(named.group, Some(GroupName::Name("sudo".into())));
    assert_eq!(named.hosts, ["metrics.example.com"]);
    assert!(admin("adminHosts: ['metrics.example.com:9902']\n").unwrap_err().contains("without a port"));
    assert!(from_text("adminSocket: admin.sock\n").unwrap_err().contains("`admin.sock`"));
}

#[test]
fn an_unknown_key_is_refused_by_name() {
    let message = from_text("manifests: m\nidleTimout: 5m\n").unwrap_err();
    assert!(message.ends_with(":2: unknown key idleTimout; did you mean idleTimeout?"), "{message}");
    let message = from_text("kube:\n  enabeld: true\n").unwrap_err();
    assert!(message.ends_with(":2: unknown key enabeld; did you mean enabled?"), "{message}");
    let message = from_text("colour: red\n").unwrap_err();
    assert!(message.contains(":1: unknown key colour; there are manifests, "), "{message}");
    for (text, end) in
        [("workers: many\n", ":1: "), ("manifests: m\nadmin: 9902\n", ":2: "), ("manifests: [\n", ": ")]
    {
        let message = from_text(text).unwrap_err();
        assert!(message.contains(end) && !message.contains('\n'), "{message}");
    }
}

#[test]
fn a_bad_duration_names_the_value() {
    let message = from_text("idleTimeout: soon\n").unwrap_err();
    assert!(message.contains("`soon`"), "{message}");
}

#[test]
fn what_is_removed_is_kept_drained_or_reset() {
    for (text, window) in [
        ("", None),
        ("onRemoval: keep\nremovalDrain: 5s\n", None),
        ("onRemoval: drain\n", Some(ListenerSettings::default().removal_drain)),
        ("onRemoval: drain\nremovalDrain: 5s\n", Some(Duration::from_secs(5))),
        ("onRemoval: reset\nremovalDrain: 5s\n", Some(Duration::ZERO)),
    ] {
        let defaults = from_text(text).unwrap().listener_defaults().unwrap();
        assert_eq!(defaults.removal_window(), window, "{text}");
    }
    assert!(from_text("onRemoval: kill\n").is_err());
}

#[test]
fn the_folder_of_the_state_is_a_general_setting_and_may_still_stand_below_kube() {
    for text in ["manifests: /m\nstateDir: /s\n", "manifests: /m\nkube: {stateDir: /s}\n"] {
        let settings = from_text(text).unwrap().validate().unwrap();
        let SourceSettings::Files { state_dir, .. } = settings.source else { panic!("no files") };
        assert_eq!(state_dir.as_deref(), Some(Path::new("/s")), "{text}");
    }
    let settings = from_text("kube: {enabled: true}\nstateDir: /s\n").unwrap().validate().unwrap();
    let SourceSettings::Kube(kube) = settings.source else { panic!("no API") };
    assert_eq!(kube.state_dir.as_deref(), Some(Path::new("/s")));
    for text in ["manifests: /m\nstateDir: /m\n", "manifests: /m/\nstateDir: /m/.state\n"] {
        let error = from_text(text).unwrap().validate().unwrap_err().to_string();
        assert!(error.contains("state-dir"), "{error}");
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let base = || Options { manifests: Some("m".into()), ..Options::default() };
    for options in [
        Options { workers: Some(0), ..base() },
        Options { syn_cookies_above: Some(1_000_001), ..base() },
        Options { connect_timeout: Some(DurationText(Duration::ZERO)), ..base() },
        Options { controller_name: Some("forwarder".into()), ..base() },
        Options::default(),
    ] {
        assert!(options.clone().validate().is_err(), "{options:?}");
    }
}
