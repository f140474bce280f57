//! `weightfs log`: what the daemon logs.

use serde_json::json;
use weightfs::config::Config;
use weightfs_proto::control::LogRequest;

/// Asks the daemon, and tells it if there is something to tell.
pub async fn run(config: &Config, directives: Option<String>, as_json: bool) -> anyhow::Result<()> {
    let mut daemon = super::daemon(config).await?;
    let request = LogRequest { directives: directives.unwrap_or_default() };
    let reply = daemon.log(request).await.map_err(|status| super::refused(&status))?.into_inner();
    if as_json {
        return super::cache::print_json(&json!({ "directives": reply.directives }));
    }
    println!("{}", reply.directives);
    Ok(())
}
