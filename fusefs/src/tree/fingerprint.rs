//! What the node numbers of a tree mean, in 64 bits.

use std::os::unix::ffi::OsStrExt as _;

use sha2::{Digest as _, Sha256};

use super::{Node, NodeKind, Tree};

impl Tree {
    /// Changes when a node number comes to mean another file. The kernel remembers numbers for as
    /// long as a mount lasts, which outlives this program and its version: a successor that
    /// numbers the same layers otherwise must not answer for them.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Sha256::new();
        for layer in &self.layers {
            hash.update(layer.to_string());
        }
        for (node, origin) in self.nodes.iter().zip(&self.origins) {
            hash.update(origin.map_or(u64::MAX, |layer| layer as u64).to_le_bytes());
            add_node(&mut hash, node);
        }
        let bytes: [u8; 32] = hash.finalize().into();
        bytes.first_chunk().copied().map_or(0, u64::from_le_bytes)
    }
}

fn add_node(hash: &mut Sha256, node: &Node) {
    hash.update(node.parent.0.to_le_bytes());
    match &node.kind {
        NodeKind::Directory(children) => {
            hash.update(b"d");
            for (name, id) in &children.0 {
                add_text(hash, name.as_bytes());
                hash.update(id.0.to_le_bytes());
            }
        }
        NodeKind::File(content) => {
            hash.update(b"f");
            hash.update(content.range.start.to_le_bytes());
            hash.update(content.range.end.to_le_bytes());
        }
        NodeKind::Symlink(target) => {
            hash.update(b"l");
            add_text(hash, target.as_bytes());
        }
        NodeKind::CharDevice(_) => hash.update(b"c"),
        NodeKind::BlockDevice(_) => hash.update(b"b"),
        NodeKind::Fifo => hash.update(b"p"),
    }
}

fn add_text(hash: &mut Sha256, text: &[u8]) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}
