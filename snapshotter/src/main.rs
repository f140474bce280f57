//! The program `weightfs`.

mod commands;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use weightfs::cli::{Cli, Command};
use weightfs::config::Config;
use weightfs::logging::{self, Detail};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(&cli.command);
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weightfs: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if let Command::Keeper { command } = &cli.command {
        // Before there are threads: it forks.
        return Ok(weightfs::keeper::run(command)?);
    }
    let mut config = Config::load(cli.config.as_deref())?;
    if let Some(root) = &cli.root {
        config.root = std::path::absolute(root).context("--root")?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("weightfs")
        .build()
        .context("can't start threads")?;
    let done = match cli.command {
        Command::Keeper { .. } => Ok(()),
        Command::Config => {
            print!("{}", config.to_commented_toml());
            Ok(())
        }
        Command::Mount(arguments) if arguments.daemon => commands::mount::in_background(&arguments),
        Command::Mount(arguments) => runtime.block_on(commands::mount::run(&config, &arguments)),
        Command::Umount { dir: Some(dir), .. } => {
            runtime.block_on(commands::umount::run(&config, &dir))
        }
        Command::Umount { dir: None, .. } => runtime.block_on(commands::umount::all(&config)),
        Command::Ls { reference, json } => {
            runtime.block_on(commands::ls::run(&config, &reference, json))
        }
        Command::Image(arguments) => runtime.block_on(commands::image::run(&config, arguments)),
        Command::Index(arguments) => runtime.block_on(commands::index::run(&config, arguments)),
        Command::Serve => {
            let ended = runtime.block_on(commands::serve::run(&config));
            // Taken down, it would drop the requests under way, and a dropped request is answered
            // with an error. Nobody takes it down, and a successor is asked for them again.
            std::mem::forget(runtime);
            return ended.map(|()| ExitCode::SUCCESS);
        }
        Command::Pull(arguments) => runtime.block_on(commands::pull::run(&config, arguments)),
        Command::Rpull(arguments) => runtime.block_on(commands::rpull::run(&config, arguments)),
        Command::Prepare(arguments) => runtime.block_on(commands::prepare::run(&config, arguments)),
        Command::Release(arguments) => runtime.block_on(commands::prepare::run_release(arguments)),
        Command::Status { subject, json } => {
            runtime.block_on(commands::status::run(&config, subject, json))
        }
        Command::Peers { json } => runtime.block_on(commands::peers::run(&config, json)),
        Command::Top => runtime.block_on(commands::top::run(&config)),
        Command::Map(arguments) => runtime.block_on(commands::map::run(&config, &arguments)),
        Command::Log { directives, json } => {
            runtime.block_on(commands::log::run(&config, directives, json))
        }
        Command::Completions { shell } => commands::generate::completions(shell),
        Command::Man { dir } => commands::generate::man(&dir),
        Command::Doctor { json } => {
            return runtime.block_on(commands::doctor::run(&config, json));
        }
        Command::Node { command } => runtime.block_on(commands::node::run(&config, command)),
        Command::Cache { command } => runtime.block_on(commands::cache::run(&config, command)),
        Command::Pin(arguments) => runtime.block_on(commands::cache::pin(&config, &arguments)),
        Command::Unpin(arguments) => runtime.block_on(commands::cache::unpin(&config, &arguments)),
        Command::Fluid { runtime_config } => {
            runtime.block_on(commands::fluid::run(&config, runtime_config.as_deref()))
        }
        Command::Csi(arguments) => runtime.block_on(commands::csi::run(&config, arguments)),
        Command::Verify(arguments) => {
            return runtime.block_on(commands::verify::run(&config, arguments));
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// The error and its causes, those left out that an error has in its own text already.
fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        match (text.is_empty(), text.contains(&cause)) {
            (true, _) => cause,
            (false, true) => text,
            (false, false) => format!("{text}: {cause}"),
        }
    })
}

/// Logs to stderr: a daemon's life in full, of a command only what went wrong.
fn start_log(command: &Command) {
    let detail = match command {
        Command::Serve | Command::Mount(_) => Detail::Traces,
        Command::Keeper { .. } | Command::Csi(_) | Command::Fluid { .. } => Detail::Life,
        _ => Detail::Trouble,
    };
    logging::start(detail);
}
