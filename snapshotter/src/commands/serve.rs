//! `weightfs serve`.

use weightfs::config::Config;
use weightfs::daemon::Daemon;

use super::mount::asked_to_stop;

/// Runs the daemon until a signal.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let stop = asked_to_stop();
    let daemon = Daemon::start(config).await?;
    daemon.run(stop).await?;
    Ok(())
}
