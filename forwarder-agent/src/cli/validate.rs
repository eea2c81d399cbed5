//! `forwarder validate`: what an agent would report of a folder of manifests, without running one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{Output, print_json};
use crate::agent::Resolver;
use crate::resolve::CONTROLLER_NAME;
use crate::settings::Options;
use crate::source::FileSource;
use crate::view::{ProblemView, State};

#[derive(Args, Debug)]
pub(crate) struct ValidateArgs {
    /// File or folder of manifests
    path: PathBuf,

    /// How to print the report
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    /// Exit with code 1 on warnings too, such as a Service without endpoints: for CI
    #[arg(long)]
    strict: bool,

    /// Controller whose GatewayClasses are served
    #[arg(long, env = "FORWARDER_CONTROLLER_NAME", default_value = CONTROLLER_NAME)]
    controller_name: String,
}

pub(crate) fn run(args: &ValidateArgs) -> anyhow::Result<ExitCode> {
    let state = load(&args.path, &args.controller_name)?;
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
pub(crate) fn load(path: &Path, controller_name: &str) -> anyhow::Result<State> {
    let loaded = FileSource::new(path).load();
    let resolver = Resolver::for_files(controller_name.to_owned(), Options::default().listener_defaults()?);
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
