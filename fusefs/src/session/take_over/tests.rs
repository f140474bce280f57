//! A session on a descriptor where the test plays the kernel. If a new version of fuser fails
//! here, it does no longer do what a take-over needs.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::filesystem::Filesystem;
use crate::ledger::Ledger;
use crate::session::{Misses, Session};

const NEGOTIATED: Negotiated = Negotiated { version: (7, 45), capabilities: 1 << 39 | 1 };

const GETATTR: u32 = 3;

/// Marks a request that is sent again.
const RESENT: u64 = 1 << 63;

/// The kernel's end of a /dev/fuse descriptor, and ours.
fn device() -> (File, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (kernel, device) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let patience = nix::sys::time::TimeVal::new(30, 0);
    nix::sys::socket::setsockopt(&kernel, nix::sys::socket::sockopt::ReceiveTimeout, &patience)
        .unwrap();
    (File::from(kernel), device)
}

fn successor(device: OwnedFd) -> Session {
    let ledger = Ledger::new().unwrap();
    ledger.set_negotiated(NEGOTIATED).unwrap();
    let filesystem = Arc::new(Filesystem::of_trees(Arc::new(ledger)).unwrap());
    let runtime = tokio::runtime::Handle::current();
    let misses = Misses { runtime, deadline: Duration::from_secs(30) };
    Session::take_over(filesystem, Path::new("/nowhere"), device, misses).unwrap()
}

fn receive(kernel: &mut File) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let length = kernel.read(&mut bytes).unwrap();
    bytes.truncate(length);
    bytes
}

/// A request without arguments but the one word that GETATTR has (`fuse_getattr_in`).
fn request(opcode: u32, unique: u64, node: u64) -> Vec<u8> {
    let words = [56, opcode].into_iter().flat_map(u32::to_ne_bytes);
    let long_words = [unique, node].into_iter().flat_map(u64::to_ne_bytes);
    words.chain(long_words).chain([0; 32]).collect()
}

#[tokio::test]
async fn the_session_moves_to_the_kept_descriptor_and_asks_for_what_was_lost() {
    let (mut kernel, device) = device();
    let session = successor(device);
    assert!(session.can_be_taken_over(), "it keeps what was negotiated");
    assert_eq!(session.filesystem().ledger().negotiated(), NEGOTIATED);
    // FUSE_NOTIFY_RESEND, and nothing before it: the answer to INIT is not for the kernel.
    let notice = [16u32, 7, 0, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(receive(&mut kernel), notice);
    for unique in [4, 6 | RESENT] {
        kernel.write_all(&request(GETATTR, unique, 1)).unwrap();
        let answer = receive(&mut kernel);
        assert_eq!(&answer[4..8], &[0; 4], "no error");
        assert_eq!(&answer[8..16], &unique.to_ne_bytes(), "of this request");
        // fuse_attr_out: 16 bytes of validity, then fuse_attr, which begins with the inode.
        assert_eq!(&answer[32..40], &1u64.to_ne_bytes());
    }
    drop(kernel);
    session.ended().await;
}

#[test]
fn init_is_said_as_the_kernel_says_it() {
    let request = init_request(NEGOTIATED);
    assert_eq!(request.len(), 104);
    let word = |at: usize| u32::from_ne_bytes(*request[at..].first_chunk().unwrap());
    assert_eq!((word(0), word(4)), (104, 26));
    assert_eq!((word(40), word(44)), (7, 45));
    assert_eq!((word(52), word(56)), (1 | 1 << 30, 1 << 7));
}

#[test]
fn an_answer_that_is_none_is_noticed() {
    let answer = |error: i32, bytes: usize| {
        let mut answer = vec![0; bytes];
        answer[4..8].copy_from_slice(&error.to_ne_bytes());
        answer
    };
    assert!(check_answer(&answer(0, 80)).is_ok());
    assert!(check_answer(&answer(-5, 80)).is_err());
    assert!(check_answer(&answer(0, 16)).is_err());
    assert!(check_answer(&[]).is_err());
}
