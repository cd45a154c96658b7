//! The layers of a sequence as a policy sees them.

use parking_lot::MutexGuard;

use super::Manager;
use crate::error::Result;
use crate::policy::{HeadInput, LayerInput, LayerSource, OutputProjection};
use crate::quantizer::Side;
use crate::sequence::{HeadObservation, Sequence};
use crate::shape::Needs;

/// Decodes one layer at a time.
#[derive(Debug)]
pub(super) struct Layers<'a> {
    sequence: &'a Sequence,
    manager: Option<&'a Manager>,
    needs: Needs,
    heads: Vec<HeadBuffers>,
    projection: Vec<f32>,
}

#[derive(Debug, Default)]
struct HeadBuffers {
    /// The lane that `positions` belongs to.
    lane: Option<usize>,
    positions: Vec<i32>,
    /// Whether rows are in another order than in the lane; then nothing is lent.
    is_permuted: bool,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    num_queries: usize,
    column_sums: Vec<f32>,
    last_row: Vec<f32>,
    low_counts: Vec<f32>,
    query_mean: Vec<f32>,
    query_covariance: Vec<f32>,
    gate_scores: Vec<f32>,
    replay_maxima: Vec<f32>,
    permuted: Vec<f32>,
}

impl HeadBuffers {
    /// Puts rows in the order of positions, of which `order` says where each is.
    fn permute(&mut self, order: &[u32], [key_dim, value_dim]: [usize; 2]) {
        let rows = order.len();
        self.positions = order.iter().map(|row| self.positions[*row as usize]).collect();
        self.column_sums.resize(rows, 0.0);
        if !self.low_counts.is_empty() {
            self.low_counts.resize(rows, 0.0);
        }
        if self.last_row.len() != rows {
            self.last_row.clear();
        }
        let planes = [&mut self.column_sums, &mut self.last_row, &mut self.low_counts];
        let planes = planes.into_iter().chain([&mut self.gate_scores]).map(|plane| (plane, 1));
        let wide = [(&mut self.keys, key_dim), (&mut self.values, value_dim)];
        for (plane, width) in planes.chain(wide) {
            permute(plane, order, width, &mut self.permuted);
        }
        for plane in self.replay_maxima.chunks_exact_mut(rows) {
            self.permuted.clear();
            self.permuted.extend(order.iter().map(|row| plane[*row as usize]));
            plane.copy_from_slice(&self.permuted);
        }
    }
}

/// Row `i` of a plane with rows of `width` elements becomes row `order[i]`. An empty plane stays empty.
fn permute(plane: &mut Vec<f32>, order: &[u32], width: usize, buffer: &mut Vec<f32>) {
    if plane.is_empty() {
        return;
    }
    buffer.clear();
    for row in order {
        buffer.extend_from_slice(&plane[*row as usize * width..][..width]);
    }
    std::mem::swap(plane, buffer);
}

impl<'a> Layers<'a> {
    pub(super) fn new(sequence: &'a Sequence, manager: Option<&'a Manager>, needs: Needs) -> Self {
        let num_heads = sequence.cache().config().shape.num_kv_heads;
        let heads = (0..num_heads).map(|_| HeadBuffers::default()).collect();
        Self { sequence, manager, needs, heads, projection: Vec::new() }
    }

    /// Copies the output projection of a layer, if it is needed and known.
    fn load_projection(&mut self, layer: usize) -> usize {
        let Some(manager) = self.manager.filter(|_| self.needs.contains(Needs::OUTPUT_PROJECTION))
        else {
            return 0;
        };
        let Some(weights) = manager.projections.read()[layer] else { return 0 };
        let [rows, _, width] = weights.shape();
        self.projection.resize(rows * width, 0.0);
        for (i, row) in self.projection.chunks_exact_mut(width).enumerate() {
            weights.read(i, 0, row);
        }
        width
    }

    /// Copies what policies see of a layer, but for planes that `seen`, the observations of its heads,
    /// can lend.
    fn load(&mut self, layer: usize, seen: &[MutexGuard<'_, HeadObservation>]) -> Result<()> {
        let shape = self.sequence.cache().config().shape;
        for head in 0..self.heads.len() {
            let (lane, _) = self.sequence.locate(layer, head);
            let order = self.sequence.lanes()[lane].order();
            let (before, buffers) = self.heads.split_at_mut(head);
            let buffers = &mut buffers[0];
            if buffers.lane.replace(lane) != Some(lane) || order.is_some() {
                match before.last().filter(|other| other.lane == Some(lane) && order.is_none()) {
                    Some(other) => buffers.positions.clone_from(&other.positions),
                    None => self.sequence.positions(lane, &mut buffers.positions),
                }
            }
            if self.needs.contains(Needs::KEYS) {
                self.sequence.read(layer, head, Side::Key, &mut buffers.keys)?;
            }
            if self.needs.contains(Needs::VALUES) {
                self.sequence.read(layer, head, Side::Value, &mut buffers.values)?;
            }
            buffers.is_permuted = order.as_ref().is_some_and(|order| !order.is_empty());
            if let Some(seen) = seen.get(head) {
                seen.queries_by_head(shape.group(), shape.head_dim, &mut buffers.queries);
                buffers.num_queries = seen.num_queries();
                if buffers.is_permuted {
                    buffers.column_sums.clone_from(&seen.received.sums);
                    buffers.last_row.clear();
                    buffers.last_row.extend_from_slice(seen.received.last());
                    buffers.low_counts.clone_from(&seen.low_counts);
                }
                if self.needs.contains(Needs::HIDDEN) {
                    buffers.gate_scores.clone_from(&seen.gate_scores);
                    buffers.gate_scores.resize(buffers.positions.len(), f32::NAN);
                }
                buffers.replay_maxima.clear();
                for plane in &seen.replay_maxima {
                    let rows = buffers.positions.len();
                    buffers.replay_maxima.extend_from_slice(&plane[..plane.len().min(rows)]);
                    let known = plane.len().min(rows);
                    buffers.replay_maxima.extend(std::iter::repeat_n(f32::NAN, rows - known));
                }
                buffers.query_mean.clear();
                buffers.query_covariance.clear();
                for statistics in &seen.statistics {
                    buffers.query_mean.extend_from_slice(statistics.mean());
                    buffers.query_covariance.extend(statistics.covariance());
                }
            }
            if let Some(order) = order.filter(|order| !order.is_empty()) {
                buffers.permute(&order, [shape.head_dim, shape.value_dim()]);
            }
        }
        Ok(())
    }
}

impl LayerSource for Layers<'_> {
    fn num_layers(&self) -> usize {
        self.sequence.cache().config().shape.num_layers
    }

    fn visit(
        &mut self,
        layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        let sequence = self.sequence;
        let num_heads = sequence.cache().config().shape.num_kv_heads;
        if let Some(observation) = sequence.observation() {
            if self.needs.contains(Needs::QUERY_WINDOW) {
                observation.fetch_queries(layer)?;
            }
            if self.needs.contains(Needs::COLUMN_SUM) {
                observation.fetch_sums()?;
            }
        }
        let seen = sequence.observation().map_or_else(Vec::new, |observation| {
            (0..num_heads).map(|head| observation.head(layer, head).lock()).collect()
        });
        self.load(layer, &seen)?;
        let width = self.load_projection(layer);
        let config = self.sequence.cache().config();
        let lent = |h: usize| seen.get(h).filter(|_| !self.heads[h].is_permuted);
        let heads = self.heads.iter().enumerate().map(|(h, head)| HeadInput {
            positions: &head.positions,
            keys: &head.keys,
            values: &head.values,
            queries: &head.queries,
            num_queries: head.num_queries,
            column_sums: lent(h).map_or(&head.column_sums, |seen| &seen.received.sums),
            last_row: lent(h).map_or(&head.last_row, |seen| seen.received.last()),
            low_counts: lent(h).map_or(&head.low_counts, |seen| &seen.low_counts),
            query_mean: &head.query_mean,
            query_covariance: &head.query_covariance,
            gate_scores: &head.gate_scores,
            replay_maxima: &head.replay_maxima,
        });
        f(&LayerInput {
            layer,
            num_layers: config.shape.num_layers,
            group: config.shape.group(),
            head_dim: config.shape.head_dim,
            value_dim: config.shape.value_dim(),
            sequence_len: self.sequence.num_tokens(),
            heads: heads.collect(),
            rope: config.rope.as_ref(),
            output_projection: (width > 0)
                .then_some(OutputProjection { weights: &self.projection, width }),
            attention_cosine: self
                .sequence
                .observation()
                .and_then(|seen| seen.residual(layer).lock().mean()),
        })
    }
}
