//! Values that have a form of their own.

use std::net::{Ipv4Addr, SocketAddr};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use weightfs_store::Amount;

/// Where to listen: a port, which means this machine alone, or an address with a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ListenAddress(pub SocketAddr);

impl TryFrom<String> for ListenAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let loopback = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let address = text.parse().map(loopback).or_else(|_| text.parse());
        address.map(Self).map_err(|_| {
            format!("{text:?} is neither a port (\"9478\") nor an address (\"0.0.0.0:9478\")")
        })
    }
}

impl From<ListenAddress> for String {
    fn from(ListenAddress(address): ListenAddress) -> Self {
        address.to_string()
    }
}

/// Disk space: bytes ("10GiB"), or a percentage of the file system ("10%").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Space {
    /// So many bytes.
    Bytes(ByteSize),
    /// So many hundredths.
    Percent(u8),
}

impl TryFrom<String> for Space {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let Some(percent) = text.strip_suffix('%') else {
            return Ok(Self::Bytes(text.parse()?));
        };
        let percent = percent.trim().parse().ok().filter(|percent| *percent <= 100);
        percent.map(Self::Percent).ok_or_else(|| format!("{text} is no percentage"))
    }
}

/// A size that reads as the same: "8.0 MiB", or in bytes where that would round it.
fn size_text(size: ByteSize) -> String {
    let short = size.to_string();
    if short.parse() == Ok(size) { short } else { format!("{}B", size.as_u64()) }
}

/// Writes a size as [`size_text`].
pub(super) fn exactly<S: serde::Serializer>(
    size: &ByteSize,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&size_text(*size))
}

impl From<Space> for String {
    fn from(space: Space) -> Self {
        match space {
            Space::Bytes(bytes) => size_text(bytes),
            Space::Percent(percent) => format!("{percent}%"),
        }
    }
}

impl From<Space> for Amount {
    fn from(space: Space) -> Self {
        match space {
            Space::Bytes(bytes) => Self::Bytes(bytes.as_u64()),
            Space::Percent(percent) => Self::Percent(percent),
        }
    }
}
