//! Typed decoding of a document.
//!
//! It follows the Kubernetes API server where that is laxer or stricter than serde: `null` means absent, `80.0` is a whole
//! number, a list is no struct. An error knows the path of the field.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::node::{Entry, Item, Node, excerpt};

/// Why a node is not of the type that it was decoded to.
#[derive(Debug)]
pub(super) struct TypeError {
    message: String,
    /// The path, the innermost step first, as it is gathered while returning.
    steps: Vec<Step>,
}

/// One step of a path.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Step {
    Key(String),
    Index(usize),
}

impl Node<'_> {
    /// Decodes the node.
    pub(super) fn decode<T: DeserializeOwned>(&self) -> Result<T, TypeError> {
        T::deserialize(self)
    }

    /// Replaces what `error` is about by something that can be decoded: then all else can be looked at.
    ///
    /// A field becomes `null`. An item of a list becomes an empty map, and an empty text if it was that already.
    pub(super) fn forget(&mut self, error: &TypeError) {
        let mut node = self;
        for step in error.steps.iter().rev() {
            let next = match (step, node) {
                (Step::Key(key), Node::Map(entries)) => {
                    entries.iter_mut().find(|entry| entry.key == *key).map(|entry| &mut entry.value)
                }
                (Step::Index(index), Node::List(items)) => items.get_mut(*index).map(|item| &mut item.value),
                (Step::Key(_) | Step::Index(_), _) => None,
            };
            let Some(next) = next else { return };
            node = next;
        }
        *node = match (error.steps.first(), &*node) {
            (Some(Step::Index(_)), Node::Map(entries)) if entries.is_empty() => Node::Text(Cow::Borrowed("")),
            (Some(Step::Index(_)), _) => Node::Map(Box::default()),
            (Some(Step::Key(_)) | None, _) => Node::Null,
        };
    }

    fn describe(&self) -> de::Unexpected<'_> {
        match self {
            Node::Null => de::Unexpected::Unit,
            Node::Bool(value) => de::Unexpected::Bool(*value),
            Node::Signed(value) => de::Unexpected::Signed(*value),
            Node::Unsigned(value) => de::Unexpected::Unsigned(*value),
            Node::Float(value) => de::Unexpected::Float(*value),
            Node::Text(value) => de::Unexpected::Str(value),
            Node::List(_) => de::Unexpected::Seq,
            Node::Map(_) => de::Unexpected::Map,
        }
    }
}

impl TypeError {
    /// What is wrong.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The path of the field, such as `spec.listeners[0].port`.
    pub(super) fn field(&self) -> String {
        self.steps.iter().rev().fold(String::new(), |field, step| match step {
            Step::Index(index) => format!("{field}[{index}]"),
            // Keys of labels and annotations have dots, which would read as further steps.
            Step::Key(key) if key.contains(['.', '[', '/']) => format!("{field}[{key}]"),
            Step::Key(key) if field.is_empty() => key.clone(),
            Step::Key(key) => format!("{field}.{key}"),
        })
    }

    fn within(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field(), self.message)
    }
}

impl std::error::Error for TypeError {}

impl de::Error for TypeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { message: message.to_string(), steps: Vec::new() }
    }

    fn invalid_type(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::custom(format_args!("expected {}, found {}", wanted(expected), found(unexpected)))
    }

    fn invalid_value(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }
}

/// serde's and Rust's names of types, in the words of the people who write manifests.
fn wanted(expected: &dyn de::Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "i64" => "a whole number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        other if other.starts_with("struct ") => "a map".to_owned(),
        _ => text,
    }
}

fn found(unexpected: de::Unexpected<'_>) -> String {
    match unexpected {
        de::Unexpected::Bool(value) => format!("{value}"),
        de::Unexpected::Signed(value) => format!("the number {value}"),
        de::Unexpected::Unsigned(value) => format!("the number {value}"),
        de::Unexpected::Float(value) => format!("the number {value}"),
        de::Unexpected::Str(value) => format!("the text {:?}", excerpt(value)),
        de::Unexpected::Unit => "nothing".to_owned(),
        de::Unexpected::Seq => "a list".to_owned(),
        de::Unexpected::Map => "a map".to_owned(),
        other => other.to_string(),
    }
}

impl<'de> Deserializer<'de> for &'de Node<'_> {
    type Error = TypeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self {
            Node::Null => visitor.visit_unit(),
            Node::Bool(value) => visitor.visit_bool(*value),
            Node::Signed(value) => visitor.visit_i64(*value),
            Node::Unsigned(value) => visitor.visit_u64(*value),
            Node::Float(value) => visitor.visit_f64(*value),
            Node::Text(value) => visitor.visit_borrowed_str(value),
            Node::List(items) => {
                visitor.visit_seq(Items { items: items.iter().enumerate(), len: items.len() })
            }
            Node::Map(entries) => visitor.visit_map(Fields { entries: entries.iter(), value: None }),
        }
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        // YAML to JSON conversion writes 80.0 as 80, so that an API server takes it.
        #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and in range")]
        match self {
            Node::Float(value) if value.fract() == 0.0 && value.abs() < 9e15 => {
                visitor.visit_i64(*value as i64)
            }
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self {
            Node::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        // serde would also read a struct from a list of its fields, in their order.
        match self {
            Node::Map(_) => self.deserialize_any(visitor),
            _ => Err(de::Error::invalid_type(self.describe(), &"a map")),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map enum identifier
    }
}

struct Items<'de, 'a> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Item<'a>>>,
    len: usize,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = TypeError;

    fn next_element_seed<T: de::DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, TypeError> {
        let Some((index, item)) = self.items.next() else {
            return Ok(None);
        };
        seed.deserialize(&item.value).map(Some).map_err(|error| error.within(Step::Index(index)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.len)
    }
}

struct Fields<'de, 'a> {
    entries: std::slice::Iter<'de, Entry<'a>>,
    value: Option<&'de Entry<'a>>,
}

impl<'de> MapAccess<'de> for Fields<'de, '_> {
    type Error = TypeError;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, TypeError> {
        // A field that is null counts as absent, as it does to an API server.
        let Some(entry) = self.entries.find(|entry| !entry.value.is_null()) else {
            return Ok(None);
        };
        self.value = Some(entry);
        seed.deserialize(de::value::BorrowedStrDeserializer::new(&entry.key)).map(Some)
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, TypeError> {
        match self.value.take() {
            Some(entry) => seed
                .deserialize(&entry.value)
                .map_err(|error| error.within(Step::Key(entry.key.clone().into_owned()))),
            None => seed.deserialize(().into_deserializer()),
        }
    }
}
