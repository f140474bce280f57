//! `weightfs node install`, `uninstall`: WeightFS in place on a node, and away again.

use anyhow::{Context as _, bail};
use weightfs::cli::{NodeArgs, NodeCommand};
use weightfs::config::Config;
use weightfs::node::containerd::Place;
use weightfs::node::doctor;
use weightfs::node::install::{self, Change, InstallError, Target};

/// What is left to do after it is in place.
const AFTER_INSTALL: &str = "now run:
  systemctl daemon-reload
  systemctl enable --now weightfs.socket weightfs-control.socket weightfs.service
  systemctl restart containerd
  weightfs doctor";

/// What is left to do after it is away.
const AFTER_UNINSTALL: &str = "now run:
  systemctl restart containerd
  systemctl stop weightfs.service weightfs.socket weightfs-control.socket
  systemctl daemon-reload
  weightfs umount --all
images that were pulled with weightfs have to be pulled again; all others are as they were";

/// Does what was asked for.
pub async fn run(config: &Config, command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::Install(arguments) => install(config, &arguments).await,
        NodeCommand::Uninstall(arguments) => uninstall(config, &arguments),
    }
}

async fn install(config: &Config, arguments: &NodeArgs) -> anyhow::Result<()> {
    let target = target(config, arguments)?;
    let changes = install::plan(config, &target).await?;
    if !announce(&changes, arguments.dry_run) {
        println!("it is in place");
        return Ok(());
    }
    if arguments.dry_run {
        return Ok(());
    }
    install::install(&target, &changes)?;
    let wrong = doctor::containerd_to_mend(config, &target.place).await;
    if !wrong.is_empty() {
        install::uninstall(&target, &install::plan_removal(&target)?)?;
        bail!(InstallError::NotTaken(wrong.join("; ")));
    }
    println!("{AFTER_INSTALL}");
    Ok(())
}

fn uninstall(config: &Config, arguments: &NodeArgs) -> anyhow::Result<()> {
    let target = target(config, arguments)?;
    let changes = install::plan_removal(&target)?;
    if changes.is_empty() {
        println!("nothing is installed");
        return Ok(());
    }
    announce(&changes, arguments.dry_run);
    if !arguments.dry_run {
        install::uninstall(&target, &changes)?;
        println!("{AFTER_UNINSTALL}");
    }
    Ok(())
}

fn target(config: &Config, arguments: &NodeArgs) -> anyhow::Result<Target> {
    let NodeArgs { containerd_config, prefix, .. } = arguments;
    let containerd = containerd_config.clone().unwrap_or_else(|| config.containerd.config.clone());
    let place = Place {
        program: config.containerd.program.clone(),
        config: std::path::absolute(containerd).context("--containerd-config")?,
    };
    let prefix = std::path::absolute(prefix).context("--prefix")?;
    let program = std::env::current_exe().context("this program's path")?;
    Ok(Target { place, prefix, program })
}

/// Says what becomes of which file; whether anything does.
fn announce(changes: &[Change], dry_run: bool) -> bool {
    let mut due = changes.iter().filter(|change| change.is_due()).peekable();
    let any = due.peek().is_some();
    for change in due {
        let verb = match (&change.now, &change.after) {
            (None, _) => "create",
            (_, None) => "remove",
            (Some(_), Some(_)) => "change",
        };
        println!("{}{verb} {}", if dry_run { "would " } else { "" }, change.path.display());
        if dry_run && verb == "change" {
            print!("{}", difference(change));
        }
    }
    any
}

/// The lines that go and come.
fn difference(change: &Change) -> String {
    let [now, after] = [&change.now, &change.after].map(|text| text.as_deref().unwrap_or_default());
    let lines = |sign: char, of: &str, not_in: &str| -> String {
        let other: Vec<_> = not_in.lines().collect();
        let only = of.lines().filter(|line| !line.is_empty() && !other.contains(line));
        only.map(|line| format!("  {sign} {line}\n")).collect()
    };
    lines('-', now, after) + &lines('+', after, now)
}
