//! Bytes and times as people write them.

use std::time::Duration;

use serde::Deserialize;

/// When a connection is taken into the kernel: whichever comes first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OffloadAfter {
    /// After it has moved so many bytes.
    pub bytes: Option<u64>,
    /// After it has lasted so long.
    pub age: Option<Duration>,
}

impl std::str::FromStr for OffloadAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut after = Self { bytes: None, age: None };
        for part in text.split(',').map(str::trim) {
            let is_new = match (bytes(part), humantime::parse_duration(part)) {
                (Some(bytes), _) => after.bytes.replace(bytes).is_none(),
                (None, Ok(age)) => after.age.replace(age).is_none(),
                (None, Err(_)) => {
                    return Err(format!(
                        "`{part}` is neither a number of bytes, such as 64KiB, nor a duration, such as 500ms"
                    ));
                }
            };
            if !is_new {
                return Err(format!("`{text}` says twice after how many bytes or how long"));
            }
        }
        Ok(after)
    }
}

/// Bytes as people write them: `0`, `512B`, `64KiB`, `1MiB`.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..)? {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    digits.trim_end().parse::<u64>().ok()?.checked_mul(unit)
}

impl<'de> Deserialize<'de> for OffloadAfter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A number of bytes as people write it: `512KiB`, `256MiB`, `1GiB`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BytesText(pub u64);

impl std::str::FromStr for BytesText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        bytes(text).map(Self).ok_or_else(|| format!("`{text}` is not a number of bytes such as `256MiB`"))
    }
}

impl<'de> Deserialize<'de> for BytesText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Which local ports only the agent connects from.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SourcePorts {
    /// Those above the range that the kernel chooses from.
    #[default]
    Auto,
    /// These.
    Range {
        /// The first of them.
        first: u16,
        /// The last of them.
        last: u16,
    },
    /// None: the kernel chooses.
    Off,
}

impl std::str::FromStr for SourcePorts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => return Ok(Self::Auto),
            "off" => return Ok(Self::Off),
            _ => {}
        }
        let range = || {
            let (first, last) = text.split_once('-')?;
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (0 < first && first <= last).then_some(Self::Range { first, last })
        };
        range().ok_or_else(|| {
            format!("`{text}` is neither a range of ports such as `61000-65535`, nor `auto`, nor `off`")
        })
    }
}

impl<'de> Deserialize<'de> for SourcePorts {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A duration as people write it: `90s`, `1h 30m`, or `0`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DurationText(pub Duration);

impl std::str::FromStr for DurationText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|error| format!("`{text}` is not a duration such as `90s`, `1h 30m` or `0`: {error}"))
    }
}

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ports_are_a_range_or_a_word() {
        let ports = |text: &str| text.parse::<SourcePorts>();
        assert_eq!(ports("61000-65535"), Ok(SourcePorts::Range { first: 61_000, last: 65_535 }));
        assert_eq!(ports("9-9"), Ok(SourcePorts::Range { first: 9, last: 9 }));
        assert_eq!((ports("auto"), ports("off")), (Ok(SourcePorts::Auto), Ok(SourcePorts::Off)));
        for bad in ["", "1", "0-9", "9-8", "1-70000", "none", "1-2-3"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn offloading_is_due_after_bytes_or_a_time() {
        let after = |text: &str| text.parse::<OffloadAfter>().map(|after| (after.bytes, after.age));
        assert_eq!(after("64KiB"), Ok((Some(65_536), None)));
        assert_eq!(after("0"), Ok((Some(0), None)));
        assert_eq!(after("500ms"), Ok((None, Some(Duration::from_millis(500)))));
        assert_eq!(after("1MiB, 2s"), Ok((Some(1 << 20), Some(Duration::from_secs(2)))));
        for bad in ["", "soon", "1KiB,2KiB", "1s,2s", "-1", "99999999999GiB"] {
            assert!(after(bad).is_err(), "{bad}");
        }
    }
}
