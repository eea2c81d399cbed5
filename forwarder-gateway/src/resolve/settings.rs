//! Settings of listeners that a Gateway or ListenerSet carries in annotations `forwarder.dev/…`.
//!
//! A value is one for all listeners of the object (`1h`), values of single listeners (`mysql=0, redis=5m`), or both
//! (`1h, mysql=0`). What cannot be read leaves the default in force.
//! Listeners of a ListenerSet have what the Gateway says for all listeners as their defaults.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use clap::ValueEnum;

use crate::manifests::{Gateway, Kind, ObjectRef};
use crate::model::{Datapath, ListenerSettings, OnRemoval};
use crate::problem::{Problem, Reason};

/// What all annotations of the forwarder begin with.
const PREFIX: &str = "forwarder.dev/";

/// What they set, in the order in which they are listed to whoever mistypes one.
pub const ANNOTATIONS: [&str; 6] = [
    "forwarder.dev/idle-timeout",
    "forwarder.dev/half-closed-timeout",
    "forwarder.dev/connect-timeout",
    "forwarder.dev/datapath",
    "forwarder.dev/on-removal",
    "forwarder.dev/removal-drain",
];

/// Longer time-outs are mistakes, and would overflow clocks.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);

/// What a Gateway says for all listeners.
pub(super) fn of_gateway(gateway: &Gateway, defaults: &ListenerSettings) -> ListenerSettings {
    let object = ObjectRef::new(Kind::Gateway, &gateway.metadata.namespaced_name());
    let mut settings = [defaults.clone()];
    // What is wrong with the annotations is told where they are read for the Gateway's own listeners.
    let mut told = Vec::new();
    apply(&object, &gateway.metadata.annotations, &HashMap::new(), &mut settings, &mut told);
    let [settings] = settings;
    settings
}

/// Applies the annotations of a Gateway or ListenerSet to the settings of its listeners, which are in the order of the
/// spec.
pub(super) fn apply(
    object: &ObjectRef,
    annotations: &BTreeMap<String, String>,
    by_section: &HashMap<&str, Vec<usize>>,
    settings: &mut [ListenerSettings],
    problems: &mut Vec<Problem>,
) {
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else {
            continue;
        };
        let kind = &object.kind;
        let mut annotation = Annotation { kind, value, by_section, settings, complaints: Vec::new() };
        match name {
            "idle-timeout" => annotation.apply(timeout, |s, v| s.idle_timeout = v),
            "half-closed-timeout" => annotation.apply(timeout, |s, v| s.half_closed_timeout = v),
            "connect-timeout" => annotation.apply(connect_timeout, |s, v| s.connect_timeout = v),
            "datapath" => annotation.apply(datapath, |s, v| s.datapath = v),
            "on-removal" => annotation.apply(on_removal, |s, v| s.on_removal = v),
            "removal-drain" => annotation.apply(duration, |s, v| s.removal_drain = v),
            _ => {
                let known = ANNOTATIONS.map(|name| name.trim_start_matches(PREFIX));
                let [others @ .., last] = &known;
                annotation.complaints.push(format!(
                    "no such setting: it is ignored; there are {} and {last}",
                    others.join(", ")
                ));
            }
        }
        for complaint in annotation.complaints {
            let field = format!("metadata.annotations[{key}]");
            problems.push(Problem::warning(Reason::UnsupportedValue, object.clone(), field, complaint));
        }
    }
}

/// One annotation being applied.
struct Annotation<'a> {
    /// The kind of the object that carries it.
    kind: &'a str,
    value: &'a str,
    by_section: &'a HashMap<&'a str, Vec<usize>>,
    settings: &'a mut [ListenerSettings],
    complaints: Vec<String>,
}

impl Annotation<'_> {
    fn apply<T: Copy>(
        &mut self,
        parse: impl Fn(&str) -> Result<T, String>,
        set: impl Fn(&mut ListenerSettings, T),
    ) {
        let value = self.value;
        if value.trim().is_empty() {
            self.complaints
                .push("the value is empty: the default is used; give one, or remove it".to_owned());
            return;
        }
        let items = || value.split(',').map(str::trim).filter(|item| !item.is_empty());
        // Values for all come first wherever they stand, so that those of single listeners override them.
        let general = items().filter(|item| !item.contains('=')).map(|item| (None, item));
        let single = items()
            .filter_map(|item| item.split_once('='))
            .map(|(listener, value)| (Some(listener.trim()), value.trim()));
        let mut seen = HashSet::new();
        for (listener, text) in general.chain(single) {
            match self.targets(listener, &mut seen).and_then(|targets| Ok((targets, parse(text)?))) {
                Ok((targets, parsed)) => {
                    for index in targets {
                        if let Some(settings) = self.settings.get_mut(index) {
                            set(settings, parsed);
                        }
                    }
                }
                Err(complaint) => self.complaints.push(complaint),
            }
        }
    }

    /// The listeners that an item is for, unless an item before it was for the same.
    fn targets<'i>(
        &self,
        listener: Option<&'i str>,
        seen: &mut HashSet<Option<&'i str>>,
    ) -> Result<Vec<usize>, String> {
        let first = seen.insert(listener);
        match listener {
            None if first => Ok((0..self.settings.len()).collect()),
            None => Err("there is a second value for all listeners: only the first is used".to_owned()),
            Some(name) if !first => {
                Err(format!("there is a second value for listener {name:?}: only the first is used"))
            }
            Some(name) => self.by_section.get(name).cloned().ok_or_else(|| {
                let kind = self.kind;
                format!("the {kind} has no listener {name:?}: its value is ignored; correct the name, or remove it")
            }),
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match text {
        "0" => Some(Duration::ZERO),
        _ => humantime::parse_duration(text).ok(),
    };
    let refuse = |why: &str| Err(format!("{text:?} {why}: the default is used; write it like 90s or 1h 30m"));
    match parsed {
        None => refuse("is no duration"),
        Some(duration) if duration > LONGEST => refuse("is longer than ten years"),
        Some(duration) => Ok(duration),
    }
}

/// A time-out that 0 turns off.
fn timeout(text: &str) -> Result<Option<Duration>, String> {
    Ok(Some(duration(text)?).filter(|duration| !duration.is_zero()))
}

fn connect_timeout(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration.is_zero() {
        return Err(
            "a connect time-out cannot be turned off: the default is used; give one above 0".to_owned()
        );
    }
    Ok(duration)
}

fn datapath(text: &str) -> Result<Datapath, String> {
    one_of(text, Datapath::as_str)
}

fn on_removal(text: &str) -> Result<OnRemoval, String> {
    one_of(text, OnRemoval::as_str)
}

/// The choice that has a name.
fn one_of<T: ValueEnum + Copy>(text: &str, name: impl Fn(T) -> &'static str) -> Result<T, String> {
    let known = T::value_variants();
    known.iter().copied().find(|choice| name(*choice) == text).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|choice| name(*choice)).collect();
        format!("{text:?} is none of {}: the default is used", names.join(", "))
    })
}
