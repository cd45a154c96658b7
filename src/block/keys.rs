//! What distinguishes equal tokens: the adapter of a sequence, the images behind placeholders.

/// What a key is; vLLM encodes the kinds differently, and in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The identifier of an image or another input behind placeholder tokens. Its distance from the
    /// start of the block tells its parts apart.
    Item,
    /// A text: a salt.
    Text,
    /// Bytes: a hash of prompt embeddings.
    Bytes,
}

impl Kind {
    /// Every kind, in vLLM's order.
    pub const ALL: [Self; 3] = [Self::Item, Self::Text, Self::Bytes];
}

/// A key of the tokens `start..end`, hashed into every block that they touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extra<'a> {
    /// First token.
    pub start: usize,
    /// Behind the last token.
    pub end: usize,
    /// What it is.
    pub kind: Kind,
    /// The key.
    pub key: &'a [u8],
}

/// A key of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    /// What it is.
    pub kind: Kind,
    /// The key itself.
    pub bytes: &'a [u8],
    /// Tokens from the start of the block to the start of an item; negative if it began before.
    pub offset: i64,
}

/// What a sequence keeps of its request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Keys {
    /// The name of the adapter, or nothing.
    pub(super) adapter: String,
    extra: Vec<Owned>,
    /// What the engine said about parts of the sequence, the latest last.
    pub(super) ranges: Vec<Range>,
}

/// How long the entries of the tokens `start..end` should stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First token.
    pub start: usize,
    /// Behind the last token.
    pub end: usize,
    /// 0 to 100.
    pub priority: u8,
    /// Microseconds after the end of the sequence; 0 for never.
    pub ttl: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Owned {
    start: usize,
    end: usize,
    kind: Kind,
    key: Vec<u8>,
}

impl Owned {
    fn view(&self) -> Extra<'_> {
        Extra { start: self.start, end: self.end, kind: self.kind, key: &self.key }
    }
}

impl Keys {
    /// A copy of what a request says; `None` if it says nothing.
    pub(super) fn of(adapter: &str, extra: &[Extra<'_>]) -> Option<Box<Self>> {
        (!adapter.is_empty() || !extra.is_empty()).then(|| {
            let owned = |it: &Extra<'_>| Owned {
                start: it.start,
                end: it.end,
                kind: it.kind,
                key: it.key.to_vec(),
            };
            let extra = extra.iter().map(owned).collect();
            Box::new(Self { adapter: adapter.to_string(), extra, ranges: Vec::new() })
        })
    }

    /// The keys of the block of `size` tokens that starts at token `start`.
    pub(super) fn of_block(&self, start: usize, size: usize) -> Vec<Key<'_>> {
        of_block(self.extra.iter().map(Owned::view), start, size)
    }

    /// Whether all blocks are named by their tokens alone, below the root.
    pub(super) fn is_plain(&self) -> bool {
        self.extra.is_empty()
    }

    /// What was said last about the block of `size` tokens that starts at token `start`.
    pub(super) fn range_of(&self, start: usize, size: usize) -> Option<&Range> {
        self.ranges.iter().rev().find(|it| it.start < start + size && it.end > start)
    }
}

/// The keys of the block of `size` tokens that starts at token `start`, in vLLM's order.
pub(super) fn of_block<'a>(
    extra: impl Iterator<Item = Extra<'a>>,
    start: usize,
    size: usize,
) -> Vec<Key<'a>> {
    let key = |it: Extra<'a>| Key {
        kind: it.kind,
        bytes: it.key,
        offset: if it.kind == Kind::Item { it.start as i64 - start as i64 } else { 0 },
    };
    let touching = extra.filter(|it| it.start < start + size && it.end > start);
    let mut keys: Vec<Key<'_>> = touching.map(key).collect();
    keys.sort_by_key(|key| key.kind as u8);
    keys
}
