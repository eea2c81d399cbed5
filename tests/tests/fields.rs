//! The fields that the agent takes for known are those that exist.

use std::env;
use std::fs;
use std::path::Path;

use forwarder_tests::ApiServer;
use forwarder_tests::apiserver::{fields, require_kubernetes};

/// Where the agent has them.
const TABLE: &str = "../forwarder-source/src/fields.txt";
const HEAD: &str = "\
# The fields of the kinds that the forwarder reads, in any release of Gateway API and in Kubernetes: facts taken from their schemas
# (both under the Apache License 2.0) by `FORWARDER_WRITE_FIELDS=1 cargo xtask test fields`, which also checks them.
# A kind and a path: `[]` is an item of a list, `{}` the value of a map with free keys, `*` anything. A kind alone is not read.
";

#[test]
fn the_known_fields_are_those_of_every_release() {
    if !require_kubernetes() {
        return;
    }
    let server = ApiServer::start().expect("it works");
    let table = fields::table(&server.api().expect("it works")).expect("schemas");
    let lines: Vec<String> = table.into_iter().collect();
    let text = format!("{HEAD}{}\n", lines.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE);
    if env::var_os("FORWARDER_WRITE_FIELDS").is_some() {
        fs::write(&path, text).expect("the source can be written");
        return;
    }
    let present = fs::read_to_string(&path).expect("it is there");
    let differs = present
        .lines()
        .filter(|line| !text.contains(line))
        .chain(text.lines().filter(|line| !present.contains(line)));
    let differing: Vec<&str> = differs.collect();
    assert!(differing.is_empty() && present == text, "not current: {differing:#?}");
}
