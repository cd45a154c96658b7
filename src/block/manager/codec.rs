//! The bytes of a log: little-endian numbers, lists behind their length as u32.

use super::{BlockConfig, Keep, LeaseId};
use crate::block::groups::Group;
use crate::block::keys::{Extra, Kind};
use crate::block::prefix::{Digest, Hash};
use crate::block::tables::{Placement, SequenceId, Tables, TablesConfig};
use crate::error::{Result, bail};

/// How every log starts.
pub(super) const MAGIC: &[u8] = b"kvmgr log 2\n";

/// An [`Extra`] as the log has it: start, end, kind, key.
pub(super) type OwnedExtra = (usize, usize, Kind, Vec<u8>);

/// A writer of log bytes.
#[derive(Debug, Default)]
pub(super) struct Words(pub(super) Vec<u8>);

impl Words {
    pub(super) fn word(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn long(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn words(&mut self, values: &[u32]) {
        self.word(values.len() as u32);
        values.iter().for_each(|value| self.word(*value));
    }

    pub(super) fn pair(&mut self, a: u32, b: u32) {
        self.word(a);
        self.word(b);
    }

    /// What was decided, or the kind of the refusal.
    pub(super) fn result<T>(&mut self, result: &Result<T>, good: impl FnOnce(&mut Self, &T)) {
        match result {
            Ok(value) => {
                self.0.push(0);
                good(self, value);
            }
            Err(error) => self.0.push(1 + error.kind() as u8),
        }
    }

    /// A new sequence: its name and its whole table.
    pub(super) fn table(&mut self, tables: &Tables, id: SequenceId, num_cached: usize) {
        self.long(id.0);
        self.word(num_cached as u32);
        self.words(tables.blocks(id).unwrap_or(&[]));
    }

    /// What changed in known sequences: the ends of their tables.
    pub(super) fn tails(&mut self, tables: &Tables, ids: &[SequenceId]) {
        for id in ids {
            let blocks = tables.blocks(*id).unwrap_or(&[]);
            self.pair(blocks.len() as u32, blocks.last().copied().unwrap_or(0));
        }
    }

    pub(super) fn places(&mut self, places: &[Placement]) {
        places.iter().for_each(|it| self.pair(it.place, it.block.0));
    }

    pub(super) fn small(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn size(&mut self, value: usize) {
        self.long(value as u64);
    }

    pub(super) fn id(&mut self, id: SequenceId) {
        self.long(id.0);
    }

    pub(super) fn lease(&mut self, id: LeaseId) {
        self.long(id.0);
    }

    pub(super) fn ids(&mut self, ids: &[SequenceId]) {
        self.word(ids.len() as u32);
        ids.iter().for_each(|id| self.long(id.0));
    }

    pub(super) fn tokens(&mut self, tokens: &[i32]) {
        self.word(tokens.len() as u32);
        tokens.iter().for_each(|token| self.0.extend_from_slice(&token.to_le_bytes()));
    }

    pub(super) fn digest(&mut self, digest: &Digest) {
        self.0.extend_from_slice(digest);
    }

    pub(super) fn digests(&mut self, digests: &[Digest]) {
        self.word(digests.len() as u32);
        digests.iter().for_each(|digest| self.digest(digest));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn extra(&mut self, extra: &[Extra<'_>]) {
        self.word(extra.len() as u32);
        for extra in extra {
            self.size(extra.start);
            self.size(extra.end);
            self.small(extra.kind as u8);
            self.bytes(extra.key);
        }
    }

    pub(super) fn keep(&mut self, keep: Keep) {
        self.small(keep.priority);
        self.long(keep.ttl);
        self.long(keep.session);
    }

    pub(super) fn config(&mut self, config: &BlockConfig) {
        let tables = &config.tables;
        for value in [config.num_blocks, tables.block_size, tables.watermark] {
            self.size(value);
        }
        let is_cbor = tables.hash == Hash::VllmCbor;
        let flags = [config.partial, config.recycled, tables.prefix, tables.dedup, is_cbor];
        flags.iter().for_each(|flag| self.small(u8::from(*flag)));
        self.bytes(config.evictor.as_bytes());
        self.digest(&config.root);
        self.word(tables.groups.len() as u32);
        for group in &tables.groups {
            let (kind, value) = match group {
                Group::Full => (0, 0),
                Group::Latent => (1, 0),
                Group::Window(window) => (2, *window),
                Group::Recurrent(interval) => (3, *interval),
            };
            self.pair(kind, value);
        }
    }
}

/// A reader of log bytes.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(log: &'a [u8]) -> Result<Self> {
        match log.strip_prefix(MAGIC) {
            Some(rest) => Ok(Self(rest)),
            None => bail!(Corrupt, "the log does not start with its name and version"),
        }
    }

    pub(super) fn record(&mut self) -> Result<(&'a [u8], &'a [u8])> {
        let (first, second) = (self.word()? as usize, self.word()? as usize);
        Ok((self.take(first)?, self.take(second)?))
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((head, rest)) = self.0.split_at_checked(n) else {
            bail!(Corrupt, "the log ends within a record");
        };
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn small(&mut self) -> Result<u8> {
        self.byte()
    }

    pub(super) fn word(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn long(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn size(&mut self) -> Result<usize> {
        Ok(self.long()? as usize)
    }

    pub(super) fn id(&mut self) -> Result<SequenceId> {
        Ok(SequenceId(self.long()?))
    }

    pub(super) fn lease(&mut self) -> Result<LeaseId> {
        Ok(LeaseId(self.long()?))
    }

    pub(super) fn list<T>(
        &mut self,
        mut one: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        (0..self.word()?).map(|_| one(self)).collect()
    }

    pub(super) fn ids(&mut self) -> Result<Vec<SequenceId>> {
        self.list(Self::id)
    }

    pub(super) fn words(&mut self) -> Result<Vec<u32>> {
        self.list(Self::word)
    }

    pub(super) fn tokens(&mut self) -> Result<Vec<i32>> {
        self.list(|reader| Ok(reader.word()? as i32))
    }

    pub(super) fn digest(&mut self) -> Result<Digest> {
        self.array()
    }

    pub(super) fn digests(&mut self) -> Result<Vec<Digest>> {
        self.list(Self::digest)
    }

    pub(super) fn bytes(&mut self) -> Result<Vec<u8>> {
        let len = self.word()? as usize;
        Ok(self.take(len)?.to_vec())
    }

    pub(super) fn extra(&mut self) -> Result<Vec<OwnedExtra>> {
        self.list(|reader| {
            let (start, end, kind) = (reader.size()?, reader.size()?, usize::from(reader.small()?));
            let Some(kind) = Kind::ALL.get(kind) else {
                bail!(Corrupt, "the log has a key of kind {kind}")
            };
            Ok((start, end, *kind, reader.bytes()?))
        })
    }

    pub(super) fn keep(&mut self) -> Result<Keep> {
        Ok(Keep { priority: self.byte()?, ttl: self.long()?, session: self.long()? })
    }

    pub(super) fn config(&mut self) -> Result<BlockConfig> {
        let (num_blocks, block_size, watermark) = (self.size()?, self.size()?, self.size()?);
        let flags = self.array::<5>()?.map(|flag| flag != 0);
        let evictor = String::from_utf8_lossy(&self.bytes()?).into_owned();
        let root = self.digest()?;
        let groups = self.list(|reader| {
            let (kind, value) = (reader.word()?, reader.word()?);
            Ok(match kind {
                0 => Group::Full,
                1 => Group::Latent,
                2 => Group::Window(value),
                3 => Group::Recurrent(value),
                kind => bail!(Corrupt, "the log has a group of kind {kind}"),
            })
        })?;
        let [partial, recycled, prefix, dedup, is_cbor] = flags;
        let hash = if is_cbor { Hash::VllmCbor } else { Hash::Native };
        let tables = TablesConfig { block_size, groups, hash, prefix, dedup, watermark };
        Ok(BlockConfig { num_blocks, evictor, tables, root, partial, recycled })
    }
}
