//! A registry that is gone for a while, or for good, and one that sends what it was not asked for.
//! What a reader sees of it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Bed, Fault, Target, wait_until};

const MIB: u64 = 1 << 20;
const FILE: &str = "model.safetensors";
const MODEL: &[Part] = &[Part { path: FILE, bytes: 40 << 20, mode: 0o644 }];

/// Reads one page.
fn read_at(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    File::open(path)?.read_exact_at(&mut bytes, offset).map(|()| bytes)
}

fn is_io_error<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(Errno::EIO as i32))
}

/// Readers of a model whose registry is away for so long, which is less than the deadline: they
/// wait, and read what is right.
fn assert_unnoticed(seconds: u64, gone: impl Fn(&Bed), back: impl Fn(&Bed)) {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\ndeadline = \"30s\"");
    let source = bed.model(MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/gone"));
    let (path, expected) = (mounted.dir().join(FILE), fs::read(source.join(FILE)).unwrap());
    read_at(&path, 0).unwrap();
    gone(&bed);
    std::thread::scope(|scope| {
        let all = scope.spawn(|| fs::read(&path));
        let far = scope.spawn(|| read_at(&path, 39 * MIB));
        // The outage itself: nothing tells its end but the time.
        std::thread::sleep(Duration::from_secs(seconds));
        assert!(!far.is_finished(), "bytes from nowhere, or an error before the deadline");
        back(&bed);
        let at = usize::try_from(39 * MIB).unwrap();
        assert!(far.join().unwrap().unwrap() == expected[at..at + 4096]);
        assert!(all.join().unwrap().unwrap() == expected);
    });
    mounted.stop();
}

fn assert_refusal_is_unnoticed(seconds: u64) {
    assert_unnoticed(seconds, |bed| bed.proxy.refuse(), |bed| bed.proxy.accept());
}

#[test]
fn a_registry_that_refuses_for_2_seconds_is_waited_for() {
    assert_refusal_is_unnoticed(2);
}

#[test]
fn a_registry_that_refuses_for_6_seconds_is_waited_for() {
    assert_refusal_is_unnoticed(6);
}

#[test]
fn a_registry_that_refuses_for_12_seconds_is_waited_for() {
    assert_refusal_is_unnoticed(12);
}

#[test]
fn a_registry_that_is_silent_for_6_seconds_is_waited_for() {
    assert_unnoticed(6, |bed| bed.proxy.fail(Target::All, Fault::Hang), |bed| bed.proxy.heal());
}

#[test]
fn a_registry_that_is_gone_for_good_fails_what_is_not_here_and_nothing_else() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\ndeadline = \"2s\"\nread_ahead_min = \"1MiB\"");
    let source = bed.model(MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/lost"));
    let path = mounted.dir().join(FILE);
    let expected = read_at(&source.join(FILE), 0).unwrap();
    assert!(read_at(&path, 0).unwrap() == expected);
    bed.proxy.refuse();
    let places = [10, 20, 30].map(|mib| mib * MIB);
    std::thread::scope(|scope| {
        let failing = places.map(|place| {
            scope.spawn({
                let path = &path;
                move || read_at(path, place)
            })
        });
        while failing.iter().any(|reader| !reader.is_finished()) {
            assert!(read_at(&path, 0).unwrap() == expected, "what is here needs no registry");
        }
        for reader in failing {
            assert!(is_io_error(reader.join().unwrap()), "bytes from nowhere");
        }
    });
    assert!(fs::metadata(&path).is_ok() && fs::read_dir(mounted.dir()).is_ok());
    bed.proxy.accept();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn a_trickle_is_no_progress() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\ndeadline = \"3s\"");
    let source = bed.model(MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/trickle"));
    let path = mounted.dir().join(FILE);
    bed.proxy.fail(Target::Blobs, Fault::Trickle);
    for place in [0, 20 * MIB] {
        assert!(is_io_error(read_at(&path, place)), "a byte a second is not a page in 3 seconds");
    }
    bed.proxy.heal();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn a_registry_that_asks_for_a_second_gets_it() {
    for status in [429, 503] {
        let bed = Bed::new();
        let source = bed.model(MODEL);
        let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/busy"));
        let path = mounted.dir().join(FILE);
        bed.proxy.forget();
        bed.proxy.fail(Target::Blobs, Fault::Busy { status, retry_after: 1 });
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| read_at(&path, 0));
            wait_until("it was asked", || bed.proxy.requests(Target::Blobs) > 0);
            bed.proxy.heal();
            reader.join().unwrap().unwrap();
        });
        tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
    }
}

#[test]
fn another_range_than_the_one_asked_for_is_an_error_that_says_so() {
    let bed = Bed::new();
    let source = bed.model(MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/elsewhere"));
    bed.proxy.fail(Target::Blobs, Fault::Elsewhere { by: 4096 });
    assert!(is_io_error(read_at(&mounted.dir().join(FILE), 0)));
    assert!(mounted.log().contains("asked for bytes"), "{}", mounted.log());
    bed.proxy.heal();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn the_bytes_of_another_blob_poison_the_one_asked_for() {
    let bed = Bed::new();
    let source = bed.model(&[
        Part { path: "a.safetensors", bytes: 9 << 20, mode: 0o644 },
        Part { path: "b.safetensors", bytes: 9 << 20, mode: 0o600 },
    ]);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let mounted = bed.mount(&bed.push(&artifact, "models/other"));
    let [first, second] = [0, 1].map(|layer| artifact.layer_digest(layer));
    assert_ne!(first, second);
    bed.proxy.fail(Target::Blob(first), Fault::Other(second));
    let path = mounted.dir().join("a.safetensors");
    let _ = fs::read(&path);
    wait_until("reads of the wrong blob fail", || is_io_error(fs::read(&path)));
    assert!(mounted.log().contains(&first.to_string()), "{}", mounted.log());
    let other = fs::read(mounted.dir().join("b.safetensors")).unwrap();
    assert!(
        other == fs::read(source.join("b.safetensors")).unwrap(),
        "the other is none the worse"
    );
    mounted.stop();
}
