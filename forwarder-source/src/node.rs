//! A document as a tree that knows the line of every field.
//!
//! Text is borrowed from the file, for an EndpointSlice may hold 100,000 endpoints.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A value of a document.
#[derive(Clone, Debug)]
pub(super) enum Node<'a> {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(Cow<'a, str>),
    List(Box<[Item<'a>]>),
    Map(Box<[Entry<'a>]>),
}

/// An item of a list, and the line at which it starts.
#[derive(Clone, Debug)]
pub(super) struct Item<'a> {
    pub(super) line: u32,
    pub(super) value: Node<'a>,
}

/// A field of a map, and the line of its key.
#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: Cow<'a, str>,
    pub(super) line: u32,
    pub(super) value: Node<'a>,
}

impl<'a> Node<'a> {
    /// The value of a map's field; `None` also where the field is `null`, or the node no map.
    pub(super) fn get(&self, key: &str) -> Option<&Node<'a>> {
        self.entries()
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| &entry.value)
            .filter(|node| !node.is_null())
    }

    /// Takes a map's field out, leaving `null`.
    pub(super) fn take(&mut self, key: &str) -> Option<Node<'a>> {
        let Node::Map(entries) = self else { return None };
        entries
            .iter_mut()
            .find(|entry| entry.key == key)
            .map(|entry| std::mem::replace(&mut entry.value, Node::Null))
            .filter(|node| !node.is_null())
    }

    /// The text of a scalar that is text.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Node::Text(text) => Some(text),
            Node::Null
            | Node::Bool(_)
            | Node::Signed(_)
            | Node::Unsigned(_)
            | Node::Float(_)
            | Node::List(_)
            | Node::Map(_) => None,
        }
    }

    /// The fields of a map; none for anything else.
    pub(super) fn entries(&self) -> &[Entry<'a>] {
        match self {
            Node::Map(entries) => entries,
            Node::Null
            | Node::Bool(_)
            | Node::Signed(_)
            | Node::Unsigned(_)
            | Node::Float(_)
            | Node::Text(_)
            | Node::List(_) => &[],
        }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self, Node::Null)
    }
}

/// The start of a text that may be long, for a message.
pub(super) fn excerpt(text: &str) -> Cow<'_, str> {
    const LONGEST: usize = 64;
    match text.char_indices().nth(LONGEST) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}…", text.get(..end).unwrap_or_default())),
    }
}

impl<'de> Deserialize<'de> for Node<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of at most 64 bits, text, a list or a map")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Node::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(i64::try_from(value).map_or(Node::Unsigned(value), Node::Signed))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Node::Float(value))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Node::Text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Node::Text(Cow::Owned(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
        Ok(Node::Text(Cow::Owned(value)))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Node<'de>>>()? {
            items.push(Item { line: line(&item.referenced), value: item.value });
        }
        Ok(Node::List(items.into_boxed_slice()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<Text<'de>>>()? {
            entries.push(Entry { line: line(&key.referenced), key: key.value.0, value: map.next_value()? });
        }
        Ok(Node::Map(entries.into_boxed_slice()))
    }
}

fn line(location: &serde_saphyr::Location) -> u32 {
    u32::try_from(location.line()).unwrap_or(u32::MAX)
}

/// Text borrowed where that is possible, which serde does for `Cow` only as a field of a struct.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text as the key of a field")
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(value.to_owned())))
            }

            fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(value)))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}
