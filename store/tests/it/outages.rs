//! Sources that are away for a while, ask for time, give a trickle, or give other bytes. In
//! virtual time, where time matters: a clock that jumps when nothing else is to be done.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use weightfs_store::{ReadError, Trust};

use super::source::{Fault, status};
use super::{MIB, blob_of, judged, noise, open, read};

const DEADLINE: Duration = Duration::from_secs(30);

/// How long a source can be away without a reader's noticing more than the wait.
const OUTAGES: [u64; 3] = [2, 6, 12];

#[tokio::test(start_paused = true)]
async fn a_read_outlasts_a_source_that_refuses_for_seconds() {
    for seconds in OUTAGES {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let data = noise(8 * MIB, seconds);
        let (blob, source) = blob_of(&store, &data);
        source.go_away();
        let back = tokio::spawn(async move {
            sleep(Duration::from_secs(seconds)).await;
            source.come_back();
        });
        let began = Instant::now();
        assert_eq!(*read(&blob, 0..8 * MIB).await.unwrap(), data[..]);
        // Pauses between tries are 2 s at the most, jitter included 4.
        let waited = began.elapsed();
        let bounds = Duration::from_secs(seconds)..Duration::from_secs(seconds + 5);
        assert!(bounds.contains(&waited), "{waited:?} after an outage of {seconds} s");
        back.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_outlasts_a_source_that_is_silent_for_seconds() {
    for seconds in OUTAGES {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let data = noise(8 * MIB, seconds);
        let (blob, source) = blob_of(&store, &data);
        source.allow(MIB + 5);
        let back = tokio::spawn(async move {
            sleep(Duration::from_secs(seconds)).await;
            source.allow(u64::MAX);
        });
        assert_eq!(*read(&blob, 0..8 * MIB).await.unwrap(), data[..]);
        back.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn with_a_source_that_is_gone_each_read_fails_at_its_own_deadline_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(64 * MIB, 1);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    source.go_away();
    let reader = |at: u64| {
        let blob = blob.clone();
        async move {
            sleep(Duration::from_secs(at)).await;
            let (began, range) = (Instant::now(), at * 7 * MIB..at * 7 * MIB + 10);
            let result = read(&blob, range).await.map(drop);
            (began.elapsed(), result)
        }
    };
    let readers: Vec<_> = [1, 2, 5, 8].map(|at| tokio::spawn(reader(at))).into();
    for reader in readers {
        let (waited, result) = reader.await.unwrap();
        assert!(matches!(result, Err(ReadError::Deadline { .. })), "{result:?}");
        assert!(waited <= DEADLINE + Duration::from_millis(1), "{waited:?}");
        assert_eq!(*read(&blob, 0..MIB).await.unwrap(), data[..1 << 20], "what is here is read");
    }
    source.come_back();
    assert_eq!(*read(&blob, 0..64 * MIB).await.unwrap(), data[..], "and all of it again");
    assert_eq!(judged(&blob).await, Trust::Verified);
}

#[tokio::test(start_paused = true)]
async fn an_endless_trickle_ends_each_read_at_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 2);
    let (blob, source) = blob_of(&store, &data);
    for at in 0..3 {
        source.fail([const { Fault::Trickle }; 8]);
        let began = Instant::now();
        let result = read(&blob, at * MIB..at * MIB + 1).await;
        assert!(matches!(result, Err(ReadError::Deadline { .. })), "{result:?}");
        assert!(began.elapsed() <= DEADLINE + Duration::from_millis(1), "{:?}", began.elapsed());
    }
    // What trickles still has ended by then; the source is asked anew.
    sleep(2 * DEADLINE).await;
    source.clear_faults();
    assert_eq!(*read(&blob, 0..4 * MIB).await.unwrap(), data[..]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_asks_for_time_is_left_alone_for_that_time() {
    for code in [429, 503] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let data = noise(100, 3);
        let (blob, source) = blob_of(&store, &data);
        source.fail([Fault::Refuse(status(code, Some(7)))]);
        let began = Instant::now();
        assert_eq!(*read(&blob, 0..100).await.unwrap(), data[..]);
        assert!(began.elapsed() >= Duration::from_secs(7), "{code}: {:?}", began.elapsed());
        assert_eq!(source.take_requests().len(), 2);
    }
}

#[tokio::test]
async fn other_bytes_than_those_of_the_blob_poison_it() {
    let data = noise(4 * MIB, 4);
    let lies = [
        ("another range", Fault::Elsewhere(MIB)),
        ("another blob", Fault::Other(noise(4 * MIB, 9).into())),
        ("a flipped bit", Fault::Flip(3 * MIB + 77)),
    ];
    for (what, lie) in lies {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let (blob, source) = blob_of(&store, &data);
        source.fail([lie]);
        // Whether this read is served depends on who is first; what is judged is not served.
        let _ = read(&blob, 0..4 * MIB).await;
        assert_eq!(judged(&blob).await, Trust::Poisoned, "{what}");
        let after = read(&blob, 0..1).await;
        assert!(matches!(after, Err(ReadError::Poisoned { .. })), "{what}: {after:?}");
    }
}
