//! `weightfs serve`.

use nix::sys::stat::{Mode, umask};
use tokio::signal::unix::{SignalKind, signal};
use weightfs::config::Config;
use weightfs::daemon::{Daemon, Stop};
use weightfs::handover::Inherited;

/// Runs the daemon until a signal. See [`Daemon::run`] for what must not follow.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    // Whatever it makes, only root may read it.
    umask(Mode::from_bits_truncate(0o077));
    let stop = asked_to_stop();
    let inherited = Inherited::take()?;
    Ok(Daemon::start(config, inherited).await?.run(stop).await?)
}

/// Waits for a signal to stop; counts them from the call on. SIGINT ends the mount, too; others
/// leave it to a successor.
fn asked_to_stop() -> impl Future<Output = Stop> {
    let kinds = [
        (SignalKind::terminate(), Stop::Restart),
        (SignalKind::hangup(), Stop::Restart),
        (SignalKind::interrupt(), Stop::End),
    ];
    let mut signals: Vec<_> =
        kinds.into_iter().filter_map(|(kind, stop)| Some((signal(kind).ok()?, stop))).collect();
    async move {
        let waits = signals.iter_mut().map(|(signal, stop)| {
            Box::pin(async move {
                signal.recv().await;
                *stop
            })
        });
        futures::future::select_all(waits).await.0
    }
}
