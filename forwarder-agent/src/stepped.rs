//! The agent that tests stop at steps: see the module `failpoint`.

fn main() -> std::process::ExitCode {
    forwarder_agent::cli::run()
}
