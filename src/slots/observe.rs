//! Sequences as the mask shows them, and the policy that acts on them.
//!
//! The engine tells for each query which slot its own token has. Query `b` continues the sequence
//! of query `a` if it sees the slot of `a`; a batch continues a sequence of an earlier batch if its
//! first query sees the last slot of it, or, if that was a token and drafts of what follows, the slot
//! of the token. That is all there is: no ids, no ends.
//!
//! A prompt ends when a sequence goes on with a single query, or with drafts: a short batch after a
//! short batch, or after one of which something was rejected. Only then, before these queries attend,
//! the prefill phase of the policy runs; with `pieces` it runs before each further piece as well, and
//! [`Slots::settle`] makes it run at once.

use std::collections::HashSet;

use super::{Lane, SlotState, Slots, SlotsConfig, Stream, check_shape};
use crate::device::tensor::Tensor;
use crate::error::{Result, ensure};
use crate::policy::{Event, HeadInput, LayerInput, LayerSource};
use crate::quantizer::Side;
use crate::shape::Needs;

/// Sequences remembered for a stream; the oldest is forgotten first.
const MAX_TRACKED: usize = 256;

/// Most queries of a batch that may be a token and drafts. A longer one is a prompt.
const MAX_DRAFTS: usize = 17;

/// A sequence that may go on.
#[derive(Debug, Clone, Default)]
pub(super) struct Tracked {
    /// Slots and their ages, of the last batch if it may be drafts, otherwise of its last token alone.
    /// Another age means another token.
    recent: Vec<(u32, u32)>,
    /// Whether the policy waits for the end of a prompt.
    is_prompt: bool,
    /// The slots that the last query of a prompt saw.
    seen: Vec<u32>,
    steps: usize,
    /// The last queries, oldest first, `[num_q_heads, key_dim]` each.
    queries: Vec<Box<[f32]>>,
}

/// Queries of a batch that belong to one sequence.
struct Chain {
    /// Indices of its queries, ascending.
    queries: Vec<usize>,
    tracked: Option<Tracked>,
}

/// One layer of one sequence, decoded for the policy.
struct Decoded<'a> {
    config: &'a SlotsConfig,
    sequence_len: usize,
    heads: Vec<DecodedHead>,
}

#[derive(Default)]
struct DecodedHead {
    positions: Vec<i32>,
    /// Slots of the positions.
    slots: Vec<u32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    num_queries: usize,
}

impl Slots {
    /// Tells the policy about a batch whose keys and values have been written and that has not
    /// attended yet: queries `[queries, num_q_heads, key_dim]`, the mask as for attention, and the
    /// slot of each query's token. Runs the policy where it is due.
    pub fn observe(
        &mut self,
        stream: usize,
        query: &Tensor<'_>,
        mask: &Tensor<'_>,
        slots: &[u32],
    ) -> Result<()> {
        self.check_stream(stream, "stream")?;
        self.check_slots(slots)?;
        let SlotsConfig { num_slots, num_q_heads, key_dim, .. } = self.config;
        check_shape("query", query.shape(), [slots.len(), num_q_heads, key_dim])?;
        let [rows, _, span] = mask.shape();
        ensure!(
            rows == slots.len() && span <= num_slots,
            InvalidArgument,
            "mask is of {rows} queries and {span} slots, must be of {} and at most {num_slots}",
            slots.len()
        );
        for (i, slot) in slots.iter().enumerate() {
            let (owner, slot) = self.locate(*slot);
            ensure!(
                owner == stream && slot < span,
                InvalidArgument,
                "slots[{i}] is not among the {span} visible slots of stream {stream}"
            );
        }
        if !self.policy.acts_on(Event::PrefillEnd) && !self.policy.acts_on(Event::Step) {
            return Ok(());
        }
        let local: Vec<u32> = slots.iter().map(|slot| slot % num_slots as u32).collect();
        let mut chains = chains(&mut self.streams[stream], mask, &local);
        for i in 0..chains.len() {
            if let Err(error) = self.follow(stream, &mut chains[i], query, mask, &local) {
                // Those that did not go on can do so later.
                let rest = chains[i..].iter_mut().filter_map(|chain| chain.tracked.take());
                self.streams[stream].tracked.extend(rest);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Runs the policy of one sequence if it is due, and remembers where the sequence is now. If the policy
    /// fails, the sequence is where it was.
    fn follow(
        &mut self,
        stream: usize,
        chain: &mut Chain,
        query: &Tensor<'_>,
        mask: &Tensor<'_>,
        slots: &[u32],
    ) -> Result<()> {
        let (len, first) = (chain.queries.len(), chain.queries[0]);
        let may_draft = chain.tracked.is_some() && len <= MAX_DRAFTS;
        let mut is_answer = len == 1;
        if let Some(tracked) = &mut chain.tracked {
            let stays = |(slot, age): &(u32, u32)| {
                sees(mask, first, *slot) && self.streams[stream].age(*slot as usize) == *age
            };
            let rejected = tracked.recent.iter().filter(|recent| !stays(recent)).count();
            let gone = tracked.queries.split_off(tracked.queries.len().saturating_sub(rejected));
            let was_short = tracked.recent.len() > 1;
            is_answer |= may_draft && (!tracked.is_prompt || was_short || rejected > 0);
            let event = match tracked.is_prompt {
                true => Event::PrefillEnd,
                false => Event::Step,
            };
            let step = usize::from(is_answer && event == Event::Step);
            tracked.steps += step;
            if (self.policy.acts_on(event)
                && (is_answer || tracked.is_prompt && self.config.pieces))
                && let Err(error) = self.run(stream, event, tracked, visible(mask, first, slots))
            {
                tracked.steps -= step;
                tracked.queries.extend(gone);
                return Err(error);
            }
        }
        let mut tracked = chain.tracked.take().unwrap_or_default();
        tracked.is_prompt = !is_answer;
        self.note_queries(&mut tracked, &chain.queries, query);
        tracked.seen.clear();
        if !is_answer && let Some(last) = chain.queries.last() {
            tracked.seen = visible(mask, *last, &[]);
        }
        let stream = &mut self.streams[stream];
        let recent = if may_draft { &chain.queries[..] } else { &chain.queries[len - 1..] };
        let slots = recent.iter().map(|i| slots[*i]);
        tracked.recent = slots.map(|slot| (slot, stream.age(slot as usize))).collect();
        if stream.tracked.len() >= MAX_TRACKED {
            stream.tracked.remove(0);
        }
        stream.tracked.push(tracked);
        Ok(())
    }

    /// Keeps the last queries of a sequence, as many as the policy looks at.
    fn note_queries(&self, tracked: &mut Tracked, batch: &[usize], query: &Tensor<'_>) {
        let SlotsConfig { num_q_heads, key_dim, .. } = self.config;
        let window = match tracked.is_prompt {
            true => self.policy.query_window(),
            false => self.policy.step_query_window(),
        };
        let newest = &batch[batch.len().saturating_sub(window)..];
        let excess = (tracked.queries.len() + newest.len()).saturating_sub(window);
        tracked.queries.drain(..excess);
        for i in newest {
            let mut row = vec![0.0; num_q_heads * key_dim];
            for (head, out) in row.chunks_exact_mut(key_dim).enumerate() {
                query.read(*i, head, out);
            }
            tracked.queries.push(row.into());
        }
    }

    /// Runs the policy at once where it waits for the end of a prompt among whose tokens is one of
    /// `slots`: what is saved of them does not say that the policy has yet to run.
    pub fn settle(&mut self, slots: &[u32]) -> Result<()> {
        self.check_slots(slots)?;
        if !self.policy.acts_on(Event::PrefillEnd) {
            return Ok(());
        }
        let slots: HashSet<u32> = slots.iter().copied().collect();
        for stream in 0..self.streams.len() {
            self.streams[stream].forget_replaced();
            let base = (stream * self.config.num_slots) as u32;
            let waits = |tracked: &Tracked| {
                let is_in = |slot: &u32| slots.contains(&(base + slot));
                tracked.is_prompt && tracked.seen.iter().any(is_in)
            };
            let mut tracked = std::mem::take(&mut self.streams[stream].tracked);
            let mut result = Ok(());
            for tracked in tracked.iter_mut().filter(|tracked| waits(tracked)) {
                result = self.run(stream, Event::PrefillEnd, tracked, tracked.seen.clone());
                if result.is_err() {
                    break;
                }
                tracked.seen = Vec::new();
                tracked.is_prompt = false;
            }
            self.streams[stream].tracked = tracked;
            result?;
        }
        Ok(())
    }

    /// Runs the policy on the tokens in the slots `visible`.
    fn run(
        &mut self,
        stream: usize,
        event: Event,
        tracked: &Tracked,
        mut visible: Vec<u32>,
    ) -> Result<()> {
        visible.sort_by_key(|slot| self.streams[stream].age(*slot as usize));
        let lanes = &self.streams[stream].lanes;
        let is_live = |lane: &Lane, slot: u32| lane.state(slot as usize) == SlotState::Live;
        let held = |lane| visible.iter().filter(|slot| is_live(lane, **slot)).count();
        let longest = lanes.iter().map(held).max().unwrap_or(0);
        if !self.policy.is_due(event, tracked.steps, longest, visible.len()) {
            return Ok(());
        }
        let heads = (0..lanes.len()).map(|head| self.decode(stream, head, &visible, tracked));
        let mut source =
            Decoded { config: &self.config, sequence_len: visible.len(), heads: heads.collect() };
        let kept = self.policy.select(event, &mut source)?;
        let heads = source.heads;
        for (head, (decoded, keep)) in heads.iter().zip(&kept[0]).enumerate() {
            let mut stays = vec![false; decoded.slots.len()];
            keep.iter().for_each(|i| stays[i] = true);
            let gone = decoded.slots.iter().zip(stays).filter(|(_, stays)| !stays);
            let base = (stream * self.config.num_slots) as u32;
            let gone: Vec<u32> = gone.map(|(slot, _)| base + slot).collect();
            if !gone.is_empty() {
                self.evict(head, &gone)?;
            }
        }
        Ok(())
    }

    fn decode(&self, stream: usize, head: usize, slots: &[u32], tracked: &Tracked) -> DecodedHead {
        let SlotsConfig { key_dim, value_dim, .. } = self.config;
        let (group, needs) = (self.config.group(), self.policy.needs());
        let lane = &self.streams[stream].lanes[head];
        let mut out = DecodedHead { num_queries: tracked.queries.len(), ..DecodedHead::default() };
        for (position, slot) in slots.iter().enumerate() {
            if lane.state(*slot as usize) != SlotState::Live {
                continue;
            }
            out.positions.push(position as i32);
            out.slots.push(*slot);
            let sides = [
                (Needs::KEYS, Side::Key, key_dim, &mut out.keys),
                (Needs::VALUES, Side::Value, value_dim, &mut out.values),
            ];
            for (_, side, dim, rows) in sides.into_iter().filter(|side| needs.contains(side.0)) {
                let start = rows.len();
                rows.resize(start + dim, 0.0);
                lane.read(&self.sides, side as usize, *slot as usize, &mut rows[start..]);
            }
        }
        for g in 0..group {
            for query in &tracked.queries {
                let start = (head * group + g) * key_dim;
                out.queries.extend_from_slice(&query[start..][..key_dim]);
            }
        }
        out
    }
}

/// Splits a batch into sequences, and takes those that go on from what the stream remembers.
fn chains(stream: &mut Stream, mask: &Tensor<'_>, slots: &[u32]) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    for (i, _) in slots.iter().enumerate() {
        let follows =
            |chain: &Chain| chain.queries.last().is_some_and(|last| sees(mask, i, slots[*last]));
        match chains.iter_mut().find(|chain| follows(chain)) {
            Some(chain) => chain.queries.push(i),
            None => chains.push(Chain { queries: vec![i], tracked: None }),
        }
    }
    stream.forget_replaced();
    let tracked = &mut stream.tracked;
    for chain in &mut chains {
        let first = chain.queries[0];
        let newest = (0..tracked.len())
            .filter(|i| sees(mask, first, tracked[*i].recent[0].0))
            .max_by_key(|i| tracked[*i].recent[0].1);
        chain.tracked = newest.map(|i| tracked.remove(i));
    }
    chains
}

impl Stream {
    /// Forgets sequences whose place has another token by now: they were rolled back or are gone.
    fn forget_replaced(&mut self) {
        let Self { ages, tracked, .. } = self;
        tracked.retain(|tracked| {
            let (slot, age) = tracked.recent[0];
            ages.get(slot as usize) == Some(&age)
        });
    }
}

fn sees(mask: &Tensor<'_>, query: usize, slot: u32) -> bool {
    let mut x = [f32::NEG_INFINITY];
    if (slot as usize) < mask.shape()[2] {
        mask.read_part(query, 0, slot as usize, &mut x);
    }
    x[0] != f32::NEG_INFINITY
}

/// The slots that a query sees, without those of `batch`.
fn visible(mask: &Tensor<'_>, query: usize, batch: &[u32]) -> Vec<u32> {
    let mut row = vec![0.0; mask.shape()[2]];
    mask.read_part(query, 0, 0, &mut row);
    batch.iter().for_each(|slot| row[*slot as usize] = f32::NEG_INFINITY);
    let seen = row.iter().enumerate().filter(|(_, x)| **x != f32::NEG_INFINITY);
    seen.map(|(slot, _)| slot as u32).collect()
}

impl LayerSource for Decoded<'_> {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(
        &mut self,
        _layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        let heads = self.heads.iter().map(|head| HeadInput {
            positions: &head.positions,
            keys: &head.keys,
            values: &head.values,
            queries: &head.queries,
            num_queries: head.num_queries,
            ..HeadInput::default()
        });
        f(&LayerInput {
            layer: self.config.layer,
            num_layers: self.config.num_layers,
            group: self.config.group(),
            head_dim: self.config.key_dim,
            value_dim: self.config.value_dim,
            sequence_len: self.sequence_len,
            heads: heads.collect(),
            rope: None,
            output_projection: None,
            attention_cosine: None,
        })
    }
}
