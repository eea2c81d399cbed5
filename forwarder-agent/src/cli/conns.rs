//! `forwarder conns`: the connections that an agent keeps, and the end of some of them.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum};
use form_urlencoded::Serializer;
use serde_json::Value;

use super::admin::{self, AgentArgs, AskError};
use super::{print_json, table};
use crate::settings::PIN_DIR;
use crate::view::State;
use forwarder_dataplane::offload::tc;
use forwarder_dataplane::view::{ConnectionList, ConnectionTotals, ConnectionView, ResetReport, Selector};
use forwarder_gateway::spelling;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ConnsArgs {
    #[command(subcommand)]
    command: Option<ConnsCommand>,

    #[command(flatten)]
    agent: AgentArgs,

    #[command(flatten)]
    list: ListArgs,
}

#[derive(Debug, Subcommand)]
enum ConnsCommand {
    /// Reset both sides of the connections that match every selector given
    Reset(ResetArgs),
}

#[derive(Args, Debug)]
struct ListArgs {
    #[command(flatten)]
    kernel: KernelArgs,

    #[command(flatten)]
    selector: Selector,

    /// Show at most this many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Output format
    #[arg(long, short, value_enum, default_value = "table")]
    output: ListOutput,
}

#[derive(Args, Debug)]
struct ResetArgs {
    #[command(flatten)]
    kernel: KernelArgs,

    #[command(flatten)]
    selector: Selector,
}

#[derive(Args, Debug)]
struct KernelArgs {
    /// Folder for pinned maps, used if no agent runs
    #[arg(long, env = "FORWARDER_PIN_DIR", value_name = "DIR", default_value = PIN_DIR)]
    pin_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum ListOutput {
    /// A table for people.
    Table,
    /// A table with every column.
    Wide,
    /// JSON for programs.
    Json,
}

pub(crate) fn run(args: &ConnsArgs) -> anyhow::Result<ExitCode> {
    let ran = match &args.command {
        None => list(&args.agent, &args.list),
        Some(ConnsCommand::Reset(reset_args)) => reset(&args.agent, reset_args),
    };
    match ran {
        Ok(code) => Ok(code),
        Err(error) if matches!(error.downcast_ref(), Some(AskError::NoAgent(_))) => {
            eprintln!("error: {error}");
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error),
    }
}

fn list(agent: &AgentArgs, args: &ListArgs) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/connections?{}", query(&args.selector, args.limit)?);
    let list: ConnectionList = match admin::get(agent, &path) {
        Ok(list) => list,
        // What a dead agent has left in the kernel lives on.
        Err(error @ AskError::NoAgent(_)) => match tc::from_pins(&args.kernel.pin_dir) {
            Ok(mut connections) => {
                eprintln!("{error}; these are the connections that the kernel forwards without one");
                connections.retain(|connection| args.selector.matches(connection));
                ConnectionList::new(connections, args.limit, 0)
            }
            Err(_) => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    };
    if list.connections.is_empty()
        && let Some(error) = no_such_listener(agent, &args.selector)
    {
        eprintln!("error: {error}");
        return Ok(ExitCode::FAILURE);
    }
    match args.output {
        ListOutput::Json => print_json(&list)?,
        ListOutput::Table => print(&list, &COLUMNS),
        ListOutput::Wide => print(&list, &WIDE_COLUMNS),
    }
    Ok(code(list.unanswered))
}

fn reset(agent: &AgentArgs, args: &ResetArgs) -> anyhow::Result<ExitCode> {
    if args.selector.is_empty() {
        bail!("say which connections to reset, by --listener, --downstream or another selector, or --all");
    }
    let asked = admin::post(agent, "/v1/connections/reset", &args.selector);
    let report: ResetReport = match asked {
        Ok(report) => report,
        Err(error @ AskError::NoAgent(_)) => match tc::reset_pinned(&args.kernel.pin_dir, &args.selector)? {
            Some(reset) => {
                eprintln!("{error}; these were connections that the kernel forwarded without one");
                ResetReport { reset, unanswered: 0 }
            }
            None => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    };
    if report.reset == 0
        && let Some(error) = no_such_listener(agent, &args.selector)
    {
        eprintln!("error: {error}");
        return Ok(ExitCode::FAILURE);
    }
    match report.reset {
        0 => println!("reset 0 connections: none matches {}", describe(&args.selector)?),
        1 => println!("reset 1 connection"),
        count => println!("reset {count} connections"),
    }
    warn_unanswered(report.unanswered);
    Ok(code(report.unanswered))
}

/// So many listeners are named.
const MOST_NAMED: usize = 16;

/// Why no connection can match, where the selector names a listener that the agent has not. One that was removed may have some yet.
fn no_such_listener(agent: &AgentArgs, selector: &Selector) -> Option<String> {
    let wanted = selector.listener.as_ref()?;
    // An agent that does not tell, or none, has been told of already.
    let state: State = admin::get(agent, "/v1/state").ok()?;
    let names: Vec<&str> = state.listeners.iter().map(|listener| listener.listener.as_str()).collect();
    if names.contains(&wanted.as_str()) {
        return None;
    }
    let shown = names.iter().copied().take(MOST_NAMED).collect::<Vec<_>>().join(", ");
    let there = match (names.len(), spelling::meant(wanted, names.iter().copied())) {
        (_, Some(name)) => format!("did you mean {name}?"),
        (0, None) => "there is none".to_owned(),
        (1..=MOST_NAMED, None) => format!("there are {shown}"),
        (count, None) => format!("there are {count}, such as {shown}"),
    };
    Some(format!("no such listener, {wanted}: {there}"))
}

/// Success only if the answer is whole.
fn code(unanswered: usize) -> ExitCode {
    ExitCode::from(u8::from(unanswered > 0))
}

fn warn_unanswered(unanswered: usize) {
    match unanswered {
        0 => {}
        1 => eprintln!("warning: 1 worker did not answer in time; its connections are not counted"),
        count => {
            eprintln!("warning: {count} workers did not answer in time; their connections are not counted");
        }
    }
}

/// The fields of a selector, as in JSON, with their values.
fn fields(selector: &Selector) -> anyhow::Result<Vec<(String, String)>> {
    let Value::Object(fields) = serde_json::to_value(selector)? else { return Ok(Vec::new()) };
    let text = |value: Value| match value {
        Value::String(text) => text,
        value => value.to_string(),
    };
    Ok(fields.into_iter().map(|(key, value)| (key, text(value))).collect())
}

fn query(selector: &Selector, limit: Option<usize>) -> anyhow::Result<String> {
    let limit = limit.map(|limit| ("limit".to_owned(), limit.to_string()));
    Ok(Serializer::new(String::new()).extend_pairs(fields(selector)?).extend_pairs(limit).finish())
}

fn describe(selector: &Selector) -> anyhow::Result<String> {
    let fields = fields(selector)?;
    Ok(fields.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", "))
}

/// A column of the table.
type Column = (&'static str, fn(&ConnectionView) -> String);

const LISTENER: Column = ("LISTENER", |one| one.listener.clone());
const ADDRESS: Column = ("ADDRESS", |one| one.address.clone());
const ROUTE: Column = ("ROUTE", |one| or_dash(one.route.as_ref()));
const DOWNSTREAM: Column = ("DOWNSTREAM", |one| one.downstream.to_string());
const LOCAL: Column = ("LOCAL", |one| or_dash(one.upstream_local));
const UPSTREAM: Column = ("UPSTREAM", |one| or_dash(one.upstream));
const BACKEND: Column = ("BACKEND", |one| or_dash(one.backend.as_ref()));
const TIER: Column = ("TIER", |one| one.tier.as_str().to_owned());
const STATE: Column = ("STATE", |one| one.state.as_str().to_owned());
const RECEIVED: Column = ("RECEIVED", |one| bytes(one.received_bytes));
const SENT: Column = ("SENT", |one| bytes(one.sent_bytes));
const AGE: Column = ("AGE", |one| duration(one.age_ms));
const IDLE: Column = ("IDLE", |one| duration(one.idle_ms));
const REASON: Column = ("REASON", |one| or_dash(one.reason.as_ref()));

const COLUMNS: [Column; 10] =
    [LISTENER, DOWNSTREAM, UPSTREAM, BACKEND, TIER, STATE, RECEIVED, SENT, AGE, IDLE];
const WIDE_COLUMNS: [Column; 14] = [
    LISTENER, ADDRESS, ROUTE, DOWNSTREAM, LOCAL, UPSTREAM, BACKEND, TIER, STATE, RECEIVED, SENT, AGE, IDLE,
    REASON,
];

fn print(list: &ConnectionList, columns: &[Column]) {
    let header: Vec<_> = columns.iter().map(|(header, _)| *header).collect();
    let mut rows = table(&header);
    for connection in &list.connections {
        rows.add_row(columns.iter().map(|(_, cell)| cell(connection)));
    }
    if !list.connections.is_empty() {
        println!("{}", rows.trim_fmt());
    }
    warn_unanswered(list.unanswered);
    println!("{}", summary(&list.totals, list.connections.len()));
}

/// The last line: how many, by tier and by state.
fn summary(totals: &ConnectionTotals, shown: usize) -> String {
    let count = totals.connections;
    let plural = if count == 1 { "" } else { "s" };
    let limited = if shown < count { format!(" ({shown} shown)") } else { String::new() };
    let text = format!("{count} connection{plural}{limited}");
    if count == 0 {
        return text;
    }
    let tiers = totals.tiers.iter().map(|(tier, count)| format!("{count} {}", tier.as_str()));
    let states = totals.states.iter().map(|(state, count)| format!("{count} {}", state.as_str()));
    let (tiers, states) = (tiers.collect::<Vec<_>>().join(", "), states.collect::<Vec<_>>().join(", "));
    let (received, sent) = (bytes(totals.received_bytes), bytes(totals.sent_bytes));
    format!("{text}; by tier: {tiers}; by state: {states}; received {received}, sent {sent}")
}

fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Bytes in three digits or so.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let index = (count.ilog2() / 10).clamp(1, 6);
    let unit = UNITS.get(index as usize - 1).expect("2^64 bytes are 16 EiB");
    let tenths = (u128::from(count) * 10) >> (index * 10);
    if tenths < 100 {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    } else {
        format!("{} {unit}", tenths / 10)
    }
}

/// A duration in its two largest units.
fn duration(milliseconds: u64) -> String {
    let seconds = Duration::from_millis(milliseconds).as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    if days > 0 {
        format!("{days}d{}h", hours % 24)
    } else if hours > 0 {
        format!("{hours}h{}m", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes}m{}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_short() {
        for (count, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (10_239, "9.9 KiB"),
            (10_240, "10 KiB"),
            (1_048_575, "1023 KiB"),
            (1_048_576, "1.0 MiB"),
            (5_368_709_120, "5.0 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }

    #[test]
    fn durations_have_two_units() {
        for (milliseconds, expected) in
            [(0, "0s"), (59_999, "59s"), (60_000, "1m0s"), (3_725_000, "1h2m"), (90_000_000, "1d1h")]
        {
            assert_eq!(duration(milliseconds), expected);
        }
    }

    #[test]
    fn a_selector_becomes_a_query() {
        let selector =
            serde_json::from_str(r#"{"listener": "default/gw/a", "idleLongerThan": "90m"}"#).unwrap();
        assert_eq!(
            query(&selector, Some(3)).unwrap(),
            "idleLongerThan=1h+30m&listener=default%2Fgw%2Fa&limit=3"
        );
        assert_eq!(query(&Selector::default(), None).unwrap(), "");
        assert_eq!(describe(&selector).unwrap(), "idleLongerThan=1h 30m, listener=default/gw/a");
    }

    #[test]
    fn totals_stand_in_one_line() {
        let totals = |json| serde_json::from_str::<ConnectionTotals>(json).unwrap();
        let some = totals(
            r#"{"connections": 3, "tiers": {"splice": 2, "tc": 1}, "states": {"open": 3}, "receivedBytes": 2048, "sentBytes": 0}"#,
        );
        assert_eq!(
            summary(&some, 2),
            "3 connections (2 shown); by tier: 2 splice, 1 tc; by state: 3 open; received 2.0 KiB, sent 0 B"
        );
        assert_eq!(summary(&ConnectionTotals::default(), 0), "0 connections");
    }
}
