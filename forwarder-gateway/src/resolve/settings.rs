//! Settings of listeners that a Gateway or ListenerSet carries in annotations `forwarder.dev/…`.
//!
//! A value is one for all listeners of the object (`1h`), values of single listeners (`mysql=0, redis=5m`), or both
//! (`1h, mysql=0`). What cannot be read leaves the default in force.
//! Listeners of a ListenerSet have what the Gateway says for all listeners as their defaults.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;

use crate::allowed::{AllowedAddresses, Rule};
use crate::manifests::{Gateway, Kind, ObjectRef};
use crate::model::{Datapath, ListenerSettings, MOST_CLIENT_RATE, OnRemoval};
use crate::problem::{Problem, Reason};

/// What all annotations of the forwarder begin with.
const PREFIX: &str = "forwarder.dev/";

/// What they set, in the order in which they are listed to whoever mistypes one.
pub const ANNOTATIONS: [&str; 8] = [
    "forwarder.dev/idle-timeout",
    "forwarder.dev/half-closed-timeout",
    "forwarder.dev/connect-timeout",
    "forwarder.dev/datapath",
    "forwarder.dev/client-cidrs",
    "forwarder.dev/client-rate",
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
            "client-cidrs" => annotation.apply_clients(),
            "client-rate" => annotation.apply_client_rate(),
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
    /// Has listeners let in only clients that are let in without the annotation too: whoever runs the agent, or has made the Gateway of a
    /// ListenerSet, may rely on it. Networks that cannot be read are left out, and all others hold.
    fn apply_clients(&mut self) {
        let before: Vec<_> =
            self.settings.iter_mut().map(|settings| std::mem::take(&mut settings.client_cidrs)).collect();
        let mut unread = Vec::new();
        self.apply(
            |text| {
                let (clients, complaints) = clients(text);
                unread.extend(complaints);
                if clients.is_empty() {
                    return Err(format!(
                        "{text:?} has no network that refuses a client: what holds without it stays in force; add one with `!`, or remove it"
                    ));
                }
                Ok(Arc::new(clients))
            },
            |settings, clients| settings.client_cidrs = clients,
        );
        self.complaints.extend(unread);
        // Listeners that have the same lists share what comes of them.
        let mut latest: Option<[Arc<AllowedAddresses>; 3]> = None;
        for (settings, before) in self.settings.iter_mut().zip(before) {
            let own = std::mem::take(&mut settings.client_cidrs);
            settings.client_cidrs = match latest.take() {
                _ if own.is_empty() => before,
                Some([one, other, both]) if Arc::ptr_eq(&one, &before) && Arc::ptr_eq(&other, &own) => {
                    latest = Some([one, other, Arc::clone(&both)]);
                    both
                }
                _ => {
                    let both = Arc::new(before.and(&own));
                    latest = Some([before, own, Arc::clone(&both)]);
                    both
                }
            };
        }
    }

    /// Has the lower one of two limits hold, as with clients.
    fn apply_client_rate(&mut self) {
        let before: Vec<_> = self.settings.iter_mut().map(|settings| settings.client_rate.take()).collect();
        self.apply(client_rate, |settings, rate| settings.client_rate = rate);
        for (settings, before) in self.settings.iter_mut().zip(before) {
            settings.client_rate = [before, settings.client_rate].into_iter().flatten().min();
        }
    }

    fn apply<T: Clone>(
        &mut self,
        mut parse: impl FnMut(&str) -> Result<T, String>,
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
                            set(settings, parsed.clone());
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

/// A number of connections in a second, of which 0 is any.
fn client_rate(text: &str) -> Result<Option<NonZeroU32>, String> {
    match text.parse() {
        Ok(rate) if rate <= MOST_CLIENT_RATE => Ok(NonZeroU32::new(rate)),
        _ => Err(format!("{text:?} is no number from 0 to {MOST_CLIENT_RATE}: the default is used")),
    }
}

/// The clients that networks allow, which are separated by spaces, and what is wrong with those that are left out.
fn clients(text: &str) -> (AllowedAddresses, Vec<String>) {
    let (mut rules, mut complaints) = (Vec::new(), Vec::new());
    for word in text.split_whitespace() {
        match word.parse::<Rule<IpNet>>() {
            Ok(rule) if AllowedAddresses::new(vec![rule]).mapped().is_some() => complaints.push(format!(
                "`{word}` is a network of IPv4 that is mapped into IPv6: it is ignored; write it as one of IPv4"
            )),
            Ok(rule) => rules.push(rule),
            Err(why) => complaints
                .push(format!("{why}: it is ignored, and the other networks hold; correct it, or remove it")),
        }
    }
    let all = AllowedAddresses::new(rules);
    let superfluous: HashSet<IpNet> = all.without_effect().collect();
    for network in all.rules().iter().map(|rule| rule.range).filter(|range| superfluous.contains(range)) {
        complaints.push(format!(
            "`{network}` changes nothing, because no wider network with `!` refuses it; remove it, or add `!0.0.0.0/0` or `!::/0` to refuse all others"
        ));
    }
    let effective = all.rules().iter().filter(|rule| !superfluous.contains(&rule.range)).copied();
    (AllowedAddresses::new(effective.collect()), complaints)
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
