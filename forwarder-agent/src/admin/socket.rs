//! The admin endpoint's socket in the file system: never open to more than those it is for, never stolen from an agent that lives, and
//! removed by its own agent alone.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, chownat, fchmod, fstat, lstat, open, renameat_with,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::settings::GroupName;

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    #[error(
        "cannot make the folder {folder}: {source}; make it, or choose another path with --admin-socket, or `off`"
    )]
    Folder { folder: PathBuf, source: io::Error },
    #[error(
        "everybody may replace what stands in the folder {folder}: take that permission away (chmod o-w), or choose another path \
         with --admin-socket"
    )]
    Exposed { folder: PathBuf },
    #[error("{path} is not a socket: remove it, or choose another path with --admin-socket")]
    NotASocket { path: PathBuf },
    #[error(
        "another agent that is running has it: choose another path for one of the two with --admin-socket"
    )]
    Taken,
    #[error("there is no group {group}: make it, or name another with --admin-socket-group")]
    NoGroup { group: GroupName },
    #[error(
        "cannot give it to group {group}: {source}; that takes CAP_CHOWN, or a group of the agent's own with --admin-socket-group"
    )]
    Group { group: GroupName, source: io::Error },
    #[error("cannot {attempt} {path}: {source}")]
    Kernel { attempt: &'static str, path: PathBuf, source: io::Error },
}

/// A socket's file, which is removed when this value is dropped, if it is still there.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// The file itself: as long as this is held, no other has its number.
    held: OwnedFd,
    /// The folder, if it was made for it.
    made: Option<PathBuf>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if is_still_ours(&self.path, &self.held) {
            // Another agent replaces what cannot be removed.
            let _ = fs::remove_file(&self.path);
        }
        if let Some(folder) = &self.made {
            // Others may have put something there.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Opens the socket at `path`, for this user alone or for `group` as well.
///
/// # Errors
/// The folder cannot be had, somebody else has the path, or the kernel refuses.
pub(super) fn open_at(
    path: &Path,
    group: Option<&GroupName>,
) -> Result<(UnixListener, SocketFile), SocketError> {
    let kernel = |attempt, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| SocketError::Kernel { attempt, path, source }
    };
    let made = make_folder(path)?;
    match find(path)? {
        Found::Nothing => {}
        Found::Dead => remove_dead(path)?,
        Found::Alive => return Err(SocketError::Taken),
    }
    // What connects to a socket that does not listen yet is refused. On Linux the file of a socket gets the mode that the
    // socket has (unix_bind), less the umask, so that there is no moment with a wider one either.
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(kernel("make a socket for", path))?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| kernel("set the mode of the socket for", path)(errno.into()))?;
    let beside = beside(path);
    SockAddr::unix(&beside)
        .and_then(|address| socket.bind(&address))
        .map_err(kernel("bind the socket", &beside))?;
    let held = open(&beside, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| kernel("look at the socket", &beside)(errno.into()))?;
    let mut file = SocketFile { path: beside, held, made };
    if let Some(group) = group {
        give_to(group, &file)?;
    }
    socket.listen(BACKLOG).map_err(kernel("listen on the socket", path))?;
    renameat_with(CWD, &file.path, CWD, path, RenameFlags::NOREPLACE).map_err(|errno| match errno {
        Errno::EXIST => SocketError::Taken,
        errno => kernel("put the socket at", path)(errno.into()),
    })?;
    path.clone_into(&mut file.path);
    Ok((socket.into(), file))
}

/// Makes the folder of `path` if it is missing; returns it if it did.
fn make_folder(path: &Path) -> Result<Option<PathBuf>, SocketError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let failed = |source| SocketError::Folder { folder: folder.to_owned(), source };
    let made = match fs::metadata(folder) {
        Ok(found) => {
            // Where it is sticky, one may replace one's own.
            if found.mode() & 0o1002 == 0o002 {
                return Err(SocketError::Exposed { folder: folder.to_owned() });
            }
            false
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed)?;
            // Whatever the umask: the socket's own mode says who may use it.
            fs::set_permissions(folder, Permissions::from_mode(0o755)).map_err(failed)?;
            true
        }
        Err(error) => return Err(failed(error)),
    };
    Ok(made.then(|| folder.to_owned()))
}

/// What stands at a path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Found {
    Nothing,
    /// A socket on which nobody listens.
    Dead,
    /// A socket on which somebody listens.
    Alive,
}

fn find(path: &Path) -> Result<Found, SocketError> {
    let failed =
        |source| SocketError::Kernel { attempt: "see whose socket stands at", path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(SocketError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(failed(error)),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // An agent that has much to do may have a full backlog: it is not waited for.
    socket.set_nonblocking(true).map_err(failed)?;
    let connected = SockAddr::unix(path).and_then(|address| socket.connect(&address));
    match connected.map_err(|error| (Errno::from_io_error(&error), error)) {
        Ok(()) | Err((Some(Errno::AGAIN), _)) => Ok(Found::Alive),
        Err((Some(Errno::CONNREFUSED), _)) => Ok(Found::Dead),
        Err((Some(Errno::NOENT), _)) => Ok(Found::Nothing),
        Err((_, error)) => Err(failed(error)),
    }
}

/// Removes a socket on which nobody listens. Another agent may do so at the same time and put its own there: so what is taken away is
/// looked at again before it is removed.
fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let failed =
        |source| SocketError::Kernel { attempt: "remove the dead socket", path: path.to_owned(), source };
    let beside = beside(path);
    match fs::rename(path, &beside) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    if find(&beside)? == Found::Alive {
        renameat_with(CWD, &beside, CWD, path, RenameFlags::NOREPLACE)
            .map_err(|errno| failed(errno.into()))?;
        return Err(SocketError::Taken);
    }
    fs::remove_file(&beside).map_err(failed)
}

/// Lets the members of a group use a socket. Its file is not named again: who may write to the folder could have put another there.
fn give_to(group: &GroupName, file: &SocketFile) -> Result<(), SocketError> {
    let id = match group {
        GroupName::Id(id) => *id,
        GroupName::Name(name) => match nix::unistd::Group::from_name(name) {
            Ok(Some(found)) => found.gid.as_raw(),
            Ok(None) => return Err(SocketError::NoGroup { group: group.clone() }),
            Err(errno) => return Err(SocketError::Group { group: group.clone(), source: errno.into() }),
        },
    };
    let failed = |source: io::Error| SocketError::Group { group: group.clone(), source };
    let by_descriptor = format!("/proc/self/fd/{}", file.held.as_raw_fd());
    let is_ours = fs::metadata(&by_descriptor)
        .is_ok_and(|found| found.file_type().is_socket() && found.uid() == geteuid().as_raw());
    if !is_ours {
        return Err(failed(io::Error::other("somebody has replaced it")));
    }
    chownat(&file.held, "", None, Some(Gid::from_raw(id)), AtFlags::EMPTY_PATH)
        .map_err(|errno| failed(errno.into()))?;
    fs::set_permissions(by_descriptor, Permissions::from_mode(0o660)).map_err(failed)
}

fn is_still_ours(path: &Path, held: &OwnedFd) -> bool {
    let identity = |found: &rustix::fs::Stat| (found.st_dev, found.st_ino);
    match (lstat(path), fstat(held)) {
        (Ok(found), Ok(held)) => identity(&found) == identity(&held),
        (Err(_), _) | (_, Err(_)) => false,
    }
}

/// A name in the same folder that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    path.with_file_name(format!(".{:x}", now.as_nanos() & 0xff_ffff_ffff))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_socket_is_for_its_owner_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("forwarder/admin.sock");
        let (listener, file) = open_at(&path, None).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o755));
        assert_eq!(names(path.parent().unwrap()), ["admin.sock"]);
        UnixStream::connect(&path).unwrap();
        drop((listener, file));
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_group_may_share_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let own = rustix::process::getegid().as_raw();
        let (_listener, file) = open_at(&path, Some(&GroupName::Id(own))).unwrap();
        assert_eq!(mode(&path), 0o660);
        assert_eq!(fs::symlink_metadata(&path).unwrap().gid(), own);
        drop(file);
        let nobodys = GroupName::Name("nobody-has-this-group".into());
        let error = open_at(&path, Some(&nobodys)).unwrap_err();
        assert!(error.to_string().contains("there is no group nobody-has-this-group"), "{error}");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = open_at(&path, None).unwrap();
        assert!(matches!(open_at(&path, None), Err(SocketError::Taken)));
        assert_eq!(names(folder.path()), ["admin.sock"]);
        UnixStream::connect(&path).unwrap();
        // Nor is that of a successor removed.
        drop(listener);
        let (_successor, _file) = open_at(&path, None).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_backlog_that_is_full_belongs_to_somebody_who_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        busy.listen(0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert_eq!(find(&path).unwrap(), Found::Alive);
    }

    #[test]
    fn what_is_no_socket_and_where_everybody_may_write_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(open_at(&path, None), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
        for (mode, is_refused) in [(0o777, true), (0o1777, false)] {
            fs::set_permissions(folder.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(matches!(open_at(&path, None), Err(SocketError::Exposed { .. })), is_refused);
        }
    }
}
