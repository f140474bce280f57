//! The thin edge to the kernel: parses a request, calls [`Filesystem`], replies.
//!
//! Invariants: a FUSE thread never waits for the network (a miss moves its reply into a task of
//! the runtime), and every request is answered: a reply that is dropped answers EIO by itself.

use std::ffi::OsStr;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use nix::sys::mman::{MmapAdvise, madvise};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{Instrument as _, debug, debug_span, warn};
use weightfs_store::{Read, ReadError, SegmentHold};

use crate::counters::{MountCounters, ReadFrom, ReadResult};
use crate::device::Device;
use crate::filesystem::{Filesystem, FsError, Inode, NodeRef};
use crate::ledger::Negotiated;
use crate::open_files::{BackingNumber, Mode, OpenFiles};
use crate::tree::{Content, DeviceNumber, NodeKind, Timestamp};
use crate::watchdog::{WaitingRead, Watchdog};

/// How long the kernel may keep what it was told of a tree: it never changes.
const FOR_GOOD: Duration = Duration::from_secs(24 * 3600);

/// The root directory changes with every mount: nothing of it is kept.
const NOT_AT_ALL: Duration = Duration::ZERO;

/// Inode numbers are never used again, so one generation is enough.
const GENERATION: Generation = Generation(0);

/// Largest read request. The kernel's own limit without `fs.fuse.max_pages_limit`; larger ones
/// were measured and are no faster.
const MAX_REQUEST_BYTES: u32 = 1 << 20;

/// Background requests (read-ahead) that the kernel keeps in flight. Its default of 12 lets the
/// read-ahead of one stalled source hold up the hits of everybody else.
const MAX_BACKGROUND: u16 = 512;

/// What is asked of the kernel besides passthrough.
const WANTED: [InitFlags; 6] = [
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    // Containers with user namespaces (Linux 6.12); needs default_permissions.
    InitFlags::FUSE_ALLOW_IDMAP,
];

/// What else a successor has to find as it is: what fuser asks for, passthrough, and whether the
/// kernel sends requests again.
const KEPT: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_PASSTHROUGH)
    .union(InitFlags::FUSE_HAS_RESEND);

/// Size of a page of memory.
static PAGE_BYTES: LazyLock<usize> = LazyLock::new(|| {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    size.ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096)
});

/// Block size reported by stat and statfs, in bytes.
const BLOCK_BYTES: u32 = 4096;

/// Answers the kernel from a [`Filesystem`].
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) filesystem: Arc<Filesystem>,
    /// With what keeps their cache files as they are: the store sees nothing of the kernel's reads.
    pub(crate) open_files: OpenFiles<SegmentHold>,
    /// Set when the session runs.
    pub(crate) device: Arc<OnceLock<Device>>,
    /// Whether the kernel can serve complete files by itself.
    pub(crate) passthrough: bool,
    /// Where misses wait.
    pub(crate) runtime: Handle,
    /// Who notices if one waits for too long.
    pub(crate) watchdog: Arc<Watchdog>,
    pub(crate) counters: Arc<MountCounters>,
    /// Dropped with the adapter, when the session has ended.
    pub(crate) _serving: watch::Sender<()>,
}

impl Adapter {
    fn attributes(&self, inode: &Inode) -> FileAttr {
        let number = INodeNo(self.filesystem.number(inode));
        match inode {
            Inode::Root => root_attributes(number),
            Inode::Node(node) => node_attributes(number, node),
        }
    }

    /// The cache file of a complete file, made known to the kernel.
    fn backing(
        &self,
        ino: INodeNo,
        node: &NodeRef,
        reply: &ReplyOpen,
    ) -> Option<(BackingNumber, SegmentHold)> {
        if !self.passthrough {
            return None;
        }
        let backing = match node.cache_file() {
            // Raw: dropped, it would be closed, and a successor needs it.
            Ok(Some((file, hold))) => {
                reply.open_backing(&file).map(|id| (BackingNumber(id.into_raw()), hold))
            }
            Ok(None) => return None,
            Err(error) => Err(error),
        };
        backing
            .inspect_err(|error| {
                let inode = format_args!("{:#x}", ino.0);
                debug!(inode, %error, "a complete file is not passed through");
            })
            .ok()
    }

    /// Has fetched what a loader will read.
    fn expect(&self, expected: Vec<Content>) {
        if !expected.is_empty() {
            // Not from here: queueing takes locks that fetches hold, too.
            self.runtime.spawn(async move {
                expected.iter().for_each(|content| content.blob.expect(&content.range));
            });
        }
    }

    /// Answers a read of bytes that are here.
    fn answer(&self, bytes: &[u8], reply: ReplyData, began: Instant) {
        reply_bytes(bytes, reply);
        let (bytes, time) = (bytes.len() as u64, began.elapsed());
        self.counters.read(ReadFrom::Cache, ReadResult::Ok, bytes, time);
    }

    fn open_directory(&self, ino: u64) -> Result<FopenFlags, FsError> {
        match self.filesystem.inode(ino)? {
            Inode::Root => Ok(FopenFlags::empty()),
            Inode::Node(node) => match node.get().kind {
                NodeKind::Directory(_) => {
                    Ok(FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE)
                }
                _ => Err(FsError::NotADirectory(ino)),
            },
        }
    }
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each setting falls back to what the kernel offers: an older one is only slower.
        let _ = config.set_max_write(MAX_REQUEST_BYTES);
        let _ = config.set_max_background(MAX_BACKGROUND);
        for flag in WANTED {
            if let Err(missing) = config.add_capabilities(flag) {
                debug!(?missing, "the kernel does not offer a FUSE capability");
            }
        }
        // A depth of exactly 1: with 2, overlayfs refuses the mount as a lower layer.
        self.passthrough = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        let known = WANTED.into_iter().fold(KEPT, InitFlags::union);
        let version = config.kernel_abi();
        self.filesystem.ledger().set_negotiated(Negotiated {
            version: (version.0, version.1),
            capabilities: (config.capabilities() & known).bits(),
        })
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.filesystem.lookup(parent.0, name) {
            Ok(inode) => reply.entry(&FOR_GOOD, &self.attributes(&inode), GENERATION),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        self.filesystem.forget(ino.0, count);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.filesystem.inode(ino.0) {
            Ok(inode @ Inode::Root) => reply.attr(&NOT_AT_ALL, &self.attributes(&inode)),
            Ok(inode) => reply.attr(&FOR_GOOD, &self.attributes(&inode)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let node = self.filesystem.node(ino.0);
        match node.as_ref().map(|node| node.symlink(ino.0)) {
            Ok(Ok(target)) => reply.data(target.as_encoded_bytes()),
            Ok(Err(error)) => reply.error(errno(&error)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let node = self.filesystem.node(ino.0);
        let node = match &node {
            Ok(node) if node.content().is_some() => node,
            Ok(_) => return reply.error(errno(&FsError::NotAFile(ino.0))),
            Err(error) => return reply.error(errno(error)),
        };
        let backing = || self.backing(ino, node, &reply);
        let mode = self.open_files.open(ino.0, request.unique().0, backing);
        let flags = FopenFlags::FOPEN_NOFLUSH;
        match mode {
            Ok(Mode::Served) => {
                self.counters.opens_served.increment();
                reply.opened(FileHandle(0), flags | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Ok(Mode::Passthrough(backing)) => {
                self.counters.opens_passed.increment();
                reply_passthrough(reply, flags, backing);
                self.expect(self.filesystem.expected_after(node));
            }
            Err(error) => {
                warn!(inode = format_args!("{:#x}", ino.0), %error, "an open can't be recorded");
                reply.error(Errno::ENOMEM);
            }
        }
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // In this order: see `open_files`.
        reply.ok();
        self.open_files.release(ino.0, |backing| {
            if let Some(device) = self.device.get() {
                device.close_backing(backing);
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let asked = WaitingRead { inode: ino.0, offset, size };
        let began = Instant::now();
        match self.filesystem.read(ino.0, offset, size) {
            Ok(None) => self.answer(&[], reply, began),
            Ok(Some(Read::Ready(slice))) => self.answer(&slice, reply, began),
            Ok(Some(Read::Missing(miss))) => {
                let watched = self.watchdog.watch(asked.clone());
                let counters = Arc::clone(&self.counters);
                let span = debug_span!("miss", inode = ino.0, offset, size);
                let answered = async move {
                    let _watched = watched;
                    let waited = miss.wait().await.map_err(FsError::from);
                    let (result, bytes) = match &waited {
                        Ok(slice) => (ReadResult::Ok, slice.len()),
                        Err(error) => (error.into(), 0),
                    };
                    match waited {
                        Ok(slice) => reply_bytes(&slice, reply),
                        Err(error) => refuse_read(&asked, &error, reply),
                    }
                    counters.read(ReadFrom::Fetch, result, bytes as u64, began.elapsed());
                };
                self.runtime.spawn(answered.instrument(span));
            }
            Err(error) => {
                refuse_read(&asked, &error, reply);
                self.counters.read(ReadFrom::Cache, (&error).into(), 0, began.elapsed());
            }
        }
        self.expect(self.filesystem.expected(ino.0, offset, size));
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.open_directory(ino.0) {
            Ok(flags) => reply.opened(FileHandle(0), flags),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.filesystem.read_directory(ino.0, offset, |position, name, inode| {
            let number = INodeNo(self.filesystem.number(&inode));
            !reply.add(number, position, file_type(&inode), name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.filesystem.read_directory(ino.0, offset, |position, name, inode| {
            let attributes = self.attributes(&inode);
            let full =
                reply.add(attributes.ino, position, name, &FOR_GOOD, &attributes, GENERATION);
            // The kernel counts no lookup for the dots (fuse_direntplus_link).
            if !full && name != "." && name != ".." {
                self.filesystem.looked_up(&inode);
            }
            !full
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Flags of files (`FS_IOC_GETFLAGS`): overlayfs asks for them when it copies a file up
    /// (`ovl_copy_fileattr`). There are none.
    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let blocks = self.filesystem.content_bytes().div_ceil(BLOCK_BYTES.into());
        reply.statfs(blocks, 0, 0, 0, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.filesystem.inode(ino.0) {
            Ok(Inode::Root) => reply.error(errno(&FsError::NoAttribute)),
            Ok(Inode::Node(node)) => match node.xattr(name) {
                Ok(value) => reply_xattr(value, size, reply),
                Err(error) => reply.error(errno(&error)),
            },
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.filesystem.inode(ino.0) {
            Ok(Inode::Root) => reply_xattr(&[], size, reply),
            Ok(Inode::Node(node)) => {
                let mut names = Vec::new();
                for (name, _) in &node.get().xattrs {
                    names.extend_from_slice(name.as_encoded_bytes());
                    names.push(0);
                }
                reply_xattr(&names, size, reply);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }
}

fn reply_passthrough(reply: ReplyOpen, flags: FopenFlags, BackingNumber(raw): BackingNumber) {
    // SAFETY: the id is open: `OpenFiles` has counted this open and closes it after the last
    // release. It is not closed here, since it is made raw again.
    #[expect(unsafe_code, reason = "the id's life is that of all opens of the file")]
    let backing = unsafe { reply.wrap_backing(raw) };
    reply.opened_passthrough(FileHandle(0), flags, &backing);
    backing.into_raw();
}

/// Answers a size question (`size` 0), or the value if it fits (getxattr(2)).
fn reply_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

/// Replies with bytes of a mapping that are in memory. The kernel takes them page by page, and a
/// page that is not there has to be read first; killed in the middle of that, the reply would fail
/// and with it the read (`fuse_dev_do_write`: EIO), instead of being asked for again.
fn reply_bytes(bytes: &[u8], reply: ReplyData) {
    populate(bytes);
    reply.data(bytes);
}

fn populate(bytes: &[u8]) {
    let within = bytes.as_ptr().addr() % *PAGE_BYTES;
    let start = bytes.as_ptr().wrapping_sub(within).cast_mut().cast();
    let Some(start) = NonNull::new(start) else { return };
    // SAFETY: it changes no byte of the pages, which hold a slice that is borrowed. Where it can't
    // be done (before Linux 5.14, a bad disk), the reply says so.
    #[expect(unsafe_code, reason = "advice is given for raw pages")]
    let _ = unsafe { madvise(start, within + bytes.len(), MmapAdvise::MADV_POPULATE_READ) };
}

fn refuse_read(asked: &WaitingRead, error: &FsError, reply: ReplyData) {
    let WaitingRead { inode, offset, size } = asked;
    warn!(inode = format_args!("{inode:#x}"), offset, size, %error, "read failed");
    reply.error(errno(error));
}

/// The one table from our errors to the kernel's.
fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::Stale(_) => Errno::ESTALE,
        FsError::NotADirectory(_) => Errno::ENOTDIR,
        FsError::NotAFile(_) => Errno::EISDIR,
        FsError::NotASymlink(_) => Errno::EINVAL,
        FsError::NoAttribute => Errno::ENODATA,
        FsError::Read(error) => match error {
            ReadError::Deadline { .. }
            | ReadError::Source { .. }
            | ReadError::Poisoned { .. }
            | ReadError::OutOfRange { .. }
            | ReadError::Cache { .. } => Errno::EIO,
        },
    }
}

fn file_type(inode: &Inode) -> FileType {
    match inode {
        Inode::Root => FileType::Directory,
        Inode::Node(node) => match node.get().kind {
            NodeKind::Directory(_) => FileType::Directory,
            NodeKind::File(_) => FileType::RegularFile,
            NodeKind::Symlink(_) => FileType::Symlink,
            NodeKind::CharDevice(_) => FileType::CharDevice,
            NodeKind::BlockDevice(_) => FileType::BlockDevice,
            NodeKind::Fifo => FileType::NamedPipe,
        },
    }
}

fn root_attributes(ino: INodeNo) -> FileAttr {
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::Directory,
        perm: 0o755,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

fn node_attributes(ino: INodeNo, node_ref: &NodeRef) -> FileAttr {
    let node = node_ref.get();
    let time = system_time(node.mtime);
    let (size, rdev) = match &node.kind {
        NodeKind::File(content) => (content.range.end - content.range.start, 0),
        NodeKind::Symlink(target) => (target.len() as u64, 0),
        NodeKind::CharDevice(device) | NodeKind::BlockDevice(device) => (0, encode(*device)),
        NodeKind::Directory(_) | NodeKind::Fifo => (0, 0),
    };
    FileAttr {
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        kind: file_type(&Inode::Node(node_ref.clone())),
        perm: node.permissions,
        nlink: node.links,
        uid: node.uid,
        gid: node.gid,
        rdev,
        ..root_attributes(ino)
    }
}

/// The kernel's 32-bit device number (`new_decode_dev`).
fn encode(DeviceNumber { major, minor }: DeviceNumber) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    // What no clock can show is shown as the epoch.
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(time.nanos.into())))
        .unwrap_or(UNIX_EPOCH)
}
