//! What an image has to know of a program: the header of its ELF file.

use anyhow::{Context, Result, bail};

/// An entry of the program header table that names the dynamic linker (`PT_INTERP` in elf(5)).
const INTERPRETER: u32 = 3;

/// The architecture of a program, as images name it.
///
/// # Errors
/// It is no 64-bit little-endian ELF file, is for another architecture than images are made for, or needs files beside
/// itself.
pub(crate) fn inspect(program: &[u8]) -> Result<&'static str> {
    // The class and the byte order follow the magic number: two and one mean 64 bits, little-endian.
    if program.get(..6) != Some(b"\x7fELF\x02\x01") {
        bail!("it is no program for a 64-bit little-endian Linux");
    }
    let architecture = match number(program, 0x12, 2)? {
        62 => "amd64",
        183 => "arm64",
        other => bail!("its architecture has the number {other} in elf.h, and only 62 and 183 are known"),
    };
    let [table, size, count] =
        [(0x20, 8), (0x36, 2), (0x38, 2)].map(|(at, length)| number(program, at, length));
    let (table, size) = (table?, size?);
    for index in 0..count? {
        let kind = number(program, table + index * size, 4)?;
        if kind == u64::from(INTERPRETER) {
            bail!("it is linked dynamically: build it with `cargo xtask build --static`");
        }
    }
    Ok(architecture)
}

/// A little-endian number of at most eight bytes.
fn number(program: &[u8], at: u64, length: usize) -> Result<u64> {
    let start = usize::try_from(at)?;
    let bytes = start.checked_add(length).and_then(|end| program.get(start..end)).context("it is cut off")?;
    Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header and a table of entries of these types.
    fn program(machine: u16, kinds: &[u32]) -> Vec<u8> {
        let mut program = vec![0; 0x40];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[0x12..0x14].copy_from_slice(&machine.to_le_bytes());
        program[0x20] = 0x40;
        program[0x36] = 56;
        program[0x38] = kinds.len().try_into().unwrap();
        for kind in kinds {
            program.extend(kind.to_le_bytes());
            program.extend([0; 52]);
        }
        program
    }

    #[test]
    fn a_static_program_is_accepted_with_its_architecture() {
        assert_eq!(inspect(&program(62, &[1, 2, 1])).unwrap(), "amd64");
        assert_eq!(inspect(&program(183, &[1])).unwrap(), "arm64");
    }

    #[test]
    fn what_cannot_run_alone_is_refused() {
        let refusal = |program: &[u8]| inspect(program).unwrap_err().to_string();
        assert!(refusal(&program(62, &[1, 3])).contains("dynamically"));
        assert!(refusal(&program(8, &[])).contains("number 8"));
        assert!(refusal(b"#!/bin/sh\n").contains("no program"));
        assert!(refusal(&program(62, &[1])[..0x50 - 0x0f]).contains("cut off"));
    }

    #[test]
    fn this_very_test_is_linked_dynamically() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(inspect(&own).is_err_and(|error| error.to_string().contains("--static")));
    }
}
