//! One 512-byte tar header: its checksum, its numbers and its names.
//!
//! The `tar` crate knows the layouts; numbers are read here, because it refuses the empty fields
//! that GNU tar and Go accept, and takes no notice of a base-256 number that does not fit.

use tar::Header;

use crate::tree::DeviceNumber;

/// Bytes of a tar block (POSIX pax, "ustar Interchange Format").
pub const BLOCK_BYTES: usize = 512;

/// What one header says, before extended headers are applied.
#[derive(Debug)]
pub struct Basic {
    pub typeflag: u8,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub size: u64,
    pub mode: u64,
    pub uid: u64,
    pub gid: u64,
    pub mtime: i64,
    pub device: DeviceNumber,
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderError {
    Checksum,
    Number(&'static str),
}

/// Reads a header block.
pub fn read(block: &[u8; BLOCK_BYTES]) -> Result<Basic, HeaderError> {
    let header = Header::from_byte_slice(block);
    let old = header.as_old();
    let stored = number(&old.cksum).ok_or(HeaderError::Checksum)?;
    if !checksums(block).contains(&stored) {
        return Err(HeaderError::Checksum);
    }
    let natural = |field: &[u8], name| {
        number(field).and_then(|value| u64::try_from(value).ok()).ok_or(HeaderError::Number(name))
    };
    Ok(Basic {
        // Not `entry_type`, which makes '0' of the old tars' NUL.
        typeflag: old.linkflag[0],
        path: header.path_bytes().into_owned(),
        link: header.link_name_bytes().unwrap_or_default().into_owned(),
        size: natural(&old.size, "size")?,
        mode: natural(&old.mode, "mode")?,
        uid: natural(&old.uid, "uid")?,
        gid: natural(&old.gid, "gid")?,
        mtime: number(&old.mtime).ok_or(HeaderError::Number("mtime"))?,
        device: device(header).ok_or(HeaderError::Number("device number"))?,
    })
}

fn device(header: &Header) -> Option<DeviceNumber> {
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (None, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        (None, None) => return Some(DeviceNumber::default()),
    };
    let part = |field: &[u8]| number(field).and_then(|value| u32::try_from(value).ok());
    Some(DeviceNumber { major: part(major)?, minor: part(minor)? })
}

/// The sum of all bytes with the checksum field as blanks: unsigned, and signed as some old
/// writers had it.
fn checksums(block: &[u8; BLOCK_BYTES]) -> [i64; 2] {
    let mut sums = [0, 0];
    for (index, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&index) { b' ' } else { *byte };
        sums[0] += i64::from(byte);
        sums[1] += i64::from(byte.cast_signed());
    }
    sums
}

/// A number field: octal text with blanks or NULs around it (empty is 0), or GNU's base-256.
fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => {
            let blank = |byte: &u8| matches!(byte, b' ' | 0);
            let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
            let digits = field.get(start..)?;
            let end = digits.iter().position(|byte| *byte == 0).unwrap_or(digits.len());
            let text = std::str::from_utf8(digits.get(..end)?).ok()?.trim_end_matches(' ');
            if text.is_empty() { Some(0) } else { i64::from_str_radix(text, 8).ok() }
        }
    }
}

/// Two's complement, big-endian; the first bit marks the format, the second is the sign.
fn base_256(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    let negative = first & 0x40 != 0;
    let start = i64::from(first & 0x3f) - if negative { 0x40 } else { 0 };
    rest.iter().try_fold(start, |value, byte| value.checked_mul(256)?.checked_add(i64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"64 4"), None);
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\0\x01\x02"), Some(258));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(number(b"\x80\0\0\x01\0\0\0\0\0\0\0\0"), None, "more than 63 bits");
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let mut header = Header::new_ustar();
        header.set_path("a").unwrap();
        header.set_size(5);
        header.set_cksum();
        let mut block = *header.as_bytes();
        assert_eq!(read(&block).unwrap().size, 5);
        block[0] ^= 1;
        assert_eq!(read(&block).unwrap_err(), HeaderError::Checksum);
    }
}
