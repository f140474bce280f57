//! Models made up for tests: real safetensors files with pseudo-random tensors, and what lies
//! beside them.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

/// Bytes of one element (BF16).
const ELEMENT_BYTES: u64 = 2;

/// Tensors in a generated file.
const TENSORS: u64 = 128;

/// Length of a generated file's header: room for all tensors' entries, and a multiple of 8.
const HEADER_BYTES: u64 = 16 << 10;

/// A tensor in a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its first byte in the file.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Writes a safetensors file of about `bytes` bytes, the same for the same seed.
///
/// # Errors
/// What the file system says.
pub fn write_safetensors(path: &Path, bytes: u64, seed: u64) -> io::Result<Vec<Tensor>> {
    let size = bytes.saturating_sub(HEADER_BYTES + 8) / TENSORS / ELEMENT_BYTES * ELEMENT_BYTES;
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut tensors = Vec::new();
    for number in 0..TENSORS {
        let name = format!("layers.{number}.weight");
        let start = number * size;
        let entry = json!({
            "dtype": "BF16",
            "shape": [size / ELEMENT_BYTES],
            "data_offsets": [start, start + size],
        });
        header.insert(name.clone(), entry);
        tensors.push(Tensor { name, offset: 8 + HEADER_BYTES + start, size });
    }
    let text = Value::Object(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&HEADER_BYTES.to_le_bytes())?;
    // The format lets a header be padded with spaces.
    write!(file, "{text:<width$}", width = usize::try_from(HEADER_BYTES).unwrap())?;
    write_noise(&mut file, size * TENSORS, seed)?;
    file.flush()?;
    Ok(tensors)
}

/// Reads the header of a safetensors file: its tensors in the file's order.
///
/// # Errors
/// What the reader says, or that it is no safetensors file.
pub fn read_safetensors_header(mut file: impl io::Read) -> io::Result<Vec<Tensor>> {
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text)?;
    let header: Map<String, Value> = serde_json::from_slice(&text)?;
    let bad = || io::Error::other("bad safetensors header");
    let mut tensors = Vec::new();
    for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let start = entry["data_offsets"][0].as_u64().ok_or_else(bad)?;
        let end = entry["data_offsets"][1].as_u64().ok_or_else(bad)?;
        tensors.push(Tensor { name, offset: 8 + length + start, size: end - start });
    }
    tensors.sort_by_key(|tensor| tensor.offset);
    Ok(tensors)
}

/// Writes that many pseudo-random bytes, the same for the same seed.
///
/// # Errors
/// What the writer says.
pub fn write_noise(to: &mut impl Write, bytes: u64, seed: u64) -> io::Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut piece = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let count = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
        random.fill(&mut piece[..count]);
        to.write_all(&piece[..count])?;
        left -= count as u64;
    }
    Ok(())
}

/// That many pseudo-random bytes, the same for the same seed.
pub fn noise(bytes: u64, seed: u64) -> Vec<u8> {
    let mut data = Vec::new();
    write_noise(&mut data, bytes, seed).expect("memory takes all");
    data
}

/// A file of a made-up model.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Path in the model.
    pub path: &'static str,
    /// Size in bytes; a safetensors file if the path says so.
    pub bytes: u64,
    /// Permission bits.
    pub mode: u32,
}

/// The parts of a small model: several levels, an empty file, sizes around a chunk of 1 MiB.
pub const SMALL_MODEL: &[Part] = &[
    Part { path: "config.json", bytes: 517, mode: 0o644 },
    Part { path: "empty.txt", bytes: 0, mode: 0o600 },
    Part { path: "tokenizer.json", bytes: 400_001, mode: 0o640 },
    Part { path: "docs/README.md", bytes: 3_000, mode: 0o444 },
    Part { path: "docs/deep/er/notes.txt", bytes: 1, mode: 0o644 },
    Part { path: "run.sh", bytes: 120, mode: 0o755 },
    Part { path: "weights/model-00001-of-00003.safetensors", bytes: 9 << 20, mode: 0o644 },
    Part { path: "weights/model-00002-of-00003.safetensors", bytes: 1 << 20, mode: 0o644 },
    Part { path: "weights/model-00003-of-00003.safetensors", bytes: 3_500_000, mode: 0o644 },
];

/// Makes the files of a model below `dir`, each with a modification time of its own.
pub fn make(dir: &Path, parts: &[Part]) {
    for (number, part) in (0..).zip(parts) {
        let path = dir.join(part.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if part.path.ends_with(".safetensors") {
            write_safetensors(&path, part.bytes, number).unwrap();
        } else {
            write_noise(&mut File::create(&path).unwrap(), part.bytes, number).unwrap();
        }
        fs::set_permissions(&path, Permissions::from_mode(part.mode)).unwrap();
        set_mtime(&path, mtime(number));
    }
}

/// A modification time with nanoseconds, different for each number.
pub fn mtime(number: u64) -> SystemTime {
    let since = Duration::new(1_700_000_000 + number * 86_401, 123_456_789 + 7 * number as u32);
    SystemTime::UNIX_EPOCH + since
}

/// Sets a file's modification time.
pub fn set_mtime(path: &Path, time: SystemTime) {
    File::open(path).unwrap().set_modified(time).unwrap();
}
