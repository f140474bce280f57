//! Extended headers (POSIX pax, "pax Extended Header"): records `<length> <key>=<value>\n`.
//!
//! The `tar` crate splits them at newlines and so can't read binary values (file capabilities),
//! which is why they are read here.

use crate::tree::Timestamp;

/// What the extended header says of the member that follows. A key without a value means what
/// the plain header says, as Go's archive/tar has it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<Timestamp>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: bool,
}

/// A record that breaks the format, by what is wrong with it.
pub type Malformed = &'static str;

/// Reads all records.
pub fn read(mut data: &[u8]) -> Result<Pax, Malformed> {
    let mut pax = Pax::default();
    while let Some((key, value, rest)) = record(data)? {
        pax.set(key, value)?;
        data = rest;
    }
    pax.xattrs.sort_by(|one, other| one.0.cmp(&other.0));
    pax.xattrs.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            // The sort is stable, so this one came later in the header, and it counts.
            std::mem::swap(later, kept);
        }
        same
    });
    Ok(pax)
}

type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// The first record's key and value, and what follows it; `None` at the end.
fn record(data: &[u8]) -> Result<Option<Record<'_>>, Malformed> {
    // Some writers fill the block with NULs and count them in.
    if data.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let blank = data.iter().position(|byte| *byte == b' ').ok_or("a record without a length")?;
    let (digits, _) = data.split_at(blank);
    let length = decimal(digits).ok_or("a record with a bad length")?;
    let length = usize::try_from(length).map_err(|_| "a record with a bad length")?;
    let (record, rest) = data.split_at_checked(length).ok_or("a record longer than its header")?;
    let body = record.get(blank + 1..).ok_or("a record with a bad length")?;
    let (newline, body) = body.split_last().ok_or("an empty record")?;
    let equals = body.iter().position(|byte| *byte == b'=').ok_or("a record without `=`")?;
    let (key, value) = body.split_at(equals);
    match (*newline, value.split_first()) {
        (b'\n', Some((_, value))) if !key.is_empty() => Ok(Some((key, value, rest))),
        _ => Err("a record that doesn't end with a newline or has no key"),
    }
}

impl Pax {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Malformed> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if key.starts_with(b"GNU.sparse.") {
            self.sparse = true;
            return Ok(());
        }
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = number(value)?,
            b"uid" => self.uid = number(value)?,
            b"gid" => self.gid = number(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or("a bad mtime")?),
            _ => {}
        }
        Ok(())
    }
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    if value.contains(&0) {
        return Err("a path with a NUL byte");
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8]) -> Result<Option<u64>, Malformed> {
    match value {
        b"" => Ok(None),
        _ => decimal(value).map(Some).ok_or("a bad number"),
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `[-]seconds[.fraction]`; digits after the ninth are dropped.
fn time(value: &[u8]) -> Option<Timestamp> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let point = value.iter().position(|byte| *byte == b'.').unwrap_or(value.len());
    let (whole, fraction) = value.split_at(point);
    let fraction = fraction.strip_prefix(b".").unwrap_or(fraction);
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0u32, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanos) {
        (false, _) => Timestamp { seconds, nanos },
        (true, 0) => Timestamp { seconds: -seconds, nanos },
        (true, _) => Timestamp { seconds: -seconds - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_by_length() {
        let data = b"12 path=a/b\n27 SCHILY.xattr.user.x=\n\n\n\n18 mtime=12.000005\n";
        assert!(read(data).is_err(), "lengths that don't match are refused");
        let data =
            b"12 path=a/b\n27 SCHILY.xattr.user.x=\n\n=\n19 mtime=12.000005\n12 uid=1000\n\0\0";
        let pax = read(data).unwrap();
        assert_eq!(pax.path.unwrap(), b"a/b");
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"\n\n=".to_vec())]);
        assert_eq!(pax.mtime, Some(Timestamp { seconds: 12, nanos: 5000 }));
        assert_eq!((pax.uid, pax.gid, pax.size), (Some(1000), None, None));
    }

    #[test]
    fn malformed_records_are_refused() {
        for data in [
            "x path=a\n",
            "9 path=a\n\n",
            "999 path=a\n",
            "18446744073709551616 path=a\n",
            "3 =\n",
            "7 =abc\n",
            "10 path=a_",
            "1 path=a\n",
            "12 path=a\0b\n",
            "11 size=-1\n",
            "13 mtime=1.x\n",
            "nothing",
        ] {
            assert!(read(data.as_bytes()).is_err(), "{data:?}");
        }
    }

    #[test]
    fn of_two_records_with_one_key_the_later_counts() {
        let pax = read(b"24 SCHILY.xattr.user.a=z\n24 SCHILY.xattr.user.a=b\n9 path=a\n9 path=b\n");
        assert!(pax.is_err(), "24 is one short");
        let data = b"25 SCHILY.xattr.user.a=z\n25 SCHILY.xattr.user.a=b\n10 path=a\n10 path=b\n";
        let pax = read(data).unwrap();
        assert_eq!(pax.path.unwrap(), b"b");
        assert_eq!(pax.xattrs, [(b"user.a".to_vec(), b"b".to_vec())]);
    }

    #[test]
    fn times_before_the_epoch_have_positive_nanoseconds() {
        assert_eq!(time(b"-1.5"), Some(Timestamp { seconds: -2, nanos: 500_000_000 }));
        assert_eq!(time(b"-1"), Some(Timestamp { seconds: -1, nanos: 0 }));
        assert_eq!(time(b"1.1234567899"), Some(Timestamp { seconds: 1, nanos: 123_456_789 }));
        assert_eq!(time(b"1."), Some(Timestamp { seconds: 1, nanos: 0 }));
        assert_eq!(time(b".5"), None);
    }
}
