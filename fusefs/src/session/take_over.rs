//! How a process goes on serving a mount whose server was killed.
//!
//! fuser begins each session with FUSE_INIT, which the kernel sends once in the life of a mount.
//! So the session is begun over a socket on which we play the kernel, and is then moved to the
//! kept /dev/fuse descriptor (dup3). This leans on two things that fuser 0.18 does and does not
//! promise: it keeps one descriptor for reading and writing, and it asks the kernel nothing in
//! between. Its version is pinned, and the test below notices a change.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use fuser::{InitFlags, SessionACL};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::fuse::Adapter;
use crate::ledger::Negotiated;

/// `FUSE_INIT`
const INIT: u32 = 26;

/// `sizeof(struct fuse_in_header) + sizeof(struct fuse_init_in)`
const INIT_BYTES: u32 = 104;

/// `sizeof(struct fuse_out_header)`
const ANSWER_HEADER_BYTES: usize = 16;

/// Larger than the answer to INIT (80 bytes).
const ANSWER_MAX_BYTES: usize = 4096;

/// Tells the kernel to send again what was taken and not answered (Linux 6.9).
const NOTIFY_RESEND: u32 = 7;

/// What the kernel offers as read-ahead; it keeps what the first server agreed to.
const READ_AHEAD_BYTES: u32 = 128 << 10;

/// A session that serves the kept descriptor, as was negotiated when the mount was made.
pub(super) fn take_over(
    adapter: Adapter,
    device: BorrowedFd<'_>,
    negotiated: Negotiated,
    config: fuser::Config,
) -> io::Result<fuser::Session<Adapter>> {
    let (ours, kernels) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut kernels = File::from(kernels);
    kernels.write_all(&init_request(negotiated))?;
    let session = fuser::Session::from_fd(adapter, ours, SessionACL::All, config)?;
    let mut answer = [0; ANSWER_MAX_BYTES];
    let length = kernels.read(&mut answer)?;
    check_answer(answer.get(..length).unwrap_or_default())?;
    replace(device, session.as_fd())?;
    File::from(device.try_clone_to_owned()?).write_all(&resend_notice())?;
    Ok(session)
}

/// FUSE_INIT as the kernel sends it, offering just what is in use.
fn init_request(negotiated: Negotiated) -> Vec<u8> {
    let Negotiated { version: (major, minor), capabilities } = negotiated;
    let flags = capabilities | InitFlags::FUSE_INIT_EXT.bits();
    let low = (flags & u64::from(u32::MAX)) as u32;
    let high = (flags >> 32) as u32;
    // Length, opcode; unique (two words), node (two words), uid, gid, pid, extensions.
    let header = [INIT_BYTES, INIT, 2, 0, 0, 0, 0, 0, 0, 0];
    let init = [major, minor, READ_AHEAD_BYTES, low, high];
    let unused = [0; 11];
    let words = header.into_iter().chain(init).chain(unused);
    words.flat_map(u32::to_ne_bytes).collect()
}

fn check_answer(answer: &[u8]) -> io::Result<()> {
    let error = answer.get(4..8).and_then(|bytes| bytes.first_chunk().copied());
    match error.map(i32::from_ne_bytes) {
        Some(0) if answer.len() > ANSWER_HEADER_BYTES => Ok(()),
        _ => Err(io::Error::other("the FUSE library did not answer INIT as expected")),
    }
}

fn resend_notice() -> Vec<u8> {
    // Length, the notice in place of an error, no request.
    [ANSWER_HEADER_BYTES as u32, NOTIFY_RESEND, 0, 0]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect()
}

/// Makes `target` a descriptor of what `source` is one of.
fn replace(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open. Whoever owns `target` goes on owning it, now as another file.
    #[expect(unsafe_code, reason = "the session has no other way to change its descriptor")]
    let replaced =
        unsafe { nix::libc::dup3(source.as_raw_fd(), target.as_raw_fd(), nix::libc::O_CLOEXEC) };
    if replaced < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
