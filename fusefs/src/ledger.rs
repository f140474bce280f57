//! What the kernel holds of a mount and only this process knows: how each open file is served,
//! how often inodes of each tree were looked up, and what was negotiated. All of it lies in a file
//! in memory (memfd), which a keeper holds beside the /dev/fuse descriptor: so a successor of a
//! process that was killed knows it, and both go together when the last holder is gone.
//!
//! ```text
//! 0    header: magic, what was negotiated, device number, highest backing id
//! 64   slots of 32 bytes: kind u32, backing id u32, key u64, count u64, mark u64
//! ```
//!
//! Invariants: a slot is one `write` inside one page, so a kill leaves the old or the new one. It
//! is written before the kernel learns of what it counts and after the kernel gave that up: a kill
//! in between counts too much, which keeps a thing too long, never too little.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// First bytes of the file: the name and the version of this format.
const MAGIC: [u8; 8] = *b"wfsledg1";

/// Bytes of the header, a multiple of a slot.
const HEADER_BYTES: usize = 64;

/// Bytes of a slot. A power of two, so that none crosses a page.
const SLOT_BYTES: usize = 32;

/// By how much the file grows: allocated at once, so that writing a slot of it can't fail.
const GROWTH_BYTES: usize = 64 << 10;

/// The largest ledger that is read: half a million open files and trees. Beyond it the file is
/// not ours.
const MAX_BYTES: u64 = 16 << 20;

/// A ledger can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It is no ledger, or one of another version.
    #[error("the ledger of the mount was written by an incompatible version of weightfs")]
    Format,
    /// The operating system refused.
    #[error("the ledger of the mount: {0}")]
    Io(#[from] io::Error),
}

/// What the kernel and the first server of a mount agreed on. It holds as long as the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// The kernel's version of the protocol.
    pub version: (u32, u32),
    /// The capabilities in use (`FUSE_INIT` flags).
    pub capabilities: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Header {
    negotiated: Negotiated,
    device: u64,
    highest_backing: u32,
}

/// What a slot is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An open file that the server reads for; the key is its inode, the count its opens.
    Served,
    /// An open file that the kernel reads by itself; likewise.
    Passthrough,
    /// A backing id that is being closed.
    Closing,
    /// A tree; the key is its number, the count the kernel's lookups.
    Tree,
}

/// One slot in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What it is about.
    pub(crate) kind: Kind,
    /// The backing id of a file in passthrough.
    pub(crate) backing: u32,
    /// Inode or tree number.
    pub(crate) key: u64,
    /// Opens or lookups.
    pub(crate) count: u64,
    /// Of an open file the request that was counted last, of a tree its fingerprint.
    pub(crate) mark: u64,
}

/// The place of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(usize);

/// The ledger of one mount.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    header: Header,
    /// Slots that the file has room for.
    capacity: usize,
    free: Vec<Slot>,
}

impl Ledger {
    /// An empty one.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"weightfs-ledger", MFdFlags::MFD_CLOEXEC)?);
        let header = Header::default();
        let ledger =
            Self { file, state: Mutex::new(State { header, capacity: 0, free: Vec::new() }) };
        ledger.grow(&mut ledger.lock())?;
        ledger.write_header(&header)?;
        Ok(ledger)
    }

    /// The one that a predecessor wrote.
    ///
    /// # Errors
    /// When it is none of this version.
    pub fn inherited(descriptor: OwnedFd) -> Result<Self, LedgerError> {
        let file = File::from(descriptor);
        let bytes = file.metadata()?.len();
        if bytes < HEADER_BYTES as u64 || bytes > MAX_BYTES {
            return Err(LedgerError::Format);
        }
        let mut start = [0; HEADER_BYTES];
        file.read_exact_at(&mut start, 0)?;
        let header = Header::parse(&start).ok_or(LedgerError::Format)?;
        let capacity = usize::try_from(bytes).unwrap_or(0).saturating_sub(HEADER_BYTES);
        let state = State { header, capacity: capacity / SLOT_BYTES, free: Vec::new() };
        let ledger = Self { file, state: Mutex::new(state) };
        let used = ledger.entries()?;
        let mut state = ledger.lock();
        // From the back, so that low slots are used first.
        let mut taken = used.iter().map(|(slot, _)| slot.0).rev().peekable();
        for slot in (0..state.capacity).rev() {
            if taken.next_if_eq(&slot).is_none() {
                state.free.push(Slot(slot));
            }
        }
        drop(state);
        Ok(ledger)
    }

    /// The file, for a keeper.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What was negotiated when the mount was made.
    pub fn negotiated(&self) -> Negotiated {
        self.lock().header.negotiated
    }

    /// The mount's device number (`st_dev`); 0 before it is known.
    pub fn device(&self) -> u64 {
        self.lock().header.device
    }

    pub(crate) fn set_negotiated(&self, negotiated: Negotiated) -> io::Result<()> {
        self.change_header(|header| header.negotiated = negotiated)
    }

    pub(crate) fn set_device(&self, device: u64) -> io::Result<()> {
        self.change_header(|header| header.device = device)
    }

    /// The highest backing id that is or was in a slot. Ids grow.
    pub(crate) fn highest_backing(&self) -> u32 {
        self.lock().header.highest_backing
    }

    /// All slots in use, in their order.
    pub(crate) fn entries(&self) -> io::Result<Vec<(Slot, Entry)>> {
        let mut bytes = vec![0; self.lock().capacity * SLOT_BYTES];
        self.file.read_exact_at(&mut bytes, HEADER_BYTES as u64)?;
        let slots = bytes.chunks_exact(SLOT_BYTES).map(Entry::parse).enumerate();
        Ok(slots.filter_map(|(slot, entry)| Some((Slot(slot), entry?))).collect())
    }

    /// A slot to write to.
    pub(crate) fn reserve(&self) -> io::Result<Slot> {
        let mut state = self.lock();
        if state.free.is_empty() {
            self.grow(&mut state)?;
        }
        state.free.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Writes the entry of a slot.
    pub(crate) fn set(&self, slot: Slot, entry: &Entry) -> io::Result<()> {
        let mut state = self.lock();
        if entry.backing > state.header.highest_backing {
            let header = Header { highest_backing: entry.backing, ..state.header };
            self.write_header(&header)?;
            state.header = header;
        }
        drop(state);
        self.file.write_all_at(&entry.bytes(), slot.offset())
    }

    /// The entry of a slot.
    pub(crate) fn get(&self, slot: Slot) -> Option<Entry> {
        let mut bytes = [0; SLOT_BYTES];
        self.file.read_exact_at(&mut bytes, slot.offset()).ok()?;
        Entry::parse(&bytes)
    }

    /// Gives a slot back.
    pub(crate) fn clear(&self, slot: Slot) -> io::Result<()> {
        self.file.write_all_at(&[0; SLOT_BYTES], slot.offset())?;
        self.lock().free.push(slot);
        Ok(())
    }

    fn change_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut state = self.lock();
        change(&mut state.header);
        self.write_header(&state.header)
    }

    fn write_header(&self, header: &Header) -> io::Result<()> {
        self.file.write_all_at(&header.bytes(), 0)
    }

    fn grow(&self, state: &mut State) -> io::Result<()> {
        let more = GROWTH_BYTES / SLOT_BYTES;
        let end = Slot(state.capacity + more).offset();
        let length = i64::try_from(end).map_err(io::Error::other)?;
        if end > MAX_BYTES {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        nix::fcntl::posix_fallocate(&self.file, 0, length)?;
        // From the back, so that low slots are used first.
        state.free.extend((state.capacity..state.capacity + more).rev().map(Slot));
        state.capacity += more;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn offset(self) -> u64 {
        (HEADER_BYTES + self.0 * SLOT_BYTES) as u64
    }
}

impl Kind {
    const fn number(self) -> u32 {
        match self {
            Self::Served => 1,
            Self::Passthrough => 2,
            Self::Closing => 3,
            Self::Tree => 4,
        }
    }

    fn of(number: u32) -> Option<Self> {
        [Self::Served, Self::Passthrough, Self::Closing, Self::Tree]
            .into_iter()
            .find(|kind| kind.number() == number)
    }
}

impl Header {
    fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let Negotiated { version: (major, minor), capabilities } = self.negotiated;
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&major.to_le_bytes());
        bytes[12..16].copy_from_slice(&minor.to_le_bytes());
        bytes[16..24].copy_from_slice(&capabilities.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.device.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.highest_backing.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let version = (u32_at(rest, 0)?, u32_at(rest, 4)?);
        let negotiated = Negotiated { version, capabilities: u64_at(rest, 8)? };
        Some(Self { negotiated, device: u64_at(rest, 16)?, highest_backing: u32_at(rest, 24)? })
    }
}

impl Entry {
    fn bytes(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..4].copy_from_slice(&self.kind.number().to_le_bytes());
        bytes[4..8].copy_from_slice(&self.backing.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.count.to_le_bytes());
        bytes[24..].copy_from_slice(&self.mark.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: Kind::of(u32_at(bytes, 0)?)?,
            backing: u32_at(bytes, 4)?,
            key: u64_at(bytes, 8)?,
            count: u64_at(bytes, 16)?,
            mark: u64_at(bytes, 24)?,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: u64) -> Entry {
        Entry { kind: Kind::Passthrough, backing: 7, key, count: 2, mark: u64::MAX }
    }

    fn add(ledger: &Ledger, key: u64) -> Slot {
        let slot = ledger.reserve().unwrap();
        ledger.set(slot, &entry(key)).unwrap();
        slot
    }

    /// The ledger as a successor gets it.
    fn inherit(ledger: &Ledger) -> Result<Ledger, LedgerError> {
        Ledger::inherited(ledger.descriptor().try_clone_to_owned().unwrap())
    }

    #[test]
    fn a_successor_finds_what_was_written() {
        let ledger = Ledger::new().unwrap();
        let negotiated = Negotiated { version: (7, 45), capabilities: 1 << 37 | 1 };
        ledger.set_negotiated(negotiated).unwrap();
        ledger.set_device(99).unwrap();
        let slots: Vec<_> = (0..3).map(|key| add(&ledger, key)).collect();
        ledger.set(slots[0], &Entry { count: 9, ..entry(0) }).unwrap();
        ledger.clear(slots[1]).unwrap();
        let next = inherit(&ledger).unwrap();
        assert_eq!((next.negotiated(), next.device()), (negotiated, 99));
        assert_eq!(next.highest_backing(), 7);
        let entries: Vec<_> = next.entries().unwrap().into_iter().map(|(_, entry)| entry).collect();
        assert_eq!(entries, [Entry { count: 9, ..entry(0) }, entry(2)]);
        // It goes on in the free places.
        assert_eq!(next.reserve().unwrap(), slots[1]);
    }

    #[test]
    fn it_grows() {
        let ledger = Ledger::new().unwrap();
        let many = 3 * GROWTH_BYTES / SLOT_BYTES;
        for key in 0..many as u64 {
            add(&ledger, key);
        }
        assert_eq!(inherit(&ledger).unwrap().entries().unwrap().len(), many);
    }

    #[test]
    fn no_slot_crosses_a_page() {
        assert_eq!(4096 % SLOT_BYTES, 0);
        assert_eq!(HEADER_BYTES % SLOT_BYTES, 0);
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        for bytes in [&b""[..], &[0; 4096], &[b"wfsledg2".as_slice(), &[0; 4096]].concat()] {
            let mut file = tempfile::tempfile().unwrap();
            io::Write::write_all(&mut file, bytes).unwrap();
            assert!(matches!(Ledger::inherited(file.into()), Err(LedgerError::Format)));
        }
    }

    #[test]
    fn a_slot_of_an_unknown_kind_is_none() {
        let mut bytes = entry(1).bytes();
        bytes[0] = 99;
        assert_eq!(Entry::parse(&bytes), None);
        assert_eq!(Entry::parse(&bytes[1..]), None);
    }
}
