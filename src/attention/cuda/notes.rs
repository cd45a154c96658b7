//! Where the queries of a plan are noted, for policies that ask for the last of them.

use std::sync::Arc;

use super::workspace::NOTE_WORDS;
use crate::device::cuda::params::NoteQueries;
use crate::device::cuda::{DeviceTensor, Gpu, Kernel};
use crate::error::Result;
use crate::sequence::{QueryRing, Sequence};

/// Threads of the kernel.
const THREADS: usize = 256;

/// What a plan notes. Buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Loaded when a plan needs it.
    kernel: Option<Kernel>,
    /// `KvmNote` of each token; empty if nothing is noted.
    pub(super) words: Vec<u32>,
    /// They stay as long as the plan does.
    rings: Vec<Arc<QueryRing>>,
}

impl Notes {
    /// Notes the last queries of sequences that want them.
    pub(super) fn plan(&mut self, gpu: &Gpu, batch: &[(&Sequence, usize)]) -> Result<()> {
        self.words.clear();
        self.rings.clear();
        let num_tokens: usize = batch.iter().map(|(_, n)| *n).sum();
        let mut token = 0;
        for (sequence, n) in batch {
            let end = sequence.num_tokens() + sequence.num_reserved();
            let ring = sequence.observation().map_or(Ok(None), |seen| seen.ring_for(*n, end))?;
            if let Some((ring, newest)) = ring {
                self.words.resize(num_tokens * NOTE_WORDS, 0);
                let (address, capacity) = (ring.address(), ring.capacity() as u32);
                let last = &mut self.words[(token + n - newest) * NOTE_WORDS..];
                for (note, i) in last.chunks_exact_mut(NOTE_WORDS).zip(0..newest) {
                    let position = (end - newest + i) as u32;
                    let words = [address as u32, (address >> 32) as u32, position, capacity];
                    note.copy_from_slice(&words);
                }
                self.rings.push(ring);
            }
            token += n;
        }
        if self.has_any() && self.kernel.is_none() {
            self.kernel = Some(gpu.kernel("kvm_note_queries", THREADS as u32, 0)?);
        }
        Ok(())
    }

    /// Whether the plan notes a query.
    pub(super) fn has_any(&self) -> bool {
        !self.words.is_empty()
    }

    /// Queues the notes of a layer, whose logits are `scale * q . k`. `notes` is the address of the words.
    /// The context is current.
    pub(super) fn launch(
        &self,
        gpu: &Gpu,
        layer: usize,
        query: &DeviceTensor,
        notes: u64,
        scale: f32,
    ) -> Result<()> {
        let Some(kernel) = self.kernel.as_ref().filter(|_| self.has_any()) else { return Ok(()) };
        let [num_tokens, num_heads, dim] = query.shape.map(|n| n as u32);
        let params = NoteQueries {
            q: query.address,
            notes,
            q_token: query.strides[0] as i64,
            q_head: query.strides[1] as i64,
            num_tokens,
            num_heads,
            dim,
            layer: layer as u32,
            // Policies divide by the root of the dimension whatever a layer does.
            factor: scale * (dim as f32).sqrt(),
        };
        let chunks = query.shape.iter().product::<usize>() / 8;
        let grid = chunks.div_ceil(THREADS).clamp(1, gpu.num_sms() as usize * 8);
        gpu.launch(kernel, grid as u32, &params)
    }
}
