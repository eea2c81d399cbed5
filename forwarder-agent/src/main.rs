//! The `forwarder` binary: parses the command line and exits with its code.

fn main() -> std::process::ExitCode {
    forwarder_agent::cli::run()
}
