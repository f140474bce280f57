//! `weightfs completions` and `weightfs man`: what is made from the command line's own definition.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;
use weightfs::cli::Cli;

/// Prints a shell's completions.
pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Cli::command(), "weightfs", &mut script);
    io::stdout().write_all(&script).context("standard output")
}

/// Writes a page for the program and one for each of its commands.
pub fn man(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(|| format!("{}", dir.display()))
}
