//! A process that is killed at any moment, again and again on one directory.
//!
//! `WEIGHTFS_KILL_ROUNDS` sets how often.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use weightfs_store::{Amount, Blob, Layout, Read, Store};

use super::source::TestSource;
use super::{MIB, id, noise, options, read};

const ROUNDS: u64 = 12;

/// The directory that the victim works in.
const DIRECTORY: &str = "WEIGHTFS_VICTIM_DIRECTORY";

fn truths() -> [Vec<u8>; 2] {
    [noise(40 * MIB + 1, 101), noise(24 * MIB, 103)]
}

fn layout(data: &[u8]) -> Layout {
    Layout::new(data.len() as u64, [5 * MIB + 3, 20 * MIB]).unwrap()
}

async fn read_for_ever(blob: Arc<Blob>, data: Arc<Vec<u8>>, mut at: u64) {
    loop {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = (at >> 20) % data.len() as u64;
        let segment = blob.layout().segment_at(start).unwrap();
        let end = blob.layout().segment(segment).unwrap().end.min(start + MIB);
        let slice = read(&blob, start..end).await.unwrap();
        assert!(*slice == data[start as usize..end as usize]);
    }
}

/// Reads and evicts until it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the test below, which kills it"]
async fn victim() {
    let Some(root) = std::env::var_os(DIRECTORY) else { return };
    let mut options = options();
    options.checkpoint_interval = Duration::from_millis(10);
    options.cache.limit = Some(Amount::Bytes(44 * MIB));
    let store = Store::open(Path::new(&root), options).unwrap();
    store.start_evicting();
    let mut readers = vec![];
    for data in truths() {
        let blob = store.blob(id(&data), &layout(&data)).unwrap();
        blob.add_source(TestSource::new("test", data.clone()));
        let data = Arc::new(data);
        for seed in 0..2 {
            let seed = seed + u64::from(std::process::id());
            readers.push(tokio::spawn(read_for_ever(Arc::clone(&blob), Arc::clone(&data), seed)));
        }
    }
    // To the one who kills.
    println!("\nready");
    loop {
        for data in truths() {
            store.evict(id(&data)).unwrap();
            tokio::task::yield_now().await;
        }
        assert!(readers.iter().all(|reader| !reader.is_finished()), "a reader failed");
    }
}

/// A process that works in `root`, once it does.
fn start_victim(root: &Path) -> Child {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::victim", "--ignored", "--nocapture"])
        .env(DIRECTORY, root)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let ready = lines.any(|line| line.unwrap() == "ready");
    assert!(ready, "the victim ended by itself: {:?}", victim.wait());
    victim
}

#[tokio::test]
async fn whenever_it_is_killed_what_is_believed_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let rounds = std::env::var("WEIGHTFS_KILL_ROUNDS").ok().and_then(|text| text.parse().ok());
    let mut believed = 0;
    for round in 0..rounds.unwrap_or(ROUNDS) {
        let mut victim = start_victim(dir.path());
        // Any moment will do; these are spread.
        std::thread::sleep(Duration::from_millis(7 + round * 37 % 200));
        victim.kill().unwrap();
        victim.wait().unwrap();
        let store = Store::open(dir.path(), options()).unwrap();
        for data in truths() {
            let blob = store.blob(id(&data), &layout(&data)).unwrap();
            for segment in 0..3 {
                let covers = blob.layout().segment(segment).unwrap();
                for start in covers.clone().step_by(MIB as usize) {
                    let range = start..covers.end.min(start + MIB);
                    if let Read::Ready(slice) = blob.read(range.clone()).unwrap() {
                        let right = &data[range.start as usize..range.end as usize];
                        assert!(*slice == *right, "round {round}, {range:?}");
                        believed += slice.len();
                    }
                }
            }
        }
    }
    assert!(believed > 0, "something was recorded");
}
