//! What queries give the rows of a sequence on a device: a kernel adds it up there as attention runs, and the
//! host fetches it before rows move. Rows that go leave nothing behind for those that come after them.
//!
//! ```text
//! sums = [layer, kv_head, rows], f32: what came since the host has fetched them
//! ```

use std::sync::Arc;

use parking_lot::Mutex;

use crate::device::cuda::{DeviceMemory, Gpu};
use crate::error::Result;

/// Memory for a sum for each row of each head.
#[derive(Debug)]
pub struct RowSums {
    memory: DeviceMemory,
    rows: usize,
}

impl RowSums {
    /// Where it starts.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Rows of a head that there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// The sums of a sequence.
#[derive(Debug)]
pub(super) struct NotedSums {
    gpu: Arc<Gpu>,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// Taken when the first query is noted.
    held: Option<Arc<RowSums>>,
    heads: Vec<HeadSums>,
}

/// Sums of one head.
#[derive(Debug, Clone, Copy, Default)]
struct HeadSums {
    /// Rows whose sum may differ from 0.
    rows: usize,
    /// Of them, those that have not been dropped since.
    live: usize,
}

impl NotedSums {
    pub(super) fn new(gpu: &Arc<Gpu>, num_heads: usize) -> Self {
        let state = State { held: None, heads: vec![HeadSums::default(); num_heads] };
        Self { gpu: gpu.clone(), state: Mutex::new(state) }
    }

    /// Everything once more, apart from the original. Queues a copy.
    pub(super) fn fork(&self) -> Result<Self> {
        let mut state = self.state.lock().clone();
        if let Some(held) = &state.held {
            let memory = held.memory.duplicate()?;
            state.held = Some(Arc::new(RowSums { memory, rows: held.rows }));
        }
        Ok(Self { gpu: self.gpu.clone(), state: Mutex::new(state) })
    }

    /// Whether there is room for so many rows of a head.
    pub(super) fn has_room(&self, rows: usize) -> bool {
        self.state.lock().held.as_ref().is_some_and(|held| held.rows >= rows)
    }

    /// The memory for what comes, when heads have these numbers of rows. If there is no room, what is there
    /// must have been fetched. Queues zeros where rows have gone.
    pub(super) fn prepare(&self, lens: &[usize]) -> Result<Arc<RowSums>> {
        let mut state = self.state.lock();
        let _entered = self.gpu.enter()?;
        let most = lens.iter().copied().max().unwrap_or(0);
        let held = match state.held.take().filter(|held| held.rows >= most) {
            Some(held) => held,
            None => {
                let rows = most.max(64).next_power_of_two();
                let bytes = lens.len() * rows * 4;
                let memory = DeviceMemory::reuse(&self.gpu, bytes)?;
                memory.clear(0, bytes)?;
                state.heads.fill(HeadSums::default());
                Arc::new(RowSums { memory, rows })
            }
        };
        state.held = Some(held.clone());
        for (i, (head, len)) in state.heads.iter_mut().zip(lens).enumerate() {
            if head.live < head.rows {
                let (first, rows) = (i * held.rows + head.live, head.rows - head.live);
                held.memory.clear(4 * first, 4 * rows)?;
            }
            *head = HeadSums { rows: *len, live: *len };
        }
        Ok(held)
    }

    /// Only the first `len` rows of a head are left.
    pub(super) fn truncate(&self, head: usize, len: usize) {
        let live = &mut self.state.lock().heads[head].live;
        *live = len.min(*live);
    }

    /// Hands what rows have received since the last time to `add`, head by head, and starts anew. Waits for all
    /// queued work if there is something.
    pub(super) fn take(&self, mut add: impl FnMut(usize, &[f32])) -> Result<()> {
        let mut state = self.state.lock();
        let has_any = state.heads.iter().any(|head| head.rows > 0);
        let Some(held) = state.held.clone().filter(|_| has_any) else { return Ok(()) };
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("run policies")?;
        let mut bytes = vec![0; held.memory.len()];
        held.memory.read(held.address(), &mut bytes)?;
        held.memory.clear(0, bytes.len())?;
        let mut rows = Vec::new();
        for (i, head) in state.heads.iter_mut().enumerate() {
            let words = bytes[4 * i * held.rows..].chunks_exact(4).take(head.live);
            rows.clear();
            rows.extend(words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])));
            add(i, &rows);
            *head = HeadSums::default();
        }
        Ok(())
    }
}
