//! Names that artifacts bring, cleaned: no name leads out of the root, holds a NUL or is longer
//! than Linux allows. Cleaning is lexical; symbolic links are the tree's business.

/// Bytes of a path at the most (Linux `PATH_MAX`).
pub const MAX_PATH_BYTES: usize = 4096;
/// Bytes of one component at the most (Linux `NAME_MAX`).
pub const MAX_COMPONENT_BYTES: usize = 255;

/// Why a name can't be a path in a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `..` leads above the root.
    #[error("it leads out of the root")]
    Escapes,
    /// It has a NUL byte.
    #[error("it has a NUL byte")]
    Nul,
    /// It is longer than [`MAX_PATH_BYTES`].
    #[error("it is longer than {MAX_PATH_BYTES} bytes")]
    TooLong,
    /// A component is longer than [`MAX_COMPONENT_BYTES`].
    #[error("a part of it is longer than {MAX_COMPONENT_BYTES} bytes")]
    ComponentTooLong,
}

/// The components of a name from an image: absolute names are relative to the root, `.`, `..` and
/// repeated slashes are resolved as by Go's `filepath.Clean`. Empty for the root itself.
///
/// # Errors
/// When `..` leads above the root, or a bound is exceeded.
pub fn clean(name: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if name.contains(&0) {
        return Err(PathError::Nul);
    }
    if name.len() > MAX_PATH_BYTES {
        return Err(PathError::TooLong);
    }
    let mut components = Vec::new();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or(PathError::Escapes)?;
            }
            _ if component.len() > MAX_COMPONENT_BYTES => return Err(PathError::ComponentTooLong),
            _ => components.push(component),
        }
    }
    Ok(components)
}

/// The components of a name from a model artifact: like [`clean`], but leading `..` are dropped,
/// because modctl writes them for files that were given by an absolute path.
///
/// # Errors
/// As [`clean`].
pub fn clean_model(name: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    let mut rest = name;
    loop {
        let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        let (first, tail) = rest.split_at(end);
        match (first, tail.split_first()) {
            (b"" | b"." | b"..", Some((_, tail))) => rest = tail,
            (b"..", None) => return Err(PathError::Escapes),
            _ => return clean(rest),
        }
    }
}

/// A foreign name for people: what can't be printed is escaped, and it is cut.
pub fn shown(name: &[u8]) -> String {
    const SHOWN_CHARS: usize = 200;
    let text = String::from_utf8_lossy(name);
    let mut shown: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(components: Result<Vec<&[u8]>, PathError>) -> Result<String, PathError> {
        components.map(|parts| String::from_utf8(parts.join(&b'/')).unwrap())
    }

    #[test]
    fn names_are_resolved_inside_the_root() {
        for (name, path) in [
            ("a/b", "a/b"),
            ("./a//b/", "a/b"),
            ("/etc/passwd", "etc/passwd"),
            ("a/./x/../b", "a/b"),
            (".", ""),
            ("./", ""),
            ("..a/...", "..a/..."),
        ] {
            assert_eq!(joined(clean(name.as_bytes())).unwrap(), path, "{name}");
        }
    }

    #[test]
    fn names_that_escape_or_are_too_long_are_refused() {
        assert_eq!(clean(b".."), Err(PathError::Escapes));
        assert_eq!(clean(b"/../x"), Err(PathError::Escapes));
        assert_eq!(clean(b"a/../../x"), Err(PathError::Escapes));
        assert_eq!(clean(b"a\0b"), Err(PathError::Nul));
        assert_eq!(clean(&[b'a'; 256]), Err(PathError::ComponentTooLong));
        assert!(clean(&[b'a'; 255]).is_ok());
        assert_eq!(clean(&b"a/".repeat(2049)), Err(PathError::TooLong));
    }

    #[test]
    fn models_may_have_leading_dots() {
        for (name, path) in
            [("../../model/a", "model/a"), ("/a", "a"), ("./../a/b", "a/b"), ("a/../b", "b")]
        {
            assert_eq!(joined(clean_model(name.as_bytes())).unwrap(), path, "{name}");
        }
        assert_eq!(clean_model(b"../a/../../b"), Err(PathError::Escapes));
        assert_eq!(clean_model(b".."), Err(PathError::Escapes));
        assert_eq!(clean_model(b"../a\0"), Err(PathError::Nul));
    }

    #[test]
    fn names_are_shown_without_control_characters() {
        assert_eq!(shown(b"a\x1b[2J\xff"), "a\\u{1b}[2J\u{fffd}");
        assert_eq!(shown("ü".repeat(300).as_bytes()).chars().count(), 201);
    }

    #[test]
    fn fuzz_names_are_refused_or_stay_inside() {
        let samples: [&[u8]; 3] = [b"../a/./b//c", b"/a/../b", b"a/.../.b"];
        bolero::check!().for_each(|input: &[u8]| {
            let name = weightfs_fuzz::foreign(&samples, input);
            for components in [clean(&name), clean_model(&name)].into_iter().flatten() {
                for part in components {
                    assert!(!matches!(part, b"" | b"." | b".."), "{}", shown(&name));
                    assert!(!part.contains(&b'/') && !part.contains(&0));
                    assert!(part.len() <= MAX_COMPONENT_BYTES);
                }
            }
        });
    }
}
