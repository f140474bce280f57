//! `weightfs cache`, `pin` and `unpin`: what is here, and what shall stay or go.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use weightfs::cache::Subject;
use weightfs::cli::{CacheCommand, PinArgs};
use weightfs::config::Config;
use weightfs_proto::control::{CacheReply, CachedBlob, EvictReply, PinReply};
use weightfs_store::Reference;

use super::reach::Reach;
use super::size;

/// Does what `weightfs cache` was asked for.
pub async fn run(config: &Config, command: CacheCommand) -> anyhow::Result<()> {
    let mut cache = Reach::new(config).await?;
    match command {
        CacheCommand::Ls { json: true } => print_json(&list_json(&cache.list().await?)),
        CacheCommand::Ls { json: false } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            print!("{}", table(&cache.list().await?, now));
            Ok(())
        }
        CacheCommand::Df { json: true } => print_json(&space_json(&cache.list().await?)),
        CacheCommand::Df { json: false } => {
            print!("{}", space(&cache.list().await?));
            Ok(())
        }
        CacheCommand::Evict { subject, json } => evict(&mut cache, &subject, json).await,
        CacheCommand::Prune { json } => {
            let pruned = cache.prune().await?;
            if json {
                return print_json(&json!({ "blobs": pruned.blobs, "freed": pruned.freed }));
            }
            println!("{} freed: {}", size(pruned.freed), blobs(pruned.blobs));
            Ok(())
        }
    }
}

/// `weightfs pin`
pub async fn pin(config: &Config, arguments: &PinArgs) -> anyhow::Result<()> {
    let pinned = Reach::new(config).await?.pin(&arguments.reference).await?;
    print_pin("pinned", &arguments.reference, &pinned, arguments.json)
}

/// `weightfs unpin`
pub async fn unpin(config: &Config, arguments: &PinArgs) -> anyhow::Result<()> {
    let unpinned = Reach::new(config).await?.unpin(&arguments.reference).await?;
    print_pin("unpinned", &arguments.reference, &unpinned, arguments.json)
}

fn print_pin(
    what: &str,
    reference: &Reference,
    reply: &PinReply,
    as_json: bool,
) -> anyhow::Result<()> {
    let PinReply { blobs: count, size: bytes } = *reply;
    let reference = reference.whole();
    if as_json {
        let pinned = what == "pinned";
        return print_json(
            &json!({ "reference": reference, "pinned": pinned, "blobs": count, "size": bytes }),
        );
    }
    println!("{what} {reference}: {}, {}", blobs(count), size(bytes));
    Ok(())
}

async fn evict(cache: &mut Reach, subject: &Subject, as_json: bool) -> anyhow::Result<()> {
    let EvictReply { blobs: evicted } = cache.evict(subject).await?;
    let freed = evicted.iter().map(|blob| blob.freed).sum();
    if as_json {
        let blob = |blob: &weightfs_proto::control::EvictedBlob| {
            json!({ "digest": blob.digest, "outcome": blob.outcome, "freed": blob.freed,
                "kept": blob.kept })
        };
        let blobs: Vec<_> = evicted.iter().map(blob).collect();
        return print_json(&json!({ "freed": freed, "blobs": blobs }));
    }
    println!("{} freed: {}", size(freed), blobs(evicted.len() as u64));
    for (outcome, why) in [("pinned", "is pinned: unpin it first"), ("part", "is in use")] {
        let kept = evicted.iter().filter(|blob| blob.outcome == outcome);
        for blob in kept {
            println!("{:.19} {why}", blob.digest);
        }
    }
    Ok(())
}

fn blobs(count: u64) -> String {
    if count == 1 { "1 blob".to_owned() } else { format!("{count} blobs") }
}

pub(super) fn print_json(value: &Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn list_json(reply: &CacheReply) -> Value {
    let blob = |blob: &CachedBlob| {
        json!({
            "digest": blob.digest, "decompressed": blob.decompressed, "size": blob.size,
            "cached": blob.cached, "disk": blob.disk, "trust": blob.trust,
            "in_use": blob.in_use, "pinned": blob.pinned, "last_used": blob.last_used,
            "references": blob.references,
        })
    };
    let reference = |known: &weightfs_proto::control::CachedReference| {
        json!({ "reference": known.reference, "manifest_digest": known.manifest_digest,
            "pinned": known.pinned })
    };
    json!({
        "references": reply.references.iter().map(reference).collect::<Vec<_>>(),
        "blobs": reply.blobs.iter().map(blob).collect::<Vec<_>>(),
    })
}

/// What a line of the table is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sum {
    size: u64,
    cached: u64,
    disk: u64,
    poisoned: bool,
    verified: bool,
    in_use: bool,
    pinned: bool,
    last_used: Option<u64>,
}

impl Sum {
    fn of<'a>(blobs: impl IntoIterator<Item = &'a CachedBlob>) -> Self {
        let start = Self { verified: true, ..Self::default() };
        blobs.into_iter().fold(start, |sum, blob| Self {
            size: sum.size + blob.size,
            cached: sum.cached + blob.cached,
            disk: sum.disk + blob.disk,
            poisoned: sum.poisoned || blob.trust == "poisoned",
            verified: sum.verified && blob.trust == "verified",
            in_use: sum.in_use || blob.in_use,
            pinned: sum.pinned || blob.pinned,
            last_used: sum.last_used.max(blob.last_used),
        })
    }

    fn trust(&self) -> &'static str {
        match (self.poisoned, self.verified) {
            (true, _) => "poisoned",
            (false, true) => "verified",
            (false, false) => "transport",
        }
    }

    fn used(&self, now: u64) -> String {
        let pin = if self.pinned { ", pinned" } else { "" };
        let used = match self.last_used {
            _ if self.in_use => "in use".to_owned(),
            Some(then) => age(now.saturating_sub(then)),
            None => "-".to_owned(),
        };
        format!("{used}{pin}")
    }
}

/// A table of the references, and of the blobs that none of them has. A name has a line of its
/// own: most of them would not fit beside the numbers in 80 columns, and cut they are of no use.
fn table(reply: &CacheReply, now: u64) -> String {
    let mut lines: BTreeMap<&str, Sum> = BTreeMap::new();
    for known in &reply.references {
        let own = reply.blobs.iter().filter(|blob| blob.references.contains(&known.reference));
        lines.insert(&known.reference, Sum { pinned: known.pinned, ..Sum::of(own) });
    }
    let nameless = reply.blobs.iter().filter(|blob| blob.references.is_empty());
    lines.extend(nameless.map(|blob| (blob.digest.as_str(), Sum::of([blob]))));
    if lines.is_empty() {
        return "the cache is empty\n".to_owned();
    }
    let row = |here: &str, of: &str, disk: &str, trust: &str, used: &str| {
        format!("{here:>10} {of:>10} {disk:>10} {trust:<9} {used}")
    };
    let mut text = format!("{}\n", row("HERE", "OF", "ON DISK", "TRUST", "USED"));
    for (name, sum) in lines {
        let numbers = [sum.cached, sum.size, sum.disk].map(size);
        let row = row(&numbers[0], &numbers[1], &numbers[2], sum.trust(), &sum.used(now));
        text.push_str(&format!("{name}\n{row}\n"));
    }
    text
}

/// How long ago, roughly.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => "just now".to_owned(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// Bytes of disk of blobs by what may become of them.
struct Space {
    in_use: u64,
    pinned: u64,
    evictable: u64,
}

fn space_of(reply: &CacheReply) -> Space {
    let bytes = |wanted: &dyn Fn(&CachedBlob) -> bool| {
        reply.blobs.iter().filter(|blob| wanted(blob)).map(|blob| blob.disk).sum()
    };
    Space {
        in_use: bytes(&|blob| blob.in_use),
        pinned: bytes(&|blob| blob.pinned),
        evictable: bytes(&|blob| !blob.in_use && !blob.pinned),
    }
}

fn space_json(reply: &CacheReply) -> Value {
    let Space { in_use, pinned, evictable } = space_of(reply);
    json!({
        "root": reply.root, "used": reply.used, "limit": reply.limit, "free": reply.free,
        "min_free": reply.min_free, "blobs": reply.blobs.len(), "in_use": in_use,
        "pinned": pinned, "evictable": evictable,
    })
}

fn space(reply: &CacheReply) -> String {
    let Space { in_use, pinned, evictable } = space_of(reply);
    let limit = reply.limit.map_or_else(|| "none".to_owned(), size);
    let lines = [
        ("used", size(reply.used), blobs(reply.blobs.len() as u64)),
        ("  in use", size(in_use), "mounted or being fetched".to_owned()),
        ("  pinned", size(pinned), "kept whatever happens".to_owned()),
        ("  evictable", size(evictable), "what `weightfs cache prune` would free".to_owned()),
        ("limit", limit, "cache.limit".to_owned()),
        (
            "free",
            size(reply.free),
            format!("of the file system; {} stay free", size(reply.min_free)),
        ),
    ];
    let line =
        |(name, bytes, what): (&str, String, String)| format!("{name:<12} {bytes:>10}  {what}\n");
    format!("{}\n{}", reply.root, lines.map(line).concat())
}

#[cfg(test)]
mod tests {
    use weightfs_proto::control::CachedReference;

    use super::*;

    const NOW: u64 = 1_000_000;

    fn blob(digest: &str, trust: &str, references: &[&str]) -> CachedBlob {
        CachedBlob {
            digest: digest.into(),
            size: 3 << 40,
            cached: 1023 << 30,
            disk: 1023 << 30,
            trust: trust.into(),
            last_used: Some(NOW - 7200),
            references: references.iter().map(|&name| name.to_owned()).collect(),
            ..CachedBlob::default()
        }
    }

    fn reply() -> CacheReply {
        let pinned = |reference: &str, pinned| CachedReference {
            reference: reference.into(),
            manifest_digest: String::new(),
            pinned,
        };
        let used = CachedBlob { in_use: true, ..blob("sha256:a", "verified", &["r/a:1", "r/b:1"]) };
        CacheReply {
            root: "/var/lib/weightfs".into(),
            limit: None,
            min_free: 0,
            free: 5 << 30,
            used: 3069 << 30,
            blobs: vec![
                used,
                CachedBlob { pinned: true, ..blob("sha256:b", "poisoned", &["r/b:1"]) },
                blob("sha256:c", "transport", &[]),
            ],
            references: vec![pinned("r/a:1", false), pinned("r/b:1", true)],
        }
    }

    #[test]
    fn a_table_has_each_reference_and_what_none_has() {
        let text = table(&reply(), NOW);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 7, "{text}");
        assert!(lines[2].ends_with("verified  in use"), "{text}");
        assert!(lines[4].ends_with("poisoned  in use, pinned"), "{text}");
        assert_eq!(lines[5], "sha256:c");
        assert!(lines[6].ends_with("transport 2 h ago"), "{text}");
        let empty = CacheReply { blobs: vec![], references: vec![], ..reply() };
        assert_eq!(table(&empty, NOW), "the cache is empty\n");
    }

    #[test]
    fn space_is_told_by_what_may_become_of_it() {
        let text = space(&reply());
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let json = space_json(&reply());
        assert_eq!(json["evictable"], json["in_use"]);
        assert_eq!(json["limit"], Value::Null);
    }

    #[test]
    fn ages_are_rough() {
        let ages = [0, 59, 60, 3599, 3600, 86_399, 86_400, 1_000_000].map(age);
        let expected = [
            "just now",
            "just now",
            "1 min ago",
            "59 min ago",
            "1 h ago",
            "23 h ago",
            "1 d ago",
            "11 d ago",
        ];
        assert_eq!(ages, expected);
    }
}
