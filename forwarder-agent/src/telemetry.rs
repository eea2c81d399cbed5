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
    // The file watcher traces every event in the watched folder and its parent: a log file there would feed itself.
    let filter = parse(&format!("notify=warn,{filter}"))?;
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
