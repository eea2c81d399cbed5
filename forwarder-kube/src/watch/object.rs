//! An object as the API server sends it: decoded leniently, so that one that cannot be read never hides the others.

use std::borrow::Cow;

use kube::core::{DynamicResourceScope, ObjectMeta, Resource};
use kube::discovery::ApiResource;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use serde_json::Value;

use super::records::ObservedObject;

/// An object of any version of its kind.
#[derive(Clone, Debug)]
pub(super) struct Received<T> {
    metadata: ObjectMeta,
    /// The object, or why it cannot be read.
    pub(super) content: Result<T, String>,
    /// The status as it stands there: JSON.
    status: Option<Box<str>>,
}

impl<T> Received<T> {
    /// What is remembered for who writes statuses.
    pub(super) fn record(&self) -> ObservedObject {
        let metadata = &self.metadata;
        ObservedObject {
            uid: metadata.uid.clone().unwrap_or_default(),
            resource_version: metadata.resource_version.clone().unwrap_or_default(),
            generation: metadata.generation.unwrap_or_default(),
            finalizers: metadata.finalizers.clone().unwrap_or_default(),
            is_terminating: metadata.deletion_timestamp.is_some(),
            status: self.status.clone(),
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Received<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        // They are as long as the object, and of no use here.
        if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
            metadata.remove("managedFields");
        }
        let metadata = value.get("metadata").cloned().unwrap_or_default();
        let metadata = ObjectMeta::deserialize(metadata).map_err(D::Error::custom)?;
        let status = value
            .as_object_mut()
            .and_then(|object| object.remove("status"))
            .filter(|status| !status.is_null());
        let status = status.map(|status| status.to_string().into_boxed_str());
        without_nulls(&mut value);
        let content = T::deserialize(value).map_err(|error| error.to_string());
        Ok(Self { metadata, content, status })
    }
}

/// An API server writes an empty list of Go's as `null`, and a field that is `null` counts as absent.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

impl<T> Resource for Received<T> {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use forwarder_gateway::manifests::{EndpointSlice, TcpRoute};

    #[test]
    fn null_counts_as_absent() {
        let slice = json!({
            "metadata": { "name": "a", "namespace": "b", "managedFields": [{}] },
            "addressType": "IPv4", "endpoints": null, "ports": null,
        });
        let received: Received<EndpointSlice> = serde_json::from_value(slice).unwrap();
        assert_eq!(received.content.unwrap().address_type, "IPv4");
        assert_eq!(received.metadata.managed_fields, None);
    }

    #[test]
    fn what_cannot_be_read_keeps_its_name_and_says_why() {
        let route = json!({
            "metadata": { "name": "a", "namespace": "b", "resourceVersion": "7" },
            "spec": { "rules": "none" }, "status": { "parents": [] },
        });
        let received: Received<TcpRoute> = serde_json::from_value(route).unwrap();
        assert_eq!(received.meta().name.as_deref(), Some("a"));
        assert!(received.content.as_ref().unwrap_err().contains("none"), "{:?}", received.content);
        let record = received.record();
        assert_eq!((&*record.resource_version, record.status.as_deref()), ("7", Some(r#"{"parents":[]}"#)));
    }
}
