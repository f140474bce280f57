//! `weightfs pull`.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use futures::StreamExt as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use weightfs::cache::Selection;
use weightfs::cli::PullArgs;
use weightfs::config::Config;
use weightfs::profiles;
use weightfs_proto::control::{PullProgress, Pulled, pull_event};

use super::reach::Reach;
use super::size;

/// Fetches files into the cache.
pub async fn run(config: &Config, arguments: PullArgs) -> anyhow::Result<()> {
    let PullArgs { reference, files, profile, json } = arguments;
    let selection = match profile {
        None => Selection::Files(files),
        Some(file) => Selection::Profile(file.as_deref().map(profiles::read).transpose()?),
    };
    let mut cache = Reach::create(config).await?;
    let mut events = cache.pull(&reference, selection).await?;
    let mut bars = Bars::new();
    let mut result = None;
    while let Some(event) = events.next().await {
        match event?.event {
            Some(pull_event::Event::Progress(progress)) => bars.show(&progress),
            Some(pull_event::Event::Pulled(pulled)) => result = Some(pulled),
            None => {}
        }
    }
    bars.finish();
    let Pulled { files, size: bytes, fetched } = result.context("the daemon went away")?;
    if json {
        let result = json!({ "files": files, "size": bytes, "fetched": fetched });
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(());
    }
    println!("{files} files, {}, are here; {} were fetched", size(bytes), size(fetched));
    Ok(())
}

/// A bar for the file that is fetched and one for all, if stderr is a terminal.
struct Bars {
    bars: Option<(MultiProgress, ProgressBar, ProgressBar)>,
}

impl Bars {
    fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(|| {
            let bars = MultiProgress::new();
            let file = bars.add(bar("{wide_msg} {bytes:>10} of {total_bytes:>10}"));
            let all = bars.add(bar("{bar:24} {bytes} of {total_bytes}, {bytes_per_sec} ({eta})"));
            (bars, file, all)
        });
        Self { bars }
    }

    fn show(&mut self, progress: &PullProgress) {
        let Some((bars, file, all)) = &self.bars else { return };
        if progress.path != file.message() {
            if !file.message().is_empty() {
                let done = format!("{} {}", file.message(), size(file.length().unwrap_or(0)));
                // The screen is all that is lost with it.
                let _ = bars.println(done);
            }
            file.set_message(progress.path.clone());
        }
        for (bar, bytes, total) in
            [(file, progress.bytes, progress.size), (all, progress.all_bytes, progress.all_size)]
        {
            bar.set_length(total);
            bar.set_position(bytes);
        }
    }

    fn finish(&self) {
        if let Some((_, file, all)) = &self.bars {
            file.finish_and_clear();
            all.finish_and_clear();
        }
    }
}

fn bar(style: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}
