//! `forwarder validate`: what an agent would report of a folder of manifests, without running one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use ipnet::IpNet;

use super::{Output, print_json};
use crate::resolver::Resolver;
use crate::settings::{Options, check_rules};
use crate::view::{ProblemView, State};
use forwarder_gateway::allowed::{AllowedAddresses, AllowedPorts, Ports, Rule};
use forwarder_gateway::resolve::{CONTROLLER_NAME, ResolveSettings};
use forwarder_source::FileSource;

#[derive(Args, Debug)]
pub(crate) struct ValidateArgs {
    /// File or folder of manifests
    path: PathBuf,

    /// Output format
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    /// Exit with code 1 on warnings too, such as a Service without endpoints (for CI)
    #[arg(long)]
    strict: bool,

    #[command(flatten)]
    served: ServedArgs,
}

/// What the agent is told that decides what of its manifests it serves: as its own flags.
#[derive(Args, Debug)]
pub(crate) struct ServedArgs {
    /// Name of the controller whose GatewayClasses are served
    #[arg(long, env = "FORWARDER_CONTROLLER_NAME", value_name = "NAME", default_value = CONTROLLER_NAME)]
    controller_name: String,

    /// Ports that listeners may not use, and exceptions, as for `forwarder agent` [default: all]
    #[arg(long, env = "FORWARDER_LISTENER_PORTS", value_name = "PORTS", value_delimiter = ',')]
    listener_ports: Vec<Rule<Ports>>,

    /// Networks that endpoints may not be in, and exceptions, as for `forwarder agent` [default: all]
    #[arg(long, env = "FORWARDER_ENDPOINT_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    endpoint_cidrs: Vec<Rule<IpNet>>,
}

pub(crate) fn run(args: &ValidateArgs) -> anyhow::Result<ExitCode> {
    let state = load(&args.path, &args.served)?;
    let errors = state.problems.iter().filter(|problem| problem.severity == "error").count();
    let serves_nothing = state.listeners.is_empty();
    match args.output {
        Output::Json => print_json(&state)?,
        Output::Table => {
            print_problems(&state.problems);
            if serves_nothing {
                println!("error: nothing is served: there is no listener that can be bound");
            }
            println!(
                "{}: {}, {}, {}",
                args.path.display(),
                count(state.listeners.len(), "listener"),
                count(errors, "error"),
                count(state.problems.len() - errors, "warning")
            );
            if errors > 0 {
                println!("a running agent keeps the last good version of each object that is refused");
            }
        }
    }
    let failed = errors > 0 || serves_nothing || (args.strict && !state.problems.is_empty());
    Ok(ExitCode::from(u8::from(failed)))
}

/// A number of things, in English.
fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// The state that an agent would have with these manifests.
pub(crate) fn load(path: &Path, served: &ServedArgs) -> anyhow::Result<State> {
    let listener_ports = AllowedPorts::new(served.listener_ports.clone());
    let endpoint_addresses = AllowedAddresses::new(served.endpoint_cidrs.clone());
    check_rules(&listener_ports, &endpoint_addresses)?;
    let loaded = FileSource::new(path).load();
    let resolver = Resolver::new(ResolveSettings {
        controller_name: served.controller_name.clone(),
        listener_ports,
        endpoint_addresses,
        ..ResolveSettings::for_files(Options::default().listener_defaults()?)
    });
    Ok(resolver.resolve(&loaded).state())
}

/// Prints each problem as a line that says where, and one that says what.
pub(crate) fn print_problems(problems: &[ProblemView]) {
    for problem in problems {
        let place = [problem.location.as_deref(), problem.object.as_deref(), Some(problem.field.as_str())];
        let place: Vec<_> = place.into_iter().flatten().filter(|part| !part.is_empty()).collect();
        println!("{}: {}", problem.severity, place.join(": "));
        println!("    {} ({})", problem.message, problem.reason);
    }
}
