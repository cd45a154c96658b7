//! The identity of a prefix: a chain of SHA-256 states, one for each full block of tokens.
//!
//! ```text
//! root   = H("kvmgr prefix v2" | block_size | salt | scope)         H is all of SHA-256
//! next   = compress(parent, tokens as little-endian i32)            64 bytes a compression
//! keys   = H("kvmgr keys v2" | next | number | kind, offset, size, bytes of each), if there are any
//! ```
//!
//! `compress` is SHA-256's own, so a digest is the state of one long SHA-256 computation that
//! starts with the padded bytes of the root: 16 tokens cost one compression, half of what hashing
//! `parent | tokens` with padding costs. It is as hard to collide as SHA-256. Equal digests of two
//! chains lead back, block by block, to equal inputs of `compress` or to a collision of it; then
//! to where the shorter chain starts, which is an output of H that nobody can aim at. The inputs
//! can be told apart: a root says how long its text is, its block size how many tokens (the last
//! 64 bytes of a block filled up with zeros) make a step, and H over keys starts like no root.
//!
//! A digest names the whole prefix up to and including its block, so equal digests mean equal
//! tokens, model scope, salt and extra keys. The salt is the operator's: tenants with different
//! salts can neither share blocks nor learn of each other's by lookup.
//!
//! [`Hash::VllmCbor`] is what vLLM calls `sha256_cbor`, so that routers can compute the same:
//!
//! ```text
//! root   = H(cbor(seed text))
//! next   = H(cbor([parent bytes, [tokens], extra])), extra null or an array of the adapter's name,
//!          [identifier, offset] of each image, the salt (first block only), bytes of embeddings
//! ```

use sha2::{Digest as _, Sha256};

use super::keys::{Key, Kind};
use crate::simd::sha256;

/// The digest of a prefix that ends at a block boundary.
pub type Digest = sha256::State;

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
    hash.update(b"kvmgr prefix v2");
    hash.update((block_size as u64).to_le_bytes());
    hash.update(salt.to_le_bytes());
    hash.update((scope.len() as u64).to_le_bytes());
    hash.update(scope);
    hash.finalize().into()
}

/// The digest of the empty prefix of one tenant below `root`: `salt` is hashed with its length and
/// apart from every token, so no prompt can imitate it.
pub fn tenant_root(root: &Digest, salt: &[u8]) -> Digest {
    below(root, b"kvmgr tenant v2", salt)
}

/// The digest of the empty prefix of the model with an adapter, told apart from every tenant.
pub fn adapter_root(root: &Digest, adapter: &str) -> Digest {
    below(root, b"kvmgr adapter v2", adapter.as_bytes())
}

fn below(root: &Digest, domain: &[u8], name: &[u8]) -> Digest {
    if name.is_empty() {
        return *root;
    }
    let mut hash = Sha256::new();
    hash.update(domain);
    hash.update(root);
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    hash.finalize().into()
}

/// The root of vLLM's chain: the hash of the text of `PYTHONHASHSEED`.
pub fn vllm_root(seed: &str) -> Digest {
    let mut bytes = Vec::with_capacity(seed.len() + 9);
    cbor_bytes(&mut bytes, 3, seed.as_bytes());
    Sha256::digest(&bytes).into()
}

/// The digest of `parent` extended by one full block of tokens: as many as the root says, not none.
pub fn extend(parent: &Digest, tokens: &[i32]) -> Digest {
    let mut out = [[0; 32]];
    extend_chunks(parent, tokens, tokens.len(), &mut out);
    out[0]
}

/// Appends the digests of all full blocks of `block_size` tokens below `root` to `out`.
pub fn extend_run(root: &Digest, tokens: &[i32], block_size: usize, out: &mut Vec<Digest>) {
    let start = out.len();
    let full = tokens.len() / block_size;
    out.resize(start + full, [0; 32]);
    extend_chunks(root, &tokens[..full * block_size], block_size, &mut out[start..]);
}

/// [`extend_run`] for two prompts, in little more than the time of the longer one.
pub fn extend_runs(
    roots: [&Digest; 2],
    tokens: [&[i32]; 2],
    block_size: usize,
    outs: [&mut Vec<Digest>; 2],
) {
    let both = tokens[0].len().min(tokens[1].len()) / block_size;
    let [first, second] = outs;
    let starts = [first.len(), second.len()];
    let mut done = 0;
    if block_size.is_multiple_of(16) {
        first.resize(starts[0] + both, [0; 32]);
        second.resize(starts[1] + both, [0; 32]);
        let messages = tokens.map(|tokens| tokens[..both * block_size].as_chunks().0);
        let places = [&mut first[starts[0]..], &mut second[starts[1]..]];
        sha256::run(roots, messages, block_size / 16, places);
        done = both;
    }
    for (i, out) in [first, second].into_iter().enumerate() {
        let parent = if done > 0 { out[out.len() - 1] } else { *roots[i] };
        extend_run(&parent, &tokens[i][done * block_size..], block_size, out);
    }
}

/// One block below each of two parents: what two calls of [`extend`] answer, in little more than
/// the time of one.
pub fn extend_pair(parents: [&Digest; 2], tokens: [&[i32]; 2]) -> [Digest; 2] {
    let [(first, []), (second, [])] = tokens.map(|tokens| tokens.as_chunks()) else {
        return [extend(parents[0], tokens[0]), extend(parents[1], tokens[1])];
    };
    let every = first.len();
    if every == 0 || second.len() != every {
        return [extend(parents[0], tokens[0]), extend(parents[1], tokens[1])];
    }
    let (mut a, mut b) = ([[0; 32]], [[0; 32]]);
    sha256::run(parents, [first, second], every, [&mut a, &mut b]);
    [a[0], b[0]]
}

/// The digests of as many blocks of `size` tokens as `out` has places.
fn extend_chunks(root: &Digest, tokens: &[i32], size: usize, out: &mut [Digest]) {
    if let (messages, []) = tokens.as_chunks()
        && size.is_multiple_of(16)
    {
        return sha256::run([root], [messages], size / 16, [out]);
    }
    let mut parent = *root;
    for (chunk, out) in tokens.chunks(size).zip(out) {
        // Messages that are not full end with zeros; their number follows from the block size.
        for part in chunk.chunks(16) {
            let mut message = [0; 16];
            message[..part.len()].copy_from_slice(part);
            parent = sha256::step(&parent, &message);
        }
        *out = parent;
    }
}

/// The digest of `parent` extended by one full block of tokens that `keys` distinguish, and with
/// vLLM's hash the name of an adapter; the library's own has that in its root. No keys are
/// [`extend`].
pub fn extend_with(
    hash: Hash,
    parent: &Digest,
    tokens: &[i32],
    adapter: &str,
    keys: &[Key<'_>],
) -> Digest {
    match hash {
        Hash::Native if keys.is_empty() => extend(parent, tokens),
        Hash::Native => {
            let mut hash = Sha256::new();
            hash.update(b"kvmgr keys v2");
            hash.update(extend(parent, tokens));
            hash.update((keys.len() as u64).to_le_bytes());
            for key in keys {
                hash.update([key.kind as u8]);
                hash.update(key.offset.to_le_bytes());
                hash.update((key.bytes.len() as u64).to_le_bytes());
                hash.update(key.bytes);
            }
            hash.finalize().into()
        }
        Hash::VllmCbor => Sha256::digest(cbor_block(parent, tokens, adapter, keys)).into(),
    }
}

fn cbor_block(parent: &Digest, tokens: &[i32], adapter: &str, keys: &[Key<'_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 5 * tokens.len());
    cbor_head(&mut out, 4, 3);
    cbor_bytes(&mut out, 2, parent);
    cbor_head(&mut out, 4, tokens.len() as u64);
    tokens.iter().for_each(|token| cbor_int(&mut out, i64::from(*token)));
    let count = keys.len() + usize::from(!adapter.is_empty());
    if count == 0 {
        out.push(0xF6);
        return out;
    }
    cbor_head(&mut out, 4, count as u64);
    if !adapter.is_empty() {
        cbor_bytes(&mut out, 3, adapter.as_bytes());
    }
    for key in keys {
        match key.kind {
            Kind::Item => {
                cbor_head(&mut out, 4, 2);
                cbor_bytes(&mut out, 3, key.bytes);
                cbor_int(&mut out, key.offset);
            }
            Kind::Text => cbor_bytes(&mut out, 3, key.bytes),
            Kind::Bytes => cbor_bytes(&mut out, 2, key.bytes),
        }
    }
    out
}

/// Bytes (`major` 2) or a text (3).
fn cbor_bytes(out: &mut Vec<u8>, major: u8, bytes: &[u8]) {
    cbor_head(out, major, bytes.len() as u64);
    out.extend_from_slice(bytes);
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
        for (size, a, b) in [(16, 70, 33), (32, 64, 200), (16, 5, 40), (8, 30, 40)] {
            let (mut alone, mut first, mut second) = (Vec::new(), vec![base], Vec::new());
            let tokens = [&long[..a], &changed[900 - b..900]];
            extend_runs([&base, &ab], tokens, size, [&mut first, &mut second]);
            extend_run(&base, tokens[0], size, &mut alone);
            assert_eq!(first[1..], alone[..]);
            alone.clear();
            extend_run(&ab, tokens[1], size, &mut alone);
            assert_eq!(second, alone);
        }
        let with = |keys: &[Key<'_>]| extend_with(Hash::Native, &base, &[1, 2], "", keys);
        let key = |bytes: &'static str, offset, kind| Key { bytes: bytes.as_bytes(), offset, kind };
        assert_eq!(with(&[]), extend(&base, &[1, 2]));
        let text = |bytes| key(bytes, 0, Kind::Text);
        assert_ne!(with(&[text("ab"), text("c")]), with(&[text("a"), text("bc")]));
        assert_ne!(with(&[text("")]), with(&[]));
        assert_ne!(with(&[text("a")]), with(&[key("a", 0, Kind::Item)]));
        assert_ne!(with(&[key("a", 1, Kind::Item)]), with(&[key("a", 0, Kind::Item)]));
        assert_ne!(adapter_root(&base, "a"), tenant_root(&base, b"a"));
        assert_ne!(tenant_root(&base, b"a"), tenant_root(&base, b"b"));
        assert_eq!(tenant_root(&base, b""), base);
    }
}
