//! From which namespaces routes may attach to a listener, and ListenerSets to a Gateway.

use crate::manifests::{LabelSelector, Manifests};

use super::{ResolveSettings, selector};

/// The namespaces that something is taken from.
#[derive(Clone, Copy)]
pub(super) enum AllowedNamespaces<'a> {
    Same,
    All,
    None,
    Selector(&'a LabelSelector),
}

impl<'a> AllowedNamespaces<'a> {
    /// Reads `from` and `selector`, or says which field cannot be honoured and why; `consequence` is what follows then.
    pub(super) fn read(
        from: &str,
        selector: Option<&'a LabelSelector>,
        consequence: &str,
    ) -> Result<Self, (String, String)> {
        match (from, selector) {
            ("Same", _) => Ok(Self::Same),
            ("All", _) => Ok(Self::All),
            ("None", _) => Ok(Self::None),
            ("Selector", Some(selector)) => match selector::check(selector, consequence) {
                Ok(()) => Ok(Self::Selector(selector)),
                Err((field, message)) => Err((format!("selector.{field}"), message)),
            },
            ("Selector", None) => {
                let message = format!("from is Selector and there is no selector: {consequence}; add one");
                Err(("selector".to_owned(), message))
            }
            (other, _) => {
                let message = format!("{other:?} is none of Same, All, Selector and None: {consequence}");
                Err(("from".to_owned(), message))
            }
        }
    }

    /// Why nothing is taken from `namespace`, if so; `own` is the namespace of the object that takes.
    pub(super) fn rejection(
        self,
        own: &str,
        namespace: &str,
        manifests: &Manifests,
        settings: &ResolveSettings,
    ) -> Option<String> {
        match self {
            Self::All => None,
            Self::Same if namespace == own => None,
            Self::Same => Some(format!("it takes those of namespace {own} only")),
            Self::None => Some("it takes none from any namespace".to_owned()),
            Self::Selector(selector) => {
                let selected = selector::selects(selector, namespace, manifests, settings);
                (!selected)
                    .then(|| format!("its selector does not match the labels of namespace {namespace}"))
            }
        }
    }
}
