//! The command line: what can be asked, and nothing of how it is done.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use glob::Pattern;
use weightfs_store::{Reference, parse_reference};

use crate::cache::Subject;
use crate::csi::{DEFAULT_DRIVER, DriverName};

/// Run a model before its weights arrive.
#[derive(Debug, Parser)]
#[command(name = "weightfs", version, arg_required_else_help = true)]
#[command(after_help = "Exit status: 0 success, 1 failure, 2 wrong usage, 3 bad blobs (verify).")]
pub struct Cli {
    /// Configuration file [default: /etc/weightfs/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// State directory [default: `root` of the configuration]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be asked.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a model's files under a directory; fetch what is read
    Mount(MountArgs),
    /// Unmount a model
    Umount {
        /// The directory that it was mounted on
        #[arg(required_unless_present = "all")]
        dir: Option<PathBuf>,
        /// Take away what a stopped daemon left: its mount, and the models bound from it
        #[arg(long, conflicts_with = "dir")]
        all: bool,
    },
    /// List a model's files without mounting it
    Ls {
        /// The artifact: host/repository:tag or host/repository@digest
        #[arg(value_name = "REF", value_parser = parse_reference)]
        reference: Reference,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run the daemon: containerd's snapshotter, and one mount for everything
    Serve,
    /// Fetch a model's files into the cache before they are read
    Pull(PullArgs),
    /// Run a daemon, start it again when it ends, and keep its mount meanwhile
    ///
    /// For nodes without systemd: what systemd's file descriptor store does for a unit, this does
    /// for one command. Running containers wait while the daemon is replaced. SIGHUP starts the
    /// daemon again, maybe as a new version; SIGTERM and SIGINT end it and take the mount away.
    Keeper {
        /// The command: weightfs serve, with its options
        #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Pull an image into containerd without its lazy layers
    Rpull(RpullArgs),
    /// Make containerd show an artifact as it was pushed, for its containers
    ///
    /// Prints the directory to bind, and the argument of `ctr run` that does so. Nothing of the
    /// artifact is fetched before it is read. It stays until `weightfs release`.
    Prepare(PrepareArgs),
    /// Take away what `weightfs prepare` made
    Release(ReleaseArgs),
    /// Push an image of the model beside it, for containers; uploads no weights
    Image(ImageArgs),
    /// Push an index of the artifact beside it: its files, and a digest for each chunk
    Index(IndexArgs),
    /// Show what the daemon serves, and of each layer whether it is lazy or why not
    Status {
        /// Only the layers of this snapshot or image, or this model
        #[arg(value_name = "SNAPSHOT|IMAGE")]
        subject: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the other nodes, how they are, and what came from where
    Peers {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Watch what the daemon does: mounts, their rates, where their chunks are
    ///
    /// Keys: up and down choose a mount, q ends.
    Top,
    /// Draw where the chunks of a model or image are that the daemon shows
    Map(MapArgs),
    /// Say or change what the daemon logs, until it is started again
    Log {
        /// error, warn, info, debug, trace, a filter as in WEIGHTFS_LOG, or `default`
        #[arg(value_name = "LEVEL")]
        directives: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completions
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual's pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// Put WeightFS in place on this node: containerd's configuration and systemd's units
    Node {
        /// What to do.
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Look for what is wrong with this node, and say how to mend it
    ///
    /// Exit status: 0 if all is fine, 1 if something is to be mended.
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// What the cache holds, and making room in it
    Cache {
        /// What to do with it.
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Keep a model or image in the cache, whatever happens
    Pin(PinArgs),
    /// Take a pin away
    Unpin(PinArgs),
    /// Hash again what is in the cache, and compare
    ///
    /// Exit status: 0 if nothing bad is left, 3 if something is, 1 if it could not be found out.
    Verify(VerifyArgs),
    /// Mount what Fluid asks for, in the FUSE pod of a ThinRuntime
    Fluid {
        /// Fluid's runtime configuration [default: /etc/fluid/config/config.json]
        #[arg(long, value_name = "FILE")]
        runtime_config: Option<PathBuf>,
    },
    /// Run Kubernetes's volume plugin (CSI), which the daemon does the work of
    Csi(CsiArgs),
    /// Print the effective configuration, with comments
    Config,
}

/// `weightfs csi`
#[derive(Debug, Args)]
pub struct CsiArgs {
    /// The plugin's socket: a path, or unix:///path
    /// [default: /var/lib/kubelet/plugins/DRIVER/csi.sock]
    #[arg(long, value_name = "SOCKET")]
    pub endpoint: Option<String>,
    /// This node's name in the cluster [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node_id: Option<String>,
    /// The driver's name, in CSIDriver objects and before the slash of volume attributes
    #[arg(long, value_name = "DRIVER", default_value = DEFAULT_DRIVER)]
    pub driver_name: DriverName,
    /// Make the plugin known to the kubelet, in its directory of plugins
    #[arg(long, value_name = "DIR")]
    pub registration_dir: Option<PathBuf>,
}

/// `weightfs map`
#[derive(Debug, Args)]
pub struct MapArgs {
    /// A model's reference or where it is mounted, or an image
    #[arg(value_name = "REF|DIR")]
    pub subject: String,
    /// Write an SVG; without it, the map is drawn on the terminal
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

/// `weightfs node`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Tell containerd of the snapshotter, and write the units
    ///
    /// Does nothing where it is in place. Restarts nothing: it says what to run.
    Install(NodeArgs),
    /// Take it away again
    ///
    /// Files that nobody has changed since are what they were; of others only our keys go.
    Uninstall(NodeArgs),
}

/// `weightfs node install`, `weightfs node uninstall`
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// containerd's configuration [default: `containerd.config` of the configuration]
    #[arg(long, value_name = "FILE")]
    pub containerd_config: Option<PathBuf>,
    /// Where etc/systemd and etc/weightfs are
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub prefix: PathBuf,
}

/// `weightfs cache`
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List models, images and blobs that are here, in whole or in part
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the room that the cache takes and has
    Df {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take a model, image or blob out of the cache, as far as nobody uses it
    Evict {
        /// host/repository:tag, host/repository@digest, or the digest of a blob
        #[arg(value_name = "REF")]
        subject: Subject,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take everything out of the cache that is neither in use nor pinned
    Prune {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `weightfs pin`, `weightfs unpin`
#[derive(Debug, Args)]
pub struct PinArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// host/repository:tag, host/repository@digest, or the digest of a blob [default: everything]
    #[arg(value_name = "REF")]
    pub subject: Option<Subject>,
    /// Discard what is bad and fetch it again
    #[arg(long)]
    pub repair: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs mount`
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// An empty directory
    pub dir: PathBuf,
    /// Stay in the foreground until Ctrl-C (the default)
    #[arg(long, conflicts_with = "daemon")]
    pub foreground: bool,
    /// Return once the mount is up
    #[arg(long)]
    pub daemon: bool,
    /// Record in which order the model is read: the next mount fetches it so. Into FILE, or the
    /// state directory
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub record: Option<Option<PathBuf>>,
    /// A recorded profile: what it has is fetched in its order
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// The index of the artifact, from a file: see `weightfs index -o`
    #[arg(long, value_name = "FILE")]
    pub index: Option<PathBuf>,
    /// Set by `--daemon` for the process that it starts: say when the mount is up
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// A containerd, and what it knows the snapshotter by
#[derive(Debug, Args)]
pub struct ContainerdArgs {
    /// containerd's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/containerd/containerd.sock")]
    pub address: PathBuf,
    /// containerd's namespace
    #[arg(long, short, value_name = "NS", default_value = "default")]
    pub namespace: String,
    /// The name that containerd knows the snapshotter by
    #[arg(long, value_name = "NAME", default_value = "weightfs")]
    pub snapshotter: String,
}

impl MountArgs {
    /// A model on a directory, until a signal.
    pub const fn in_foreground(reference: Reference, dir: PathBuf) -> Self {
        Self {
            reference,
            dir,
            foreground: true,
            daemon: false,
            record: None,
            profile: None,
            index: None,
            detached: false,
        }
    }
}

/// `weightfs rpull`
#[derive(Debug, Args)]
pub struct RpullArgs {
    /// The image: host/repository:tag or host/repository@digest
    #[arg(value_name = "IMAGE", value_parser = parse_reference)]
    pub image: Reference,
    /// Which containerd.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs prepare`
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Which containerd.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// Where a container shall have it: what is printed says so
    #[arg(long, value_name = "DIR", default_value = "/models")]
    pub target: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs release`
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// The artifact, as it was named to `weightfs prepare`
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Which containerd.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs image`
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Tag of the image [default: the artifact's tag with `-image`]
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// First make and push the artifact's index, if it has none: see `weightfs index`
    #[arg(long)]
    pub index: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs index`
#[derive(Debug, Args)]
pub struct IndexArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Write it to a file and push nothing
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Put this recorded load into it; without, the one that is kept here, if there is one
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF", value_parser = parse_reference)]
    pub reference: Reference,
    /// Only files that match, like `*.json` or `weights/**` (may be given again)
    #[arg(long, value_name = "GLOB")]
    pub files: Vec<Pattern>,
    /// Only what a recorded load has read, in its order: of FILE, or the one that was recorded here
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[arg(conflicts_with = "files")]
    pub profile: Option<Option<PathBuf>>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
