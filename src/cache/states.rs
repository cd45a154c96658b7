//! States of recurrent layers: slots of one size, beside the blocks and with memory of their own.
//!
//! ```text
//! free --new, copy--> used --last release--> free
//!                      |  ^
//!                 keep v  | find
//!                     used and kept --last release--> idle --reclaim, or with its entry--> free
//! ```
//!
//! A state is written in place by the sequence that owns it, or it is a snapshot: never written again,
//! and shared by count. A prefix entry may keep the snapshot of its last token. States that only entries
//! refer to are idle; the one found least recently is reclaimed when none is free, without its entry.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::{BlockView, Cache, CacheConfig, device};
use crate::block::prefix::Digest;
use crate::block::{BlockId, EntryId};
use crate::device::cuda::DeviceMemory;
use crate::device::host::{Arena, HUGE_PAGE, page_size};
use crate::error::{Result, bail, ensure};

/// States of a layer start at multiples of this.
const STATE_ALIGNMENT: usize = 64;

/// Snapshots of a sequence if the configuration does not say.
pub const DEFAULT_SNAPSHOTS: usize = 4;

/// Free slots that keep their pages, because a step of drafts takes and frees a few. Others go back to
/// the system, so that the accounting is what the process holds.
const WARM: usize = 8;

/// The recurrent layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentConfig {
    /// Layers with a state, 1 to 4096, numbered apart from those with keys and values.
    pub num_layers: usize,
    /// Bytes of the state of a layer, at least 1.
    pub bytes: usize,
    /// States over all sequences, their snapshots and the prefix index, 1 to 2^20.
    pub num_states: usize,
    /// Snapshots of a sequence at most, 1 to 1024.
    pub max_snapshots: usize,
}

/// A state: its name and its bytes, those of all layers.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentState {
    id: u32,
    view: BlockView,
}

/// What a cache holds of states. Bytes are whole pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateStats {
    /// States that there can be.
    pub num_states: u64,
    /// States that nobody refers to.
    pub free_states: u64,
    /// States of sequences, snapshots included.
    pub used_states: u64,
    /// States that only the prefix index refers to.
    pub idle_states: u64,
    /// Bytes of used states.
    pub bytes_used: u64,
    /// Bytes of idle states.
    pub bytes_idle: u64,
    /// Bytes taken from the system.
    pub bytes_committed: u64,
    /// Largest `bytes_used` since creation or the last reset.
    pub bytes_peak: u64,
}

/// The slots, who refers to them and what is kept of which prefix.
#[derive(Debug)]
pub(super) struct States {
    region: Region,
    slot_bytes: usize,
    records: Vec<Record>,
    /// Free slots with pages, the one freed last at the back.
    warm: VecDeque<u32>,
    /// Free slots without.
    cold: Vec<u32>,
    /// From the first block of an entry to the state after its last token.
    kept: HashMap<u32, u32>,
    /// Idle states in the order in which they became so.
    idle: BTreeMap<u64, u32>,
    clock: u64,
    peak: usize,
}

#[derive(Debug)]
enum Region {
    Host(Arena),
    Device(Arc<DeviceMemory>),
}

#[derive(Debug, Clone, Default)]
struct Record {
    /// References, that of an entry included.
    refs: u32,
    /// When it became idle: its place in the order.
    idle_since: u64,
    entry: Option<Kept>,
}

/// The entry that keeps a state.
#[derive(Debug, Clone, Copy)]
struct Kept {
    head: u32,
    digest: Digest,
}

impl RecurrentConfig {
    /// Checks every documented range.
    pub(super) fn validate(&self) -> Result<()> {
        let Self { num_layers, bytes, num_states, max_snapshots } = *self;
        let limits = [
            ("recurrent_layers", num_layers, 4096),
            ("recurrent_bytes", bytes, u32::MAX as usize),
            ("num_states", num_states, 1 << 20),
            ("recurrent_snapshots", max_snapshots, 1024),
        ];
        for (name, value, limit) in limits {
            ensure!(
                (1..=limit).contains(&value),
                InvalidArgument,
                "{name} is {value}, must be in 1..={limit} for a model with recurrent layers"
            );
        }
        ensure!(
            u32::try_from(self.slot_bytes()).is_ok(),
            InvalidArgument,
            "recurrent_bytes is {bytes}: the states of {num_layers} layers must be less than 4 GiB"
        );
        Ok(())
    }

    /// Bytes from the state of a layer to that of the next.
    pub fn stride(&self) -> usize {
        self.bytes.next_multiple_of(STATE_ALIGNMENT)
    }

    /// Bytes of the states of all layers: whole pages.
    pub fn slot_bytes(&self) -> usize {
        (self.num_layers * self.stride()).next_multiple_of(page_size())
    }
}

impl RecurrentState {
    /// Bytes as allocated.
    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// Always false: a state has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.view.is_empty()
    }

    /// The address of the byte at `offset`: of the host, or of the cache's device.
    pub fn address(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len(), "offset {offset} outside a state of {} bytes", self.len());
        self.view.address().map_addr(|address| address.saturating_add(offset))
    }
}

impl States {
    /// Slots for what the model needs; `None` without recurrent layers.
    pub(super) fn new(config: &CacheConfig) -> Result<Option<Self>> {
        let Some(recurrent) = &config.recurrent else { return Ok(None) };
        let (count, slot_bytes) = (recurrent.num_states, recurrent.slot_bytes());
        let bytes = count.saturating_mul(slot_bytes);
        let region = match &config.device {
            Some(device) => Region::Device(Arc::new(DeviceMemory::allocate(&device.gpu, bytes)?)),
            None if slot_bytes >= HUGE_PAGE => Region::Host(Arena::reserve_huge(bytes)?),
            None => Region::Host(Arena::reserve(bytes)?),
        };
        Ok(Some(Self {
            region,
            slot_bytes,
            records: vec![Record::default(); count],
            warm: VecDeque::with_capacity(WARM + 1),
            cold: (0..count as u32).rev().collect(),
            kept: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            peak: 0,
        }))
    }

    fn state(&self, id: u32) -> RecurrentState {
        let offset = id as usize * self.slot_bytes;
        let view = match &self.region {
            Region::Host(arena) => BlockView::new(arena.address(offset), self.slot_bytes, 0),
            Region::Device(memory) => {
                let address = memory.address() as usize + offset;
                let address = NonNull::new(std::ptr::without_provenance_mut(address));
                BlockView::on_device(address.unwrap_or(NonNull::dangling()), self.slot_bytes, 0)
            }
        };
        RecurrentState { id, view }
    }

    fn used(&self) -> usize {
        self.records.len() - self.warm.len() - self.cold.len() - self.idle.len()
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(self.used());
    }

    fn has_room(&self) -> bool {
        self.used() < self.records.len()
    }

    /// A free slot with one reference, and whether it is zero.
    fn take_free(&mut self) -> Option<(u32, bool)> {
        let (id, is_zero) = match self.warm.pop_back() {
            Some(id) => (id, false),
            None => (self.cold.pop()?, matches!(self.region, Region::Host(_))),
        };
        self.records[id as usize].refs = 1;
        self.note_peak();
        Some((id, is_zero))
    }

    /// Takes the state that was idle for longest from its entry, with the entry's reference. Answers
    /// what it was the state of as well.
    fn take_idle(&mut self) -> Option<(u32, Digest)> {
        let id = *self.idle.first_key_value()?.1;
        let kept = self.records[id as usize].entry?;
        self.detach(kept.head);
        self.note_peak();
        Some((id, kept.digest))
    }

    /// Takes the state of an entry from it, with the entry's reference.
    fn detach(&mut self, head: u32) -> Option<u32> {
        let id = self.kept.remove(&head)?;
        self.leave_idle(id);
        self.records[id as usize].entry = None;
        Some(id)
    }

    /// Before a reference is added to a state, or its entry lets go of it.
    fn leave_idle(&mut self, id: u32) {
        let record = &self.records[id as usize];
        if record.refs == 1 && record.entry.is_some() {
            self.idle.remove(&record.idle_since);
        }
    }

    fn retain(&mut self, id: u32) {
        self.leave_idle(id);
        self.records[id as usize].refs += 1;
        self.note_peak();
    }

    fn release(&mut self, id: u32) {
        let record = &mut self.records[id as usize];
        record.refs -= 1;
        if record.refs == 1 && record.entry.is_some() {
            record.idle_since = self.clock;
            self.idle.insert(self.clock, id);
            self.clock += 1;
        }
        if self.records[id as usize].refs == 0 {
            self.free(id);
        }
    }

    fn free(&mut self, id: u32) {
        let state = self.state(id);
        if cfg!(debug_assertions) && !state.view.is_on_device() {
            // Nobody may see the content of a recycled slot: make it obvious if somebody does.
            state.view.write(0..state.len()).fill(0xFF);
        }
        self.warm.push_back(id);
        if self.warm.len() > WARM
            && let Some(id) = self.warm.pop_front()
        {
            if let Region::Host(arena) = &self.region {
                arena.discard(id as usize * self.slot_bytes, self.slot_bytes);
            }
            self.cold.push(id);
        }
    }

    fn stats(&self) -> StateStats {
        let bytes = |states: usize| (states * self.slot_bytes) as u64;
        let free = self.warm.len() + self.cold.len();
        let held = match &self.region {
            Region::Host(_) => self.records.len() - self.cold.len(),
            Region::Device(_) => self.records.len(), // A device gives all at once.
        };
        StateStats {
            num_states: self.records.len() as u64,
            free_states: free as u64,
            used_states: self.used() as u64,
            idle_states: self.idle.len() as u64,
            bytes_used: bytes(self.used()),
            bytes_idle: bytes(self.idle.len()),
            bytes_committed: bytes(held),
            bytes_peak: bytes(self.peak),
        }
    }

    /// Checks every invariant; `find` tells the first block of an entry.
    fn check_integrity(&self, find: impl Fn(&Digest) -> Option<u32>) {
        let is_free = |id: &u32| self.records[*id as usize].refs == 0;
        assert!(self.warm.iter().chain(&self.cold).all(is_free), "a free state has references");
        let live = self.records.iter().filter(|record| record.refs > 0).count();
        assert_eq!(live, self.used() + self.idle.len(), "free states and references disagree");
        let is_idle = |record: &&Record| record.refs == 1 && record.entry.is_some();
        assert_eq!(self.records.iter().filter(is_idle).count(), self.idle.len());
        let num_kept = self.records.iter().filter(|record| record.entry.is_some()).count();
        assert_eq!(num_kept, self.kept.len());
        for (head, id) in &self.kept {
            let entry =
                self.records[*id as usize].entry.map(|kept| (kept.head, find(&kept.digest)));
            assert_eq!(entry, Some((*head, Some(*head))), "a state outlived its entry");
        }
    }
}

/// States of sequences.
impl Cache {
    /// A state of zeros with one reference. Reclaims an idle one if none is free.
    pub fn new_state(&self) -> Result<RecurrentState> {
        let (state, is_zero) = self.take_state()?;
        if !is_zero && let Err(error) = self.clear_state(&state) {
            self.release_states([state]);
            return Err(error);
        }
        Ok(state)
    }

    /// A copy of a state, with one reference.
    pub fn copy_state(&self, source: &RecurrentState) -> Result<RecurrentState> {
        let (state, _) = self.take_state()?;
        if let Err(error) = self.overwrite_state(source, &state) {
            self.release_states([state]);
            return Err(error);
        }
        Ok(state)
    }

    /// Copies the bytes of a state over those of one that only the caller refers to.
    pub fn overwrite_state(&self, source: &RecurrentState, target: &RecurrentState) -> Result<()> {
        if let Some(memory) = self.state_memory()? {
            let _entered = memory.gpu().enter()?;
            memory.gpu().ensure_not_capturing("copy states")?;
            let [from, to] = [source, target].map(|state| device::address(&state.view));
            return memory.copy_within(from, to, target.len());
        }
        target.view.write(0..target.len()).copy_from_slice(source.view.bytes());
        Ok(())
    }

    /// Makes a state zero that only the caller refers to.
    pub fn clear_state(&self, state: &RecurrentState) -> Result<()> {
        if let Some(memory) = self.state_memory()? {
            let _entered = memory.gpu().enter()?;
            memory.gpu().ensure_not_capturing("make states")?;
            let offset = (device::address(&state.view) - memory.address()) as usize;
            return memory.clear(offset, state.len());
        }
        state.view.write(0..state.len()).fill(0);
        Ok(())
    }

    /// The bytes of a state; from a device they are fetched, which waits for all queued work.
    pub fn state_bytes<'a>(&self, state: &'a RecurrentState) -> Result<Cow<'a, [u8]>> {
        device::fetch(self.state_memory()?.as_deref(), &state.view)
    }

    /// Lets `fill` write the bytes of a state that only the caller refers to.
    pub fn fill_state(
        &self,
        state: &RecurrentState,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        device::replace(self.state_memory()?.as_deref(), &state.view, fill)
    }

    /// Adds a reference to each state.
    pub fn retain_states(&self, states: impl IntoIterator<Item = RecurrentState>) {
        let Some(pool) = &self.states else { return };
        let mut pool = pool.lock();
        states.into_iter().for_each(|state| pool.retain(state.id));
    }

    /// Drops a reference to each state.
    pub fn release_states(&self, states: impl IntoIterator<Item = RecurrentState>) {
        let Some(pool) = &self.states else { return };
        let mut pool = pool.lock();
        states.into_iter().for_each(|state| pool.release(state.id));
    }

    /// Whether the caller, who refers to `state`, may write to it because nobody else does. A prefix gives
    /// way if there is no other state to write to.
    pub fn own_state(&self, state: &RecurrentState) -> bool {
        let Some(pool) = &self.states else { return false };
        let mut pool = pool.lock();
        let Record { refs, entry, .. } = pool.records[state.id as usize].clone();
        let Some(kept) = entry.filter(|_| refs == 2 && !pool.has_room()) else { return refs == 1 };
        pool.detach(kept.head);
        drop(pool);
        self.offload_state(&kept.digest, state);
        self.release_states([*state]);
        true
    }

    fn pool(&self) -> Result<MutexGuard<'_, States>> {
        match &self.states {
            Some(pool) => Ok(pool.lock()),
            None => bail!(Unsupported, "the cache has no recurrent layers; set recurrent_layers"),
        }
    }

    /// The memory of states on a device.
    fn state_memory(&self) -> Result<Option<Arc<DeviceMemory>>> {
        Ok(match &self.pool()?.region {
            Region::Host(_) => None,
            Region::Device(memory) => Some(memory.clone()),
        })
    }

    /// A state with one reference, and whether it is zero.
    fn take_state(&self) -> Result<(RecurrentState, bool)> {
        let mut pool = self.pool()?;
        if let Some((id, is_zero)) = pool.take_free() {
            return Ok((pool.state(id), is_zero));
        }
        let Some((id, digest)) = pool.take_idle() else {
            let num_states = pool.records.len();
            bail!(OutOfBlocks, "need 1 state, none of {num_states} is free and none is idle");
        };
        let state = pool.state(id);
        drop(pool);
        self.offload_state(&digest, &state);
        Ok((state, false))
    }
}

/// States of prefixes.
impl Cache {
    /// Keeps `state` with `entry`, which the caller holds and which is that of `digest`, unless it has
    /// one already.
    pub fn keep_state(&self, entry: EntryId, digest: &Digest, state: &RecurrentState) {
        let Some(pool) = &self.states else { return };
        let mut pool = pool.lock();
        // A state belongs to one entry, so that it goes with it.
        if pool.kept.contains_key(&entry.0) || pool.records[state.id as usize].entry.is_some() {
            return;
        }
        pool.retain(state.id);
        pool.kept.insert(entry.0, state.id);
        pool.records[state.id as usize].entry = Some(Kept { head: entry.0, digest: *digest });
    }

    /// The state that is kept with `entry`, which the caller holds, with a reference.
    pub fn kept_state(&self, entry: EntryId) -> Option<RecurrentState> {
        let mut pool = self.states.as_ref()?.lock();
        let id = *pool.kept.get(&entry.0)?;
        pool.retain(id);
        Some(pool.state(id))
    }

    /// Whether the prefix `digest` has an entry, and whether that keeps a state.
    pub fn knows(&self, digest: &Digest) -> (bool, bool) {
        let Some(entry) = self.state.read().pool.lookup(digest) else { return (false, false) };
        let has_state = |pool: &Mutex<States>| pool.lock().kept.contains_key(&entry.0);
        (true, self.states.as_ref().is_some_and(has_state))
    }

    /// What is done with the state of an entry that is being reclaimed.
    pub(super) fn drop_kept(&self, head: BlockId, digest: &Digest) {
        let Some(pool) = &self.states else { return };
        let taken = {
            let mut pool = pool.lock();
            pool.detach(head.0).map(|id| pool.state(id))
        };
        if let Some(state) = taken {
            self.offload_state(digest, &state);
            self.release_states([state]);
        }
    }

    fn offload_state(&self, digest: &Digest, state: &RecurrentState) {
        let Some(offload) = self.offload.lock().clone() else { return };
        // What cannot be fetched from a device is lost, as it would be without a store.
        if let Ok(bytes) = self.state_bytes(state) {
            offload.offload_state(digest, &bytes);
        }
    }

    /// What the cache holds of states; zeros without recurrent layers.
    pub fn state_stats(&self) -> StateStats {
        self.states.as_ref().map_or_else(StateStats::default, |pool| pool.lock().stats())
    }

    pub(super) fn reset_state_peak(&self) {
        if let Some(pool) = &self.states {
            let mut pool = pool.lock();
            pool.peak = pool.used();
        }
    }

    pub(super) fn check_states(&self, find: impl Fn(&Digest) -> Option<u32>) {
        if let Some(pool) = &self.states {
            pool.lock().check_integrity(find);
        }
    }
}
