//! The state of the recurrent layers of a sequence, and snapshots of it.
//!
//! A state changes with every token and cannot be cut, so it goes back only to where there is a
//! snapshot. Snapshots at the ends of blocks are kept with the prefix entries of these, and a prefix is
//! as long as its last entry with a state.

use std::fmt::Write;
use std::ptr::NonNull;

use super::Sequence;
use crate::block::EntryId;
use crate::block::prefix::Digest;
use crate::cache::{Cache, RecurrentState};
use crate::error::{Result, bail, ensure};

/// The state of a sequence, written in place, and its snapshots in the order in which they were taken.
#[derive(Debug)]
pub(super) struct Recurrent {
    state: RecurrentState,
    snapshots: Vec<Snapshot>,
}

/// The state after `num_tokens` tokens. Never written again.
#[derive(Debug, Clone, Copy)]
struct Snapshot {
    num_tokens: usize,
    state: RecurrentState,
}

impl Recurrent {
    /// A state of zeros; `None` for a cache without recurrent layers.
    pub(super) fn new(cache: &Cache) -> Result<Option<Self>> {
        let Some(config) = &cache.config().recurrent else { return Ok(None) };
        let state = cache.new_state()?;
        Ok(Some(Self { state, snapshots: Vec::with_capacity(config.max_snapshots) }))
    }

    pub(super) fn state(&self) -> &RecurrentState {
        &self.state
    }

    /// A copy of the state; snapshots are shared.
    pub(super) fn fork(&self, cache: &Cache) -> Result<Self> {
        let state = cache.copy_state(&self.state)?;
        cache.retain_states(self.snapshots.iter().map(|snapshot| snapshot.state));
        let mut snapshots = Vec::with_capacity(self.snapshots.capacity());
        snapshots.extend_from_slice(&self.snapshots);
        Ok(Self { state, snapshots })
    }

    /// Every state that is referred to.
    pub(super) fn into_states(self) -> impl Iterator<Item = RecurrentState> {
        self.snapshots.into_iter().map(|snapshot| snapshot.state).chain([self.state])
    }

    fn position(&self, num_tokens: usize) -> Option<usize> {
        self.snapshots.iter().position(|snapshot| snapshot.num_tokens == num_tokens)
    }
}

impl Sequence {
    /// The state of a recurrent layer, to read and write in place: its first byte and its bytes. It stays
    /// there until the sequence ends or is swapped out.
    pub fn recurrent_state(&self, layer: usize) -> Result<(NonNull<u8>, usize)> {
        let recurrent = self.recurrent()?;
        let Some(config) = self.cache.config().recurrent else {
            bail!(Internal, "a state without a configuration");
        };
        ensure!(
            layer < config.num_layers,
            InvalidArgument,
            "layer is {layer}, the model has {} recurrent layers",
            config.num_layers
        );
        Ok((recurrent.state.address(layer * config.stride()), config.bytes))
    }

    /// Keeps a copy of the state as the one after `num_tokens` tokens: committed ones and some, all or
    /// none of the reserved. Takes the place of one of that length, or of the oldest if there are as many
    /// as may be.
    pub fn snapshot(&mut self, num_tokens: usize) -> Result<()> {
        self.check_state_length(num_tokens)?;
        let limit = self.cache.config().recurrent.map_or(0, |config| config.max_snapshots);
        let recurrent = self.recurrent()?;
        let is_full = recurrent.snapshots.len() >= limit;
        let replaced = recurrent.position(num_tokens).or(is_full.then_some(0));
        let old = replaced.map(|place| recurrent.snapshots[place].state);
        let state = match old.filter(|old| self.cache.own_state(old)) {
            Some(own) => {
                self.cache.overwrite_state(&recurrent.state, &own)?;
                own
            }
            None => {
                let copy = self.cache.copy_state(&recurrent.state)?;
                self.cache.release_states(old);
                copy
            }
        };
        if let Some(recurrent) = &mut self.recurrent {
            replaced.map(|place| recurrent.snapshots.remove(place));
            recurrent.snapshots.push(Snapshot { num_tokens, state });
        }
        if num_tokens == self.committed {
            self.keep_snapshot(num_tokens);
        }
        Ok(())
    }

    /// Sets the state back to that after `num_tokens` tokens: committed ones and some, all or none of the
    /// reserved. No token is forgotten.
    pub fn restore(&mut self, num_tokens: usize) -> Result<()> {
        self.check_state_length(num_tokens)?;
        let is_found = self.roll_back_state(num_tokens)?;
        ensure!(is_found, InvalidState, "{}", self.no_snapshot(num_tokens));
        Ok(())
    }

    /// The tokens after which there are snapshots of the sequence's own, ascending.
    pub fn snapshots(&self) -> Vec<usize> {
        let own = self.recurrent.iter().flat_map(|recurrent| &recurrent.snapshots);
        let mut lengths: Vec<usize> = own.map(|snapshot| snapshot.num_tokens).collect();
        lengths.sort_unstable();
        lengths
    }

    /// Bytes of the state and its snapshots, shared ones included.
    pub fn state_bytes(&self) -> usize {
        self.recurrent.as_ref().map_or(0, |own| (1 + own.snapshots.len()) * own.state.len())
    }

    /// Whether the model has recurrent layers.
    pub fn has_state(&self) -> bool {
        self.cache.config().recurrent.is_some()
    }

    /// Refuses what would change the state without a way back to the committed tokens.
    pub fn ensure_snapshot(&self, what: &str) -> Result<()> {
        let len = self.committed;
        let is_known = !self.has_state() || self.find_snapshot(len).is_some();
        ensure!(is_known, InvalidState, "{what}: {}", self.no_snapshot(len));
        Ok(())
    }

    fn recurrent(&self) -> Result<&Recurrent> {
        self.ensure_present()?;
        match &self.recurrent {
            Some(recurrent) => Ok(recurrent),
            None => bail!(Unsupported, "the cache has no recurrent layers; set recurrent_layers"),
        }
    }

    fn check_state_length(&self, num_tokens: usize) -> Result<()> {
        self.recurrent()?;
        let (first, last) = (self.committed, self.committed + self.reserved);
        ensure!(
            (first..=last).contains(&num_tokens),
            InvalidArgument,
            "num_tokens is {num_tokens}, must be in {first}..={last}: the committed tokens and {} \
             reserved ones",
            self.reserved
        );
        Ok(())
    }

    fn no_snapshot(&self, num_tokens: usize) -> String {
        let mut text = format!("no snapshot of the state after {num_tokens} tokens is left");
        for (i, length) in self.snapshots().iter().enumerate() {
            _ = write!(text, "{}{length}", if i == 0 { "; there are those after " } else { ", " });
        }
        text
    }

    fn find_snapshot(&self, num_tokens: usize) -> Option<RecurrentState> {
        let recurrent = self.recurrent.as_ref()?;
        Some(recurrent.snapshots[recurrent.position(num_tokens)?].state)
    }

    /// The entry whose tokens are the first `num_tokens`.
    fn entry_at(&self, num_tokens: usize) -> Option<(usize, EntryId)> {
        let block_size = self.cache.config().block_size;
        let chunk = (num_tokens / block_size).checked_sub(1)?;
        let is_end = num_tokens.is_multiple_of(block_size);
        self.entries.get(chunk).filter(|_| is_end).map(|entry| (chunk, *entry))
    }
}

/// What happens to the state when tokens come and go.
impl Sequence {
    /// Sets the state to what it was after `num_tokens` tokens, if that is known: from a snapshot, from
    /// the prefix, or zeros before the first. Answers whether it was.
    fn roll_back_state(&self, num_tokens: usize) -> Result<bool> {
        let Some(recurrent) = &self.recurrent else { return Ok(true) };
        if let Some(snapshot) = self.find_snapshot(num_tokens) {
            self.cache.overwrite_state(&snapshot, &recurrent.state)?;
            return Ok(true);
        }
        if num_tokens == 0 {
            self.cache.clear_state(&recurrent.state)?;
            return Ok(true);
        }
        match self.entry_at(num_tokens) {
            Some((_, entry)) => self.take_kept_state(entry),
            None => Ok(false),
        }
    }

    /// Before `num_tokens` tokens are left of the committed and reserved ones: sets the state back.
    /// Refuses if committed tokens go and nobody knows it. What reserved tokens did to it the engine
    /// knows best, so without a snapshot it stays; but who takes snapshots of drafts relies on them.
    pub(super) fn shorten_state(&self, num_tokens: usize) -> Result<()> {
        let is_known = self.roll_back_state(num_tokens)?;
        let own = self.recurrent.iter().flat_map(|recurrent| &recurrent.snapshots);
        let has_drafts = || own.clone().any(|snapshot| snapshot.num_tokens > self.committed);
        ensure!(
            is_known || num_tokens >= self.committed && !has_drafts(),
            InvalidState,
            "num_tokens is {num_tokens}: {}",
            self.no_snapshot(num_tokens)
        );
        Ok(())
    }

    /// Forgets snapshots of more than `num_tokens` tokens.
    pub(super) fn drop_snapshots_after(&mut self, num_tokens: usize) {
        let Some(recurrent) = &mut self.recurrent else { return };
        let cache = &self.cache;
        recurrent.snapshots.retain(|snapshot| {
            let stays = snapshot.num_tokens <= num_tokens;
            if !stays {
                cache.release_states([snapshot.state]);
            }
            stays
        });
    }

    /// Keeps the snapshot after `num_tokens` committed tokens with the entry of these, if both are there.
    pub(super) fn keep_snapshot(&self, num_tokens: usize) {
        let (Some(state), Some((chunk, entry))) =
            (self.find_snapshot(num_tokens), self.entry_at(num_tokens))
        else {
            return;
        };
        self.cache.keep_state(entry, &self.digests[chunk], &state);
    }

    /// Copies the state of a held entry, if it has one, over that of the sequence.
    fn take_kept_state(&self, entry: EntryId) -> Result<bool> {
        let Some(recurrent) = &self.recurrent else { return Ok(false) };
        let Some(kept) = self.cache.kept_state(entry) else { return Ok(false) };
        let copied = self.cache.overwrite_state(&kept, &recurrent.state);
        self.cache.release_states([kept]);
        copied.map(|()| true)
    }

    /// Cuts what was matched to the longest prefix with a state, which becomes that of the sequence;
    /// `fetch` may bring a state to an entry that has none. Without one nothing stays.
    pub fn settle_match(
        &mut self,
        fetch: &mut dyn FnMut(EntryId, &Digest) -> bool,
    ) -> Result<usize> {
        if !self.has_state() {
            return Ok(self.committed);
        }
        let mut chunks = self.entries.len();
        while chunks > 0 {
            let (entry, digest) = (self.entries[chunks - 1], self.digests[chunks - 1]);
            let mut taken = self.take_kept_state(entry);
            if taken == Ok(false) && fetch(entry, &digest) {
                taken = self.take_kept_state(entry);
            }
            match taken {
                Ok(true) => break,
                Ok(false) => chunks -= 1,
                Err(error) => {
                    self.truncate_rows(0);
                    return Err(error);
                }
            }
        }
        self.truncate_rows(chunks * self.cache.config().block_size);
        Ok(self.committed)
    }
}
