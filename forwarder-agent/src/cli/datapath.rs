//! `forwarder datapath`: which of the kernel's tiers take new connections, and the switch for that.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use super::admin::{self, AgentArgs, AskError};
use super::{Output, print_json, table};
use forwarder_dataplane::view::{DatapathTiers, TierToggleRequest};

/// Where an agent answers for its tiers.
const PATH: &str = "/v1/datapath";

#[derive(Args, Debug)]
pub(crate) struct DatapathArgs {
    #[command(flatten)]
    agent: AgentArgs,

    /// Output format
    #[arg(long, short, value_enum, default_value = "table", global = true)]
    output: Output,

    #[command(subcommand)]
    command: Option<DatapathCommand>,
}

#[derive(Debug, Subcommand)]
enum DatapathCommand {
    /// Let a tier take new connections again
    On {
        /// The tier
        tier: KernelTier,
    },
    /// Stop a tier from taking new connections until it is switched on again or the agent stops; its open connections stay
    Off {
        /// The tier
        tier: KernelTier,
    },
}

/// A tier that can be switched.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum KernelTier {
    Direct,
    Tc,
    Sockmap,
}

pub(crate) fn run(args: &DatapathArgs) -> anyhow::Result<ExitCode> {
    let toggles = args.command.as_ref().map(|command| match command {
        DatapathCommand::On { tier } => toggle(*tier, true),
        DatapathCommand::Off { tier } => toggle(*tier, false),
    });
    let asked = match toggles {
        None => admin::get(&args.agent, PATH),
        Some(toggles) => admin::post(&args.agent, PATH, &toggles),
    };
    let tiers: DatapathTiers = match asked {
        Ok(tiers) => tiers,
        Err(error @ AskError::NoAgent(_)) => {
            eprintln!("error: {error}");
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    };
    match args.output {
        Output::Json => print_json(&tiers)?,
        Output::Table => {
            let mut rows = table(&["TIER", "STATE", "CONNECTIONS", "REASON"]);
            for one in &tiers.tiers {
                let reason = one.reason.clone().unwrap_or_default();
                rows.add_row([one.tier.as_str(), one.state.as_str(), &one.connections.to_string(), &reason]);
            }
            println!("{}", rows.trim_fmt());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn toggle(tier: KernelTier, is_on: bool) -> TierToggleRequest {
    match tier {
        KernelTier::Direct => TierToggleRequest { direct: Some(is_on), ..TierToggleRequest::default() },
        KernelTier::Tc => TierToggleRequest { tc: Some(is_on), ..TierToggleRequest::default() },
        KernelTier::Sockmap => TierToggleRequest { sockmap: Some(is_on), ..TierToggleRequest::default() },
    }
}
