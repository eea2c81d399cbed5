//! A [`Problem`]: one thing in the input that is wrong, on one object, in one field, with a reason and a remedy.
//!
//! Nothing that reads or resolves input fails: it leaves out what it cannot use and yields problems.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::object::{ObjectRef, Plain};

/// How much a [`Problem`] takes away.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something that was asked for is not served.
    Error,
    /// Everything is served, though something was ignored or is likely not meant.
    Warning,
}

impl Severity {
    /// The severity's name, as it stands in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// The kind of a [`Problem`]: a bounded set, used as a metric label and to tell problems apart by program.
///
/// Where the Gateway API has a condition reason for the case, the name is that reason.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Reason {
    /// A file or folder could not be read.
    Unreadable,
    /// A document is not YAML, or not a Kubernetes object.
    Malformed,
    /// A field has a wrong type, a value out of range, or breaks a rule of the object's CRD.
    Invalid,
    /// The same object stands in two places: the first one counts.
    DuplicateObject,
    /// Something that follows from an error at another place, which the message names: mend that.
    Refused,
    /// A kind or API version that the forwarder does not read.
    UnsupportedKind,
    /// A field that no release of the object's kind has.
    UnknownField,
    /// A field that the forwarder knows of and does not honour.
    UnsupportedValue,
    /// The listener's protocol is not TCP, or a backend's is not.
    UnsupportedProtocol,
    /// `Gateway.spec.gatewayClassName` names no GatewayClass, or one of another controller.
    GatewayClassNotFound,
    /// A parametersRef (of a GatewayClass or Gateway) that cannot be honoured.
    InvalidParameters,
    /// A Gateway address of a type that is not `IPAddress`.
    UnsupportedAddress,
    /// A Gateway address that this node does not have.
    AddressNotUsable,
    /// A ListenerSet that its Gateway does not take.
    NotAllowed,
    /// The listener's port is held by an older Gateway or by another process, or was refused by setting.
    PortUnavailable,
    /// Two listeners of one Gateway, or of its ListenerSets, cannot share their port.
    ProtocolConflict,
    /// `allowedRoutes.kinds` names a kind that a TCP listener cannot serve.
    InvalidRouteKinds,
    /// The route refers to no listener of its parent.
    NoMatchingParent,
    /// The listener's `allowedRoutes` refuse the route.
    NotAllowedByListeners,
    /// No route has attached to the listener: its connections are rejected.
    NoRoute,
    /// An older route serves the listener.
    Superseded,
    /// A rule that is not served, because TCP has nothing to tell rules apart.
    DroppedRule,
    /// A backend in another namespace without a ReferenceGrant there.
    RefNotPermitted,
    /// A backend that is not a Service, or is of type ExternalName.
    InvalidKind,
    /// The Service does not exist, or has not the port.
    BackendNotFound,
    /// The Service has no endpoint that takes connections: they are rejected.
    NoEndpoints,
    /// An endpoint leads back to a listener of this forwarder, or to its admin endpoint: it is ignored.
    Loop,
    /// An endpoint has an address that was refused by setting: it is ignored.
    AddressNotAllowed,
    /// A listener asks for a tier of the kernel that this node does not have: it is served by another one.
    TierUnavailable,
    /// Every weight of the route is zero, or it has no backend: connections are rejected.
    NoDestination,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 30] = [
        Self::Unreadable,
        Self::Malformed,
        Self::Invalid,
        Self::DuplicateObject,
        Self::Refused,
        Self::UnsupportedKind,
        Self::UnknownField,
        Self::UnsupportedValue,
        Self::UnsupportedProtocol,
        Self::GatewayClassNotFound,
        Self::InvalidParameters,
        Self::UnsupportedAddress,
        Self::AddressNotUsable,
        Self::NotAllowed,
        Self::PortUnavailable,
        Self::ProtocolConflict,
        Self::InvalidRouteKinds,
        Self::NoMatchingParent,
        Self::NotAllowedByListeners,
        Self::NoRoute,
        Self::Superseded,
        Self::DroppedRule,
        Self::RefNotPermitted,
        Self::InvalidKind,
        Self::BackendNotFound,
        Self::NoEndpoints,
        Self::Loop,
        Self::AddressNotAllowed,
        Self::TierUnavailable,
        Self::NoDestination,
    ];

    /// The reason's name, as it stands in metrics, JSON and conditions.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "Unreadable",
            Self::Malformed => "Malformed",
            Self::Invalid => "Invalid",
            Self::DuplicateObject => "DuplicateObject",
            Self::Refused => "Refused",
            Self::UnsupportedKind => "UnsupportedKind",
            Self::UnknownField => "UnknownField",
            Self::UnsupportedValue => "UnsupportedValue",
            Self::UnsupportedProtocol => "UnsupportedProtocol",
            Self::GatewayClassNotFound => "GatewayClassNotFound",
            Self::InvalidParameters => "InvalidParameters",
            Self::UnsupportedAddress => "UnsupportedAddress",
            Self::AddressNotUsable => "AddressNotUsable",
            Self::NotAllowed => "NotAllowed",
            Self::PortUnavailable => "PortUnavailable",
            Self::ProtocolConflict => "ProtocolConflict",
            Self::InvalidRouteKinds => "InvalidRouteKinds",
            Self::NoMatchingParent => "NoMatchingParent",
            Self::NotAllowedByListeners => "NotAllowedByListeners",
            Self::NoRoute => "NoRoute",
            Self::Superseded => "Superseded",
            Self::DroppedRule => "DroppedRule",
            Self::RefNotPermitted => "RefNotPermitted",
            Self::InvalidKind => "InvalidKind",
            Self::BackendNotFound => "BackendNotFound",
            Self::NoEndpoints => "NoEndpoints",
            Self::Loop => "Loop",
            Self::AddressNotAllowed => "AddressNotAllowed",
            Self::TierUnavailable => "TierUnavailable",
            Self::NoDestination => "NoDestination",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A place in a manifest file.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Location {
    /// The file, as it was named or found.
    pub file: Arc<PathBuf>,
    /// The line, from 1; 0 where the whole file is meant.
    pub line: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.to_string_lossy();
        match self.line {
            0 => write!(f, "{}", Plain(&file)),
            line => write!(f, "{}:{line}", Plain(&file)),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Problem {
    /// How much it takes away.
    pub severity: Severity,
    /// Its kind.
    pub reason: Reason,
    /// Where it stands; `None` where the object did not come from a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
    /// The object; `None` where not even that could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// The path of the field, such as `spec.rules[0].backendRefs[1].weight`; empty where the whole object is meant.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What was found, what follows from it and what to do: a sentence without a final period.
    pub message: String,
}

impl Problem {
    /// A problem on `object` at `field` that takes something away.
    pub fn error(
        reason: Reason,
        object: ObjectRef,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Error,
            reason,
            location: None,
            object: Some(object),
            field: field.into(),
            message: message.into(),
        }
    }

    /// A problem on `object` at `field` that takes nothing away.
    pub fn warning(
        reason: Reason,
        object: ObjectRef,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Warning, ..Self::error(reason, object, field, message) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = &self.location {
            write!(f, "{location}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", Plain(&self.field))?;
        }
        write!(f, "{} ({})", Plain(&self.message), self.reason)
    }
}
