//! Foreign bytes for fuzz targets: what a fuzzer gives, made into something that a parser does
//! not refuse at its first byte.
//!
//! Each crate has its targets beside its parsers, in its tests' module `fuzz`. A few thousand
//! inputs of each run with the tests; `make fuzz` runs them for hours, led by coverage.

/// Edits of a sample at the most: with more nothing of it is left.
const MAX_EDITS: usize = 16;

/// Bytes of the input that say one edit: where (two), what, and with which value.
const EDIT_BYTES: usize = 4;

/// Bytes for a parser. The first byte of `input` chooses a sample, which is edited as the rest
/// says, or none of them, and then the rest is taken as it is. So every input is possible, and
/// those that are nearly right are likely.
pub fn foreign(samples: &[&[u8]], input: &[u8]) -> Vec<u8> {
    let Some((choice, rest)) = input.split_first() else { return vec![] };
    let Some(sample) = samples.get(usize::from(*choice) % (samples.len() + 1)) else {
        return rest.to_vec();
    };
    let Some((count, edits)) = rest.split_first() else { return sample.to_vec() };
    let edits = edits.as_chunks::<EDIT_BYTES>().0;
    let mut bytes = sample.to_vec();
    for edit in edits.iter().take(usize::from(*count) % MAX_EDITS) {
        apply(&mut bytes, *edit);
    }
    bytes
}

/// What numbers and texts of a format are replaced by.
const ODD: [&[u8]; 8] = [
    b"0",
    b"-1",
    b"18446744073709551615",
    b"9223372036854775808",
    b"null",
    b"../",
    b"\0",
    b"\xff\xfe",
];

fn apply(bytes: &mut Vec<u8>, [high, low, what, value]: [u8; EDIT_BYTES]) {
    let at = usize::from(u16::from_be_bytes([high, low])) % (bytes.len() + 1);
    let end = (at + usize::from(value)).min(bytes.len());
    match what % 7 {
        0 => bytes.splice(at..(at + 1).min(bytes.len()), [value]).for_each(drop),
        1 => bytes.insert(at, value),
        2 => bytes.drain(at..end).for_each(drop),
        3 => bytes.truncate(at),
        4 => bytes.extend_from_within(at..end),
        5 => bytes.splice(at..at, bytes[at..end].to_vec()).for_each(drop),
        _ => {
            let odd = ODD[usize::from(value) % ODD.len()];
            let end = (at + odd.len()).min(bytes.len());
            bytes.splice(at..end, odd.iter().copied()).for_each(drop);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_chooses_a_sample_or_the_input_itself() {
        let samples: [&[u8]; 2] = [b"one", b"two"];
        assert_eq!(foreign(&samples, &[0]), b"one");
        assert_eq!(foreign(&samples, &[1, 0]), b"two");
        assert_eq!(foreign(&samples, &[2, 7, 8]), [7, 8]);
        assert_eq!(foreign(&samples, &[]), b"");
        assert_eq!(foreign(&[], &[9, 1]), [1]);
    }

    #[test]
    fn edits_set_insert_remove_cut_and_repeat() {
        let edited = |edit: [u8; EDIT_BYTES]| foreign(&[b"abcd"], &[&[0, 1], &edit[..]].concat());
        assert_eq!(edited([0, 1, 0, b'x']), b"axcd");
        assert_eq!(edited([0, 4, 1, b'x']), b"abcdx");
        assert_eq!(edited([0, 1, 2, 2]), b"ad");
        assert_eq!(edited([0, 3, 3, 0]), b"abc");
        assert_eq!(edited([0, 2, 4, 9]), b"abcdcd");
        assert_eq!(edited([0, 0, 5, 2]), b"ababcd");
        assert_eq!(edited([0, 1, 6, 0]), b"a0cd");
        assert_eq!(edited([1, 0, 6, 7]), b"a\xff\xfed", "the place wraps around: 256 % 5");
    }
}
