//! By which interface translated packets leave, and who sends them.

use forwarder_common::flow::{FLOW_BY_STACK, Flow};

/// Who sends what has been translated.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Way {
    /// The program redirects it.
    Redirect,
    /// The stack, to which the program leaves it.
    Stack,
}

impl Way {
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

/// A way of sending packets by an interface.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Exit {
    /// The index of the interface.
    pub interface: u32,
    /// Who sends them.
    pub way: Way,
}

impl Exit {
    /// That of a flow's packets.
    pub fn of(flow: &Flow) -> Self {
        Self { interface: flow.interface, way: Way::of(flow) }
    }
}
