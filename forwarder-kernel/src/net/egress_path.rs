//! By which interface translated packets leave, and who sends them.

use forwarder_common::flow::{FLOW_BY_STACK, Flow};

/// Who sends what has been translated.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Via {
    /// The program redirects it.
    Redirect,
    /// The stack, to which the program leaves it.
    Stack,
}

impl Via {
    /// That of a flow's packets.
    pub fn of(flow: &Flow) -> Self {
        if flow.flags & FLOW_BY_STACK == 0 { Self::Redirect } else { Self::Stack }
    }

    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redirect => "redirect",
            Self::Stack => "stack",
        }
    }

    /// The flag of a flow whose packets leave so.
    pub fn flag(self) -> u16 {
        match self {
            Self::Redirect => 0,
            Self::Stack => FLOW_BY_STACK,
        }
    }
}

/// An interface, and who sends packets by it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct EgressPath {
    /// The index of the interface.
    pub interface: u32,
    /// Who sends them.
    pub via: Via,
}

impl EgressPath {
    /// That of a flow's packets.
    pub fn of(flow: &Flow) -> Self {
        Self { interface: flow.interface, via: Via::of(flow) }
    }
}
