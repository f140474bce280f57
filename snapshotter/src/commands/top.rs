//! `weightfs top`: what the daemon does, live.
//!
//! The terminal is put back in order whatever happens: at the end, on a signal, and on a panic (the
//! hook of `ratatui::try_init`).

mod view;

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use anyhow::bail;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tonic::transport::Channel;
use weightfs::activity::text;
use weightfs::config::Config;
use weightfs_proto::control::control_client::ControlClient;
use weightfs_proto::control::{ActivityRequest, MapRequest};

use view::View;

/// Time between two looks at the daemon.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often the thread that reads keys looks whether it is still wanted.
const KEYS: Duration = Duration::from_millis(100);

/// Parts of the map: more than a large terminal has room for.
const CELLS: u32 = 8192;

/// What a key means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    End,
    Up,
    Down,
    /// The terminal has another size.
    Redraw,
}

/// Shows what goes on until somebody has seen enough.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        bail!("`weightfs top` needs a terminal; for programs there is `weightfs status --json`");
    }
    let mut daemon = super::daemon(config).await?;
    let mut terminal = ratatui::try_init()?;
    let ended = watch(&mut daemon, &mut terminal).await;
    ratatui::restore();
    ended
}

async fn watch(
    daemon: &mut ControlClient<Channel>,
    terminal: &mut DefaultTerminal,
) -> anyhow::Result<()> {
    let mut view = View::default();
    let mut wishes = wishes();
    let mut terminated = signal(SignalKind::terminate())?;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let wish = tokio::select! {
            _ = ticks.tick() => None,
            wish = wishes.recv() => Some(wish.unwrap_or(Wish::End)),
            _ = terminated.recv() => Some(Wish::End),
        };
        match wish {
            Some(Wish::End) => return Ok(()),
            Some(Wish::Redraw) => {}
            Some(Wish::Up) => view.choose(-1),
            Some(Wish::Down) => view.choose(1),
            None => {
                if let Some(activity) = look(daemon, &mut view.trouble).await {
                    view.activity = activity;
                }
            }
        }
        if !matches!(wish, Some(Wish::Redraw)) {
            view.map = match view.chosen() {
                Some(mount) => {
                    let subject = text::subject(mount).to_owned();
                    let request = MapRequest { subject, cells: CELLS };
                    daemon.map(request).await.ok().map(tonic::Response::into_inner)
                }
                None => None,
            };
        }
        terminal.draw(|frame| view.draw(frame))?;
    }
}

/// What goes on; `None`, and why, if the daemon does not say. It may be back in a moment.
async fn look(
    daemon: &mut ControlClient<Channel>,
    trouble: &mut Option<String>,
) -> Option<weightfs_proto::control::ActivityReply> {
    let asked = daemon.activity(ActivityRequest {}).await;
    *trouble = asked.as_ref().err().map(|status| status.message().to_owned());
    asked.ok().map(tonic::Response::into_inner)
}

/// What the user wants, read by a thread that ends with the receiver.
fn wishes() -> mpsc::Receiver<Wish> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let wish = match event::poll(KEYS) {
                Ok(false) => continue,
                Ok(true) => event::read().ok().and_then(wish),
                Err(_) => Some(Wish::End),
            };
            if let Some(wish) = wish
                && sender.blocking_send(wish).is_err()
            {
                return;
            }
        }
    });
    receiver
}

fn wish(event: Event) -> Option<Wish> {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else {
        return matches!(event, Event::Resize(..)).then_some(Wish::Redraw);
    };
    match (code, modifiers) {
        (KeyCode::Char('c'), KeyModifiers::CONTROL) => Some(Wish::End),
        (KeyCode::Char('q') | KeyCode::Esc, _) => Some(Wish::End),
        (KeyCode::Up | KeyCode::Char('k'), _) => Some(Wish::Up),
        (KeyCode::Down | KeyCode::Char('j'), _) => Some(Wish::Down),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_mean_what_people_expect() {
        let key = |code, modifiers| wish(Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Some(Wish::End));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Wish::End));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
        assert_eq!(key(KeyCode::Down, KeyModifiers::NONE), Some(Wish::Down));
        assert_eq!(wish(Event::Resize(80, 24)), Some(Wish::Redraw));
    }
}
