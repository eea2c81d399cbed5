//! Where fields of the kernel's structures stand, by its own description of its types (BTF).

use std::fs;
use std::path::Path;

/// Where the kernel shows it.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
/// Bytes of a type's common part, and of one member.
const TYPE_LENGTH: usize = 12;
const MEMBER_LENGTH: usize = 12;

/// Why a field is not found.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel was built without (`CONFIG_DEBUG_INFO_BTF`), or does not show it.
    #[error("cannot read {KERNEL}: {0}; the kernel has to be one with BTF")]
    Read(#[from] std::io::Error),
    /// It is not what is expected.
    #[error("{KERNEL} is not understood")]
    Malformed,
    /// There is no such field.
    #[error("this kernel's {structure} has no field {field}")]
    NoField {
        /// The structure.
        structure: &'static str,
        /// The field.
        field: &'static str,
    },
}

/// The offsets in bytes of direct members of one of the running kernel's structures.
///
/// # Errors
/// The kernel does not describe itself, or has no such field.
pub(super) fn kernel_offsets<const N: usize>(
    structure: &'static str,
    fields: [&'static str; N],
) -> Result<[u32; N], BtfError> {
    offsets(&fs::read(Path::new(KERNEL))?, structure, fields)
}

fn offsets<const N: usize>(
    btf: &[u8],
    structure: &'static str,
    fields: [&'static str; N],
) -> Result<[u32; N], BtfError> {
    let members = members(btf, structure).ok_or(BtfError::Malformed)?;
    let mut found = [0; N];
    for (found, field) in found.iter_mut().zip(fields) {
        let bits = members.iter().find(|(name, _)| *name == field.as_bytes()).map(|(_, bits)| bits / 8);
        *found = bits.ok_or(BtfError::NoField { structure, field })?;
    }
    Ok(found)
}

/// The names of a structure's members and their offsets in bits; empty where there is no such structure.
fn members<'a>(btf: &'a [u8], structure: &str) -> Option<Vec<(&'a [u8], u32)>> {
    // `struct btf_header`: magic, version, flags, and then words: its length, and where types and strings begin, and how
    // long they are.
    if half(btf, 0)? != MAGIC {
        return None;
    }
    let [header, types, types_length, strings, strings_length] =
        [4, 8, 12, 16, 20].map(|at| word(btf, at).map(|word| word as usize));
    let types = btf.get(header? + types?..)?.get(..types_length?)?;
    let strings = btf.get(header? + strings?..)?.get(..strings_length?)?;
    let name = |at: u32| strings.get(at as usize..)?.split(|byte| *byte == 0).next();
    let mut at = 0;
    while at < types.len() {
        let (type_name, information) = (word(types, at)?, word(types, at + 4)?);
        let (kind, count) = (information >> 24 & 31, (information & 0xffff) as usize);
        let has_bit_fields = information >> 31 != 0;
        let after = at + TYPE_LENGTH;
        if kind == KIND_STRUCT && name(type_name)? == structure.as_bytes() {
            let member = |index: usize| {
                let member = after + index * MEMBER_LENGTH;
                let offset = word(types, member + 8)?;
                Some((
                    name(word(types, member)?)?,
                    if has_bit_fields { offset & 0x00ff_ffff } else { offset },
                ))
            };
            return (0..count).map(member).collect();
        }
        at = after + length_after(kind, count)?;
    }
    Some(Vec::new())
}

/// How many bytes follow the common part of a type (`linux/btf.h`).
fn length_after(kind: u32, count: usize) -> Option<usize> {
    match kind {
        // Integers, variables and declaration tags.
        1 | 14 | 17 => Some(4),
        // Pointers, forward declarations, other names, qualifiers, functions, floats and type tags.
        2 | 7..=12 | 16 | 18 => Some(0),
        // Arrays.
        3 => Some(12),
        // Structures, unions, sections and long enumerations.
        4 | 5 | 15 | 19 => Some(count * 12),
        // Enumerations and prototypes.
        6 | 13 => Some(count * 8),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An integer, a structure `s` of two members, and the strings.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0s\0first\0second\0";
        let types: [u32; 4 + 3 + 6] = [1, 1 << 24, 4, 32, 5, 4 << 24 | 2, 8, 7, 1, 0, 13, 1, 32];
        let mut btf = Vec::new();
        btf.extend(MAGIC.to_ne_bytes());
        btf.extend([1, 0]);
        let length = u32::try_from(types.len() * 4).unwrap();
        for word in [24, 0, length, length, u32::try_from(strings.len()).unwrap()] {
            btf.extend(word.to_ne_bytes());
        }
        btf.extend(types.iter().flat_map(|word| word.to_ne_bytes()));
        btf.extend(strings);
        btf
    }

    #[test]
    fn fields_are_found_by_name() {
        assert_eq!(offsets(&sample(), "s", ["second", "first"]).unwrap(), [4, 0]);
        let error = offsets(&sample(), "s", ["third"]).unwrap_err();
        assert_eq!(error.to_string(), "this kernel's s has no field third");
        assert!(matches!(offsets(&sample(), "t", ["first"]), Err(BtfError::NoField { .. })));
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let sample = sample();
        for length in 0..sample.len() {
            assert!(offsets(&sample[..length], "s", ["first"]).is_err(), "{length}");
        }
    }
}
