//! The identity of a prefix: a chain of SHA-256 digests, one for each full block of tokens.
//!
//! ```text
//! root   = H("kvmgr prefix v1" | block_size | salt | scope)
//! next   = H(parent | tokens as little-endian i32)
//! ```
//!
//! A digest names the whole prefix up to and including its block, so equal digests mean equal
//! tokens, model scope and salt. The salt is the operator's: tenants with different salts can
//! neither share blocks nor learn of each other's by lookup.

use sha2::{Digest as _, Sha256};

/// The digest of a prefix that ends at a block boundary.
pub type Digest = [u8; 32];

/// The digest of the empty prefix. `scope` tells models, layouts and formats apart; it is hashed
/// with its length, so no two lists of scopes collide.
pub fn root(block_size: usize, salt: u64, scope: &[u8]) -> Digest {
    let mut hash = Sha256::new();
    hash.update(b"kvmgr prefix v1");
    hash.update((block_size as u64).to_le_bytes());
    hash.update(salt.to_le_bytes());
    hash.update((scope.len() as u64).to_le_bytes());
    hash.update(scope);
    hash.finalize().into()
}

/// The digest of `parent` extended by one full block of tokens.
pub fn extend(parent: &Digest, tokens: &[i32]) -> Digest {
    let mut hash = Sha256::new();
    hash.update(parent);
    // One update of a small buffer is faster than one call for each token.
    let mut buffer = [0u8; 256];
    for tokens in tokens.chunks(buffer.len() / 4) {
        for (bytes, token) in buffer.chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        hash.update(&buffer[..tokens.len() * 4]);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_depend_on_every_input_and_on_order() {
        let base = root(16, 0, b"m");
        let others = [root(32, 0, b"m"), root(16, 1, b"m"), root(16, 0, b"n")];
        assert!(others.iter().all(|other| *other != base));
        let ab = extend(&extend(&base, &[1, 2]), &[3, 4]);
        assert_ne!(ab, extend(&extend(&base, &[3, 4]), &[1, 2]));
        assert_ne!(extend(&base, &[1, 2, 3, 4]), ab, "block boundaries matter");
        let long: Vec<i32> = (0..1000).collect();
        let mut changed = long.clone();
        changed[999] = -1;
        assert_ne!(extend(&base, &long), extend(&base, &changed));
    }
}
