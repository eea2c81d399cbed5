//! TAP devices.
#![expect(unsafe_code, reason = "no crate offers the request that names a TAP device")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::OFlags;

/// `TUNSETIFF` (`linux/if_tun.h`).
const SET_INTERFACE: rustix::ioctl::Opcode = 0x4004_54ca;
/// `IFF_TAP | IFF_NO_PI`.
const FLAGS: [u8; 2] = 0x1002_u16.to_ne_bytes();
/// `struct ifreq` (`linux/if.h`): a name of at most 15 bytes, and a union that starts with the flags.
type Request = [u8; 40];

/// Makes a device in the current namespace; it lasts as long as the file.
pub(crate) fn open(name: &str) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("a flag of open(2)");
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun")?;
    let mut request: Request = [0; 40];
    assert!(name.len() < 16, "{name} is too long for an interface");
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&FLAGS);
    // SAFETY: the request reads and writes one `struct ifreq`, whose size the array has (`__tun_chr_ioctl`).
    unsafe {
        let request = rustix::ioctl::Updater::<SET_INTERFACE, Request>::new(&mut request);
        rustix::ioctl::ioctl(&file, request)?;
    }
    Ok(file)
}
