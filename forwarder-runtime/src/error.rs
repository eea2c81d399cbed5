//! Errors as people read them.

/// An error with its causes, less those that its own text names already, on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {name}: {source}")]
    struct Outer {
        name: &'static str,
        #[source]
        source: std::num::ParseIntError,
    }

    #[test]
    fn a_cause_that_has_been_named_is_not_named_again() {
        let source = "x".parse::<u8>().unwrap_err();
        let error = anyhow::Error::new(Outer { name: "a\nfile", source }).context("starting");
        assert_eq!(one_line(error.as_ref()), "starting: cannot read a file: invalid digit found in string");
    }
}
