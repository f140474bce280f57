//! Running a program that gives credentials: bounded in time and output. What it says of an error is
//! not repeated, for it may hold a secret.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// How long a program may take. A read that waits for it gives up after 30 s by default.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What a program may write, in bytes. Tokens of cloud registries have a few thousand.
const MAX_OUTPUT_BYTES: u64 = 256 << 10;

/// What became of a program.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) success: bool,
    pub(super) stdout: Vec<u8>,
}

/// Runs it with `input` on its standard input and, beside our own, these variables.
///
/// # Errors
/// In words: it can't be started, takes too long, or writes too much.
pub(super) async fn run(
    program: &OsStr,
    arguments: &[String],
    variables: &BTreeMap<String, String>,
    input: &[u8],
) -> Result<Output, String> {
    let name = program.to_string_lossy();
    match tokio::time::timeout(TIMEOUT, run_to_end(program, arguments, variables, input)).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) => Err(format!("{name}: {error}")),
        Err(_) => Err(format!("{name} did not end within {TIMEOUT:?}")),
    }
}

async fn run_to_end(
    program: &OsStr,
    arguments: &[String],
    variables: &BTreeMap<String, String>,
    input: &[u8],
) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(arguments)
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not want to know ends its input early.
        match stdin.write_all(input).await {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let mut stdout = vec![];
    if let Some(pipe) = child.stdout.take() {
        pipe.take(MAX_OUTPUT_BYTES + 1).read_to_end(&mut stdout).await?;
    }
    if stdout.len() as u64 > MAX_OUTPUT_BYTES {
        return Err(io::Error::other("it writes more than 256 KiB"));
    }
    Ok(Output { success: child.wait().await?.success(), stdout })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, input: &[u8]) -> Result<Output, String> {
        let variables = BTreeMap::from([("GIVEN".to_owned(), "value".to_owned())]);
        run(OsStr::new("/bin/sh"), &["-c".into(), script.into()], &variables, input).await
    }

    #[tokio::test]
    async fn a_program_gets_its_input_and_variables() {
        let output = shell("cat; echo $GIVEN", b"input ").await.unwrap();
        assert!(output.success);
        assert_eq!(output.stdout, b"input value\n");
        assert!(!shell("exit 3", b"not read").await.unwrap().success);
    }

    #[tokio::test]
    async fn output_without_end_is_refused() {
        let error = shell("yes secret", b"").await.unwrap_err();
        assert!(error.contains("256 KiB") && !error.contains("secret"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_hangs_is_given_up() {
        // The clock is the runtime's: it moves on when nothing else is to be done.
        let error = shell("exec sleep 1000", b"").await.unwrap_err();
        assert!(error.contains("did not end"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let nothing = BTreeMap::new();
        let error = run(OsStr::new("/nonexistent/helper"), &[], &nothing, b"").await.unwrap_err();
        assert!(error.contains("/nonexistent/helper"), "{error}");
    }
}
