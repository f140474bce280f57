//! `weightfs doctor`: what is wrong with this node, and how to mend it.

use std::process::ExitCode;

use serde_json::json;
use weightfs::config::Config;
use weightfs::node::doctor::{self, Finding, Level};

use super::cache::print_json;

/// Looks at the node. Failure if something is to be mended.
pub async fn run(config: &Config, as_json: bool) -> anyhow::Result<ExitCode> {
    let findings = doctor::examine(config).await;
    let to_mend = findings.iter().filter(|finding| finding.level == Level::Mend).count();
    if as_json {
        print_json(&json!({ "fine": to_mend == 0, "findings": findings }))?;
    } else {
        findings.iter().for_each(print);
        match to_mend {
            0 => println!("\nnothing to mend"),
            count => println!("\nto mend: {count}"),
        }
    }
    Ok(if to_mend == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(finding: &Finding) {
    let Finding { check, level, place, found, mend } = finding;
    println!("{:<4}  {check}: {place}", level.as_str());
    println!("      {found}");
    if !mend.is_empty() {
        println!("      -> {mend}");
    }
}
