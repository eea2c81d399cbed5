//! The forms that names have in Kubernetes.

pub(super) const LABEL: &str =
    "a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit";
pub(super) const SUBDOMAIN: &str = "a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit";
pub(super) const HOSTNAME: &str = "a DNS name, whose first part may be '*'";
pub(super) const KIND: &str = "a kind: at most 63 letters, digits and '-', starting with a letter";
pub(super) const QUALIFIED_NAME: &str = "a key such as example.com/name: an optional DNS name and '/', then at most 63 letters, digits, '-', '_' and '.'";
pub(super) const LABEL_VALUE: &str = "a label's value: at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit";
pub(super) const DOMAIN_PATH: &str = "a domain and a path, such as example.com/name";
pub(super) const PROTOCOL: &str = "a protocol, such as TCP or example.com/name";

/// The message for a value that has not the required form.
pub(super) fn refuse(value: &str, form: &str) -> String {
    match value {
        "" => format!("is required, as {form}"),
        _ => format!("{} is not {form}", quote(value)),
    }
}

/// A value as a message shows it: quoted, and cut where it is long.
pub(super) fn quote(value: &str) -> String {
    const LONGEST: usize = 64;
    match value.char_indices().nth(LONGEST) {
        None => format!("{value:?}"),
        Some((end, _)) => format!("{:?}…", value.get(..end).unwrap_or_default()),
    }
}

pub(super) fn is_label(value: &str) -> bool {
    value.len() <= 63 && is_dns_part(value)
}

pub(super) fn is_subdomain(value: &str) -> bool {
    value.len() <= 253 && value.split('.').all(is_dns_part)
}

pub(super) fn is_hostname(value: &str) -> bool {
    value.len() <= 253 && is_subdomain(value.strip_prefix("*.").unwrap_or(value))
}

pub(super) fn is_kind(value: &str) -> bool {
    value.len() <= 63 && value.starts_with(|c: char| c.is_ascii_alphabetic()) && is_name(value, |b| b == b'-')
}

pub(super) fn is_qualified_name(value: &str) -> bool {
    let (prefix, name) = match value.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, value),
    };
    prefix.is_none_or(is_subdomain) && name.len() <= 63 && is_name(name, |b| matches!(b, b'-' | b'_' | b'.'))
}

pub(super) fn is_label_value(value: &str) -> bool {
    value.is_empty() || value.len() <= 63 && is_name(value, |b| matches!(b, b'-' | b'_' | b'.'))
}

pub(super) fn is_domain_path(value: &str) -> bool {
    value.len() <= 253
        && value.split_once('/').is_some_and(|(domain, path)| {
            let is_path_byte = |b: u8| b.is_ascii_alphanumeric() || br"/\-._~%!$&'()*+,;=:".contains(&b);
            is_subdomain(domain) && !path.is_empty() && path.bytes().all(is_path_byte)
        })
}

pub(super) fn is_protocol(value: &str) -> bool {
    let is_prefixed = || {
        value.split_once('/').is_some_and(|(domain, name)| {
            is_subdomain(domain) && !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric())
        })
    };
    value.len() <= 255 && (is_name(value, |b| b == b'-') || is_prefixed())
}

fn is_dns_part(value: &str) -> bool {
    is_name(value, |b| b == b'-') && !value.bytes().any(|b| b.is_ascii_uppercase())
}

/// Letters, digits and what `inner` allows, starting and ending with a letter or digit.
fn is_name(value: &str, inner: impl Fn(u8) -> bool) -> bool {
    let ends = [value.bytes().next(), value.bytes().next_back()];
    ends.iter().all(|end| end.is_some_and(|b| b.is_ascii_alphanumeric()))
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || inner(b))
}
