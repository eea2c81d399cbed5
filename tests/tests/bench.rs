//! The benchmark, with the least effort: that it measures and reports, not what.

use std::fs;
use std::path::Path;
use std::process::Command;

use forwarder_tests::database::require_program;
use forwarder_tests::process::stdout;
use forwarder_tests::require_root;
use serde_json::Value;
use tempfile::TempDir;

/// One metric, with the least effort.
const QUICK: [&str; 5] = ["--quick", "--rounds", "1", "--only", "connections"];

#[test]
fn each_path_is_measured_and_reported_as_json() {
    if !require_root() || !require_program("haproxy") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("bench.json");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bench"));
    bench.args(QUICK).args(["--only", "splice", "--json"]).arg(&file);
    let table = stdout(&mut bench).unwrap();
    let document: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let results = document["results"].as_array().unwrap();
    let paths: Vec<&str> = results.iter().map(|result| result["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["routing", "haproxy", "splice"]);
    for result in results {
        assert_eq!(result["metric"], "connections");
        assert!(result["median"].as_f64().unwrap() > 0.0, "{result}");
        assert!(result["vs_haproxy"].as_f64().unwrap() > 0.0, "{result}");
        assert!(table.contains(result["path"].as_str().unwrap()), "{table}");
    }
    assert_eq!(document["failures"], serde_json::json!([]));
}

/// Few kernels of test machines have virtual servers; those in `cargo xtask vm` do.
#[test]
fn a_virtual_server_is_measured_where_the_kernel_has_them_and_refused_elsewhere() {
    if !require_root() || !require_program("haproxy") || !require_program("ipvsadm") {
        return;
    }
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = bench.args(QUICK).args(["--only", "ipvs"]).output().unwrap();
    let [table, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    if Path::new("/proc/net/ip_vs").exists() {
        assert!(output.status.success(), "{errors}");
        assert!(table.contains("ipvs"), "{table}");
    } else {
        assert!(!output.status.success(), "{table}");
        assert!(errors.contains("ipvs is not available here: the kernel has no virtual servers"), "{errors}");
    }
}
