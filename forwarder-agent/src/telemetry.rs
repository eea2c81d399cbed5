//! Logging: structured fields, to standard error, as text or JSON.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for programs.
    Json,
}

/// A log filter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("`{filter}` is not a log filter: {source}; use a level such as `debug`, or `info,access=debug`")]
pub struct FilterError {
    filter: String,
    #[source]
    source: tracing_subscriber::filter::ParseError,
}

/// Starts logging.
///
/// # Errors
/// The filter cannot be parsed.
pub fn init(filter: &str, format: LogFormat) -> Result<(), FilterError> {
    let parse = |text: &str| {
        EnvFilter::builder().parse(text).map_err(|source| FilterError { filter: filter.to_owned(), source })
    };
    let filter = parse(&of_the_agent(filter))?;
    // Where standard error is a pipe that nobody reads any more, to complain there would panic.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// The filter with a level alone, such as `debug`, read as that of the agent: libraries say below `info` what only their authors
/// understand, hundreds of lines at each start, unless they are named. The file watcher traces every event in the watched folder and its
/// parent: a log file there would feed itself.
fn of_the_agent(filter: &str) -> String {
    let read = |directive: &str| match directive.trim() {
        level if ["debug", "trace"].iter().any(|it| level.eq_ignore_ascii_case(it)) => {
            // The agent, and the programs' own log.
            format!("info,forwarder={level},access={level}")
        }
        directive => directive.to_owned(),
    };
    let directives: Vec<String> = filter.split(',').map(read).collect();
    format!("notify=warn,{}", directives.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_alone_is_the_agents() {
        assert_eq!(of_the_agent("debug"), "notify=warn,info,forwarder=debug,access=debug");
        assert_eq!(of_the_agent("info,access=debug"), "notify=warn,info,access=debug");
        assert_eq!(
            of_the_agent("TRACE,aya_obj=debug"),
            "notify=warn,info,forwarder=TRACE,access=TRACE,aya_obj=debug"
        );
        assert!(EnvFilter::builder().parse(of_the_agent("TRACE,aya_obj=debug")).is_ok());
    }
}
