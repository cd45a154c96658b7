//! The identity of a prefix: a chain of SHA-256 digests, one for each full block of tokens.
//!
//! ```text
//! root   = H("kvmgr prefix v1" | block_size | salt | scope)
//! next   = H(tokens as little-endian i32 | parent [ | extra | bytes of extra as u64 ])
//! ```
//!
//! Tokens come first so that most of the work for one block does not wait for the digest of the one
//! before it.
//!
//! A digest names the whole prefix up to and including its block, so equal digests mean equal
//! tokens, model scope, salt and extra keys. The salt is the operator's: tenants with different
//! salts can neither share blocks nor learn of each other's by lookup.
//!
//! [`Hash::VllmCbor`] is what vLLM calls `sha256_cbor`, so that routers can compute the same:
//!
//! ```text
//! root   = H(cbor(seed text))
//! next   = H(cbor([parent bytes, [tokens], extra])), extra null or an array of texts
//! ```

use sha2::block_api::compress256;
use sha2::{Digest as _, Sha256};

/// The digest of a prefix that ends at a block boundary.
pub type Digest = [u8; 32];

/// How digests are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hash {
    /// The library's own: the fastest.
    #[default]
    Native,
    /// vLLM's `sha256_cbor`.
    VllmCbor,
}

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

/// The digest of the empty prefix of one tenant or adapter below `root`: `salt` is hashed with its
/// length and apart from every token, so no prompt can imitate it.
pub fn tenant_root(root: &Digest, salt: &[u8]) -> Digest {
    if salt.is_empty() {
        return *root;
    }
    let mut hash = Sha256::new();
    hash.update(b"kvmgr tenant v1");
    hash.update(root);
    hash.update((salt.len() as u64).to_le_bytes());
    hash.update(salt);
    hash.finalize().into()
}

/// The root of vLLM's chain: the hash of the text of `PYTHONHASHSEED`.
pub fn vllm_root(seed: &str) -> Digest {
    let mut bytes = Vec::with_capacity(seed.len() + 9);
    cbor_head(&mut bytes, 3, seed.len() as u64);
    bytes.extend_from_slice(seed.as_bytes());
    Sha256::digest(&bytes).into()
}

/// The digest of `parent` extended by one full block of tokens.
pub fn extend(parent: &Digest, tokens: &[i32]) -> Digest {
    let mut message = Message::new();
    message.tokens(tokens);
    message.bytes(parent);
    message.finish()
}

/// Appends the digests of all full blocks of `block_size` tokens below `root` to `out`.
pub fn extend_run(root: &Digest, tokens: &[i32], block_size: usize, out: &mut Vec<Digest>) {
    let mut parent = *root;
    let mut chunks = tokens.chunks_exact(block_size);
    let start = |chunk: Option<&[i32]>| {
        chunk.map(|tokens| {
            let mut message = Message::new();
            message.tokens(tokens);
            message
        })
    };
    // The next block's tokens are hashed beside this block's end, which waits for the parent.
    let mut next = start(chunks.next());
    while let Some(mut message) = next {
        next = start(chunks.next());
        message.bytes(&parent);
        parent = message.finish();
        out.push(parent);
    }
}

/// The digest of `parent` extended by one full block of tokens that `extra` distinguishes: the
/// adapter, or the hash and offset of an image in the block. No extra keys are [`extend`].
pub fn extend_with(hash: Hash, parent: &Digest, tokens: &[i32], extra: &[&[u8]]) -> Digest {
    match hash {
        Hash::Native if extra.is_empty() => extend(parent, tokens),
        Hash::Native => {
            let mut message = Message::new();
            message.tokens(tokens);
            message.bytes(parent);
            let mut total = 0;
            for key in extra {
                message.bytes(&(key.len() as u64).to_le_bytes());
                message.bytes(key);
                total += 8 + key.len() as u64;
            }
            message.bytes(&total.to_le_bytes());
            message.finish()
        }
        Hash::VllmCbor => {
            let mut bytes = Vec::with_capacity(64 + 5 * tokens.len());
            cbor_head(&mut bytes, 4, 3);
            cbor_head(&mut bytes, 2, parent.len() as u64);
            bytes.extend_from_slice(parent);
            cbor_head(&mut bytes, 4, tokens.len() as u64);
            tokens.iter().for_each(|token| cbor_int(&mut bytes, i64::from(*token)));
            if extra.is_empty() {
                bytes.push(0xF6);
            } else {
                cbor_head(&mut bytes, 4, extra.len() as u64);
                for key in extra {
                    cbor_head(&mut bytes, 3, key.len() as u64);
                    bytes.extend_from_slice(key);
                }
            }
            Sha256::digest(&bytes).into()
        }
    }
}

/// The head of a CBOR item in its shortest form.
fn cbor_head(out: &mut Vec<u8>, major: u8, value: u64) {
    let major = major << 5;
    match value {
        0..24 => out.push(major | value as u8),
        24..0x100 => out.extend_from_slice(&[major | 24, value as u8]),
        0x100..0x1_0000 => {
            out.push(major | 25);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..0x1_0000_0000 => {
            out.push(major | 26);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

fn cbor_int(out: &mut Vec<u8>, value: i64) {
    if value < 0 {
        cbor_head(out, 1, (-1 - value) as u64);
    } else {
        cbor_head(out, 0, value as u64);
    }
}

/// SHA-256 of a short message without the general interface, which costs a third more on 96 bytes.
struct Message {
    state: [u32; 8],
    block: [u8; 64],
    fill: usize,
    total: u64,
}

impl Message {
    fn new() -> Self {
        Self { state: INITIAL, block: [0; 64], fill: 0, total: 0 }
    }

    fn tokens(&mut self, tokens: &[i32]) {
        debug_assert_eq!(self.total, 0, "tokens come first");
        let whole = tokens.chunks_exact(16);
        let rest = whole.remainder();
        for chunk in whole {
            for (bytes, token) in self.block.chunks_exact_mut(4).zip(chunk) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            compress256(&mut self.state, std::slice::from_ref(&self.block));
            self.total += 64;
        }
        rest.iter().for_each(|token| self.bytes(&token.to_le_bytes()));
    }

    #[inline]
    fn bytes(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        while !bytes.is_empty() {
            let take = bytes.len().min(64 - self.fill);
            self.block[self.fill..self.fill + take].copy_from_slice(&bytes[..take]);
            self.fill += take;
            bytes = &bytes[take..];
            if self.fill == 64 {
                compress256(&mut self.state, std::slice::from_ref(&self.block));
                self.fill = 0;
            }
        }
    }

    fn finish(mut self) -> Digest {
        self.block[self.fill] = 0x80;
        self.block[self.fill + 1..].fill(0);
        if self.fill + 9 > 64 {
            compress256(&mut self.state, std::slice::from_ref(&self.block));
            self.block.fill(0);
        }
        self.block[56..].copy_from_slice(&(self.total * 8).to_be_bytes());
        compress256(&mut self.state, std::slice::from_ref(&self.block));
        let mut digest = [0; 32];
        for (bytes, word) in digest.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }
}

/// FIPS 180-4, 5.3.3.
const INITIAL: [u32; 8] = [
    0x6A09_E667,
    0xBB67_AE85,
    0x3C6E_F372,
    0xA54F_F53A,
    0x510E_527F,
    0x9B05_688C,
    0x1F83_D9AB,
    0x5BE0_CD19,
];

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
        let mut run = Vec::new();
        extend_run(&base, &long[..70], 16, &mut run);
        let mut parent = base;
        for (chunk, digest) in long.chunks(16).zip(&run) {
            parent = extend(&parent, chunk);
            assert_eq!(parent, *digest);
        }
        assert_eq!(run.len(), 4);
        let with = |extra: &[&[u8]]| extend_with(Hash::Native, &base, &[1, 2], extra);
        assert_eq!(with(&[]), extend(&base, &[1, 2]));
        assert_ne!(with(&[b"ab", b"c"]), with(&[b"a", b"bc"]));
        assert_ne!(with(&[b""]), with(&[]));
        assert_ne!(tenant_root(&base, b"a"), tenant_root(&base, b"b"));
        assert_eq!(tenant_root(&base, b""), base);
    }

    #[test]
    fn the_short_path_is_sha_256() {
        for len in 0..200 {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let mut message = Message::new();
            for part in bytes.chunks(7) {
                message.bytes(part);
            }
            assert_eq!(message.finish(), Digest::from(Sha256::digest(&bytes)), "{len} bytes");
        }
    }
}
