//! What the prefix index tells routers: blocks stored, blocks removed, as vLLM's msgpack.
//!
//! ```text
//! batch   = [ timestamp (float, seconds), [event, ...], nil ]
//! maps    = {"type": "BlockStored", "block_hashes": [bin], "parent_block_hash": bin | nil,
//!            "token_ids": [int], "block_size": int, "lora_id": nil, "medium": text,
//!            "lora_name": text | nil, "extra_keys"?: [nil | [key, ...], one for each block],
//!            "group_idx"?: int, "kv_cache_spec_kind"?: text, ...}
//!           {"type": "BlockRemoved", "block_hashes": [bin], "medium": text, "group_idx"?: int}
//!           {"type": "AllBlocksCleared"}
//! arrays  = ["BlockStored", block_hashes, parent_block_hash, token_ids, block_size, nil, medium,
//!            lora_name, extra_keys, group_idx, ...], the same by position, for older readers
//! key     = text | bin | [text, int]: the adapter's name, a salt, the hash of embeddings, or the
//!           identifier of an image and its distance from the start of the block
//! ```
//!
//! Batches are numbered from 0 without gaps; the last ones are kept, so that a reader that lost
//! some can ask again.

use std::collections::VecDeque;

use super::groups::Group;
use super::keys::{Key, Kind};
use super::prefix::Digest;

/// Something that happened to the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Full blocks can be found from now on, each the child of the one before.
    Stored {
        /// The group of a hybrid model.
        group: u8,
        /// What the first block continues; `None` at the start of a prompt.
        parent: Option<Digest>,
        /// One digest for each block.
        digests: Vec<Digest>,
        /// The tokens of all blocks.
        tokens: Vec<i32>,
        /// The name of the adapter, or "".
        adapter: String,
        /// What else went into the digests: one list for each block, encoded; empty if there is none.
        keys: Vec<Vec<u8>>,
    },
    /// Blocks can no longer be found.
    Removed {
        /// The group of a hybrid model.
        group: u8,
        /// One digest for each block.
        digests: Vec<Digest>,
    },
    /// Nothing can be found any more.
    Cleared,
}

/// A block that became an entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored<'a> {
    pub(super) group: u8,
    pub(super) parent: Option<&'a Digest>,
    pub(super) digest: &'a Digest,
    pub(super) tokens: &'a [i32],
    pub(super) adapter: &'a str,
    pub(super) keys: &'a [Key<'a>],
}

/// Events since the last batch, and the batches before.
#[derive(Debug)]
pub(super) struct Journal {
    events: Vec<Event>,
    stream: EventStream,
}

impl Journal {
    /// Nothing has happened yet.
    pub(super) fn new(format: EventFormat) -> Self {
        Self { events: Vec::new(), stream: EventStream { format, next: 0, ring: VecDeque::new() } }
    }

    /// The batches.
    pub(super) fn stream(&self) -> &EventStream {
        &self.stream
    }

    /// Makes a batch of what has happened, if anything. Answers its number and its bytes.
    pub(super) fn publish(&mut self, seconds: f64) -> Option<(u64, &[u8])> {
        if self.events.is_empty() {
            return None;
        }
        let bytes = self.stream.format.encode(&self.events, seconds);
        self.events.clear();
        Some(self.stream.push(bytes))
    }

    /// A block became an entry. Joins the event before it if that is its parent's.
    pub(super) fn stored(&mut self, it: &Stored<'_>) {
        let of_block = extra_keys(it);
        if let Some(Event::Stored { group, digests, tokens, adapter, keys, .. }) =
            self.events.last_mut()
            && *group == it.group
            && digests.last() == it.parent
            && adapter == it.adapter
        {
            digests.push(*it.digest);
            tokens.extend_from_slice(it.tokens);
            keys.push(of_block);
            return;
        }
        self.events.push(Event::Stored {
            group: it.group,
            parent: it.parent.copied(),
            digests: vec![*it.digest],
            tokens: it.tokens.to_vec(),
            adapter: it.adapter.to_string(),
            keys: vec![of_block],
        });
    }

    /// An entry left.
    pub(super) fn removed(&mut self, group: u8, digest: &Digest) {
        if let Some(Event::Removed { group: last, digests }) = self.events.last_mut()
            && *last == group
        {
            return digests.push(*digest);
        }
        self.events.push(Event::Removed { group, digests: vec![*digest] });
    }

    /// Every entry left: what happened before does not matter any more.
    pub(super) fn cleared(&mut self) {
        self.events.clear();
        self.events.push(Event::Cleared);
    }
}

/// How events are encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventFormat {
    /// Arrays by position instead of maps by name.
    pub arrays: bool,
    /// What `medium` says; vLLM's word for device memory is "GPU".
    pub medium: String,
    /// Tokens of a block.
    pub block_size: usize,
    /// The groups; their fields are left out if there is only one full group.
    pub groups: Vec<Group>,
    /// Batches kept for [`EventStream::replay`].
    pub capacity: usize,
}

/// Numbered batches.
#[derive(Debug)]
pub struct EventStream {
    format: EventFormat,
    next: u64,
    ring: VecDeque<Vec<u8>>,
}

impl EventStream {
    /// The number of the next batch.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    fn push(&mut self, bytes: Vec<u8>) -> (u64, &[u8]) {
        if self.ring.len() >= self.format.capacity.max(1) {
            self.ring.pop_front();
        }
        self.next += 1;
        let place = self.ring.len();
        self.ring.push_back(bytes);
        (self.next - 1, &self.ring[place])
    }

    /// The batches from number `first` on that are still kept, in order.
    pub fn replay(&self, first: u64) -> impl Iterator<Item = (u64, &[u8])> {
        let oldest = self.next - self.ring.len() as u64;
        let skip = first.saturating_sub(oldest).min(self.ring.len() as u64) as usize;
        self.ring
            .iter()
            .enumerate()
            .skip(skip)
            .map(move |(i, bytes)| (oldest + i as u64, &bytes[..]))
    }
}

impl EventFormat {
    fn encode(&self, events: &[Event], seconds: f64) -> Vec<u8> {
        let mut out = Pack(Vec::with_capacity(64 * events.len()));
        out.array(3);
        out.float(seconds);
        out.array(events.len());
        for event in events {
            match event {
                Event::Stored { group, parent, digests, tokens, adapter, keys } => {
                    let has_keys = self.open_stored(&mut out, *group, keys);
                    self.name(&mut out, "block_hashes");
                    out.digests(digests);
                    self.name(&mut out, "parent_block_hash");
                    match parent {
                        Some(parent) => out.bytes(parent),
                        None => out.nil(),
                    }
                    self.name(&mut out, "token_ids");
                    out.array(tokens.len());
                    tokens.iter().for_each(|token| out.int(i64::from(*token)));
                    self.origin(&mut out, adapter);
                    self.keys(&mut out, keys, has_keys);
                    self.group(&mut out, *group);
                }
                Event::Removed { group, digests } => {
                    let fields = if self.is_plain() { 2 } else { 3 };
                    self.open(&mut out, "BlockRemoved", fields);
                    self.name(&mut out, "block_hashes");
                    out.digests(digests);
                    self.name(&mut out, "medium");
                    out.text(&self.medium);
                    if fields == 3 {
                        self.name(&mut out, "group_idx");
                        out.int(i64::from(*group));
                    }
                }
                Event::Cleared => self.open(&mut out, "AllBlocksCleared", 0),
            }
        }
        out.nil(); // The rank is the transport's to know.
        out.0
    }

    /// Opens an event of stored blocks; answers whether it has a field for keys.
    fn open_stored(&self, out: &mut Pack, group: u8, keys: &[Vec<u8>]) -> bool {
        let of_group = match self.kind(group) {
            _ if self.is_plain() => 0,
            Group::Window(_) => 3,
            _ => 2,
        };
        // By position, absent keys cannot be left out before the fields behind them.
        let has_keys = keys.iter().any(|it| !it.is_empty()) || (self.arrays && of_group > 0);
        self.open(out, "BlockStored", 7 + usize::from(has_keys) + of_group);
        has_keys
    }

    fn origin(&self, out: &mut Pack, adapter: &str) {
        self.name(out, "block_size");
        out.int(self.block_size as i64);
        self.name(out, "lora_id");
        out.nil();
        self.name(out, "medium");
        out.text(&self.medium);
        self.name(out, "lora_name");
        match adapter {
            "" => out.nil(),
            name => out.text(name),
        }
    }

    fn keys(&self, out: &mut Pack, keys: &[Vec<u8>], has_keys: bool) {
        if !has_keys {
            return;
        }
        self.name(out, "extra_keys");
        if keys.iter().all(Vec::is_empty) {
            return out.nil();
        }
        out.array(keys.len());
        for of_block in keys {
            match of_block[..] {
                [] => out.nil(),
                ref bytes => out.0.extend_from_slice(bytes),
            }
        }
    }

    fn group(&self, out: &mut Pack, group: u8) {
        if self.is_plain() {
            return;
        }
        let kind = self.kind(group);
        self.name(out, "group_idx");
        out.int(i64::from(group));
        self.name(out, "kv_cache_spec_kind");
        out.text(match kind {
            Group::Full => "full_attention",
            Group::Latent => "mla_attention",
            Group::Window(_) => "sliding_window",
            Group::Recurrent(_) => "mamba",
        });
        if let Group::Window(window) = kind {
            self.name(out, "kv_cache_spec_sliding_window");
            out.int(i64::from(window));
        }
    }

    fn kind(&self, group: u8) -> Group {
        self.groups.get(usize::from(group)).copied().unwrap_or(Group::Full)
    }

    /// Whether consumers need not know about groups.
    fn is_plain(&self) -> bool {
        self.groups.is_empty() || self.groups == [Group::Full]
    }

    fn open(&self, out: &mut Pack, tag: &str, fields: usize) {
        if self.arrays {
            out.array(fields + 1);
        } else {
            out.head(fields + 1, 0x80, 15, None, 0xDE);
            out.text("type");
        }
        out.text(tag);
    }

    fn name(&self, out: &mut Pack, name: &str) {
        if !self.arrays {
            out.text(name);
        }
    }
}

/// The keys of one block as an event tells them, encoded; nothing if there are none.
fn extra_keys(it: &Stored<'_>) -> Vec<u8> {
    let count = it.keys.len() + usize::from(!it.adapter.is_empty());
    let mut out = Pack(Vec::new());
    if count == 0 {
        return out.0;
    }
    out.array(count);
    if !it.adapter.is_empty() {
        out.text(it.adapter);
    }
    for key in it.keys {
        match (key.kind, std::str::from_utf8(key.bytes)) {
            (Kind::Item, Ok(text)) => {
                out.array(2);
                out.text(text);
                out.int(key.offset);
            }
            (Kind::Text, Ok(text)) => out.text(text),
            (Kind::Item, Err(_)) => {
                out.array(2);
                out.bytes(key.bytes);
                out.int(key.offset);
            }
            _ => out.bytes(key.bytes),
        }
    }
    out.0
}

/// A writer of msgpack.
struct Pack(Vec<u8>);

impl Pack {
    /// A length: in the first byte up to `fix`, in one byte if there is such a form, in two or four.
    fn head(&mut self, len: usize, small: u8, fix: usize, one: Option<u8>, two: u8) {
        match (len, one) {
            _ if len <= fix => self.0.push(small | len as u8),
            (0..0x100, Some(one)) => self.0.extend_from_slice(&[one, len as u8]),
            (0..0x1_0000, _) => {
                self.0.push(two);
                self.0.extend_from_slice(&(len as u16).to_be_bytes());
            }
            _ => {
                self.0.push(two + 1);
                self.0.extend_from_slice(&(len as u32).to_be_bytes());
            }
        }
    }

    fn array(&mut self, len: usize) {
        self.head(len, 0x90, 15, None, 0xDC);
    }

    fn text(&mut self, text: &str) {
        self.head(text.len(), 0xA0, 31, Some(0xD9), 0xDA);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        match bytes.len() {
            len @ 0..0x100 => self.0.extend_from_slice(&[0xC4, len as u8]),
            len => self.head(len, 0, 0, None, 0xC5),
        }
        self.0.extend_from_slice(bytes);
    }

    fn digests(&mut self, digests: &[Digest]) {
        self.array(digests.len());
        digests.iter().for_each(|digest| self.bytes(digest));
    }

    fn nil(&mut self) {
        self.0.push(0xC0);
    }

    fn float(&mut self, value: f64) {
        self.0.push(0xCB);
        self.0.extend_from_slice(&value.to_be_bytes());
    }

    fn int(&mut self, value: i64) {
        match value {
            -32..0x80 => self.0.push(value as u8),
            0x80..0x100 => self.0.extend_from_slice(&[0xCC, value as u8]),
            0x100..0x1_0000 => {
                self.0.push(0xCD);
                self.0.extend_from_slice(&(value as u16).to_be_bytes());
            }
            0x1_0000..0x1_0000_0000 => {
                self.0.push(0xCE);
                self.0.extend_from_slice(&(value as u32).to_be_bytes());
            }
            _ => {
                self.0.push(0xD3);
                self.0.extend_from_slice(&value.to_be_bytes());
            }
        }
    }
}
