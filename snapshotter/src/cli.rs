//! The command line: what can be asked, and nothing of how it is done.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use weightfs_store::Reference;

/// Run a model before its weights arrive.
#[derive(Debug, Parser)]
#[command(name = "weightfs", version, arg_required_else_help = true)]
#[command(after_help = "Exit status: 0 success, 1 failure, 2 wrong usage.")]
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
        #[arg(value_name = "REF")]
        reference: Reference,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run the daemon: containerd's snapshotter, and one mount for everything
    Serve,
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
    /// Push an image of the model beside it, for containers; uploads no weights
    Image(ImageArgs),
    /// Show what the daemon serves
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the effective configuration, with comments
    Config,
}

/// `weightfs mount`
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF")]
    pub reference: Reference,
    /// An empty directory
    pub dir: PathBuf,
    /// Stay in the foreground until Ctrl-C (the default)
    #[arg(long, conflicts_with = "daemon")]
    pub foreground: bool,
    /// Return once the mount is up
    #[arg(long)]
    pub daemon: bool,
    /// Set by `--daemon` for the process that it starts: say when the mount is up
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// `weightfs rpull`
#[derive(Debug, Args)]
pub struct RpullArgs {
    /// The image: host/repository:tag or host/repository@digest
    #[arg(value_name = "IMAGE")]
    pub image: Reference,
    /// containerd's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/containerd/containerd.sock")]
    pub address: PathBuf,
    /// containerd's namespace
    #[arg(long, short, value_name = "NS", default_value = "default")]
    pub namespace: String,
    /// The name that containerd knows the snapshotter by
    #[arg(long, value_name = "NAME", default_value = "weightfs")]
    pub snapshotter: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `weightfs image`
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The artifact: host/repository:tag or host/repository@digest
    #[arg(value_name = "REF")]
    pub reference: Reference,
    /// Tag of the image [default: the artifact's tag with `-image`]
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
