//! What is wrong with a settings file, in one line.

use std::path::Path;
use std::sync::Arc;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

use super::SettingsError;
use forwarder_gateway::problem::Location;
use forwarder_gateway::spelling;

impl SettingsError {
    /// A file that cannot be parsed.
    pub(super) fn parse(path: &Path, error: &Error) -> Self {
        let line = error.location().and_then(|location| u32::try_from(location.line()).ok()).unwrap_or(0);
        let message = match error.without_snippet() {
            Error::SerdeUnknownField { field, expected, .. } => unknown_key(field, expected),
            other => {
                let said = UserMessageFormatter.format_message(other);
                said.split_whitespace().collect::<Vec<_>>().join(" ")
            }
        };
        Self::Parse { place: Location { file: Arc::new(path.to_owned()), line }, message }
    }
}

fn unknown_key(key: &str, known: &[&str]) -> String {
    match spelling::meant(key, known.iter().copied()) {
        Some(meant) => format!("unknown key {key}; did you mean {meant}?"),
        None => format!("unknown key {key}; there are {}", known.join(", ")),
    }
}
