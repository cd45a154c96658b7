//! Append: rows of K and V go into the open blocks that were reserved for them.

use super::check_shape;
use super::plan::Plan;
use crate::cache::Cache;
use crate::device::tensor::Tensor;
use crate::error::{Result, bail, ensure};
use crate::quantizer::Side;
use crate::sequence::{Lane, Sequence, Span};
use crate::shape::ModelShape;

/// The keys and values of a layer, and where its rows start.
struct Rows<'a> {
    key: &'a Tensor<'a>,
    value: Option<&'a Tensor<'a>>,
    first: usize,
}

/// Writes the next rows of `layer` of one sequence: K is `[n, num_kv_heads, head_dim]`, V the same with
/// `value_dim`, or none if values are in keys, for the next `n` reserved tokens that this layer has not
/// written yet.
pub fn write_sequence(
    sequence: &Sequence,
    layer: usize,
    key: &Tensor<'_>,
    value: Option<&Tensor<'_>>,
) -> Result<()> {
    sequence.ensure_present()?;
    ensure!(
        sequence.has_memory(),
        Unsupported,
        "a sequence of a pool has no memory; write to your own tensors"
    );
    ensure!(
        sequence.cache().gpu().is_none(),
        Unsupported,
        "the cache is on a CUDA device; plan, then use kvmgr_attention_append"
    );
    let shape = &sequence.cache().config().shape;
    let layers = shape.num_layers;
    ensure!(layer < layers, InvalidArgument, "layer is {layer}, the model has {layers}");
    let n = key.shape()[0];
    check_rows(shape, n, key, value)?;
    let written = sequence.shared().written(layer) / shape.num_kv_heads;
    let open = sequence.num_reserved().saturating_sub(written);
    ensure!(
        n <= open,
        InvalidArgument,
        "key has {n} tokens, layer {layer} has {open} reserved tokens left to write"
    );
    for head in 0..shape.num_kv_heads {
        let (lane, cell) = sequence.locate(layer, head);
        let spans = &sequence.lanes()[lane].spans;
        let rows = Rows { key, value, first: 0 };
        write_head(sequence.cache(), spans, cell, head, &rows, open, n);
        sequence.shared().note_written(layer, n);
    }
    Ok(())
}

impl Plan {
    /// See [`super::Attention::append`].
    pub(super) fn append(
        &self,
        cache: &Cache,
        layer: usize,
        key: &Tensor<'_>,
        value: Option<&Tensor<'_>>,
        worker: usize,
        num_workers: usize,
    ) -> Result<()> {
        let shape = &cache.config().shape;
        self.check_reserved()?;
        // Heads of all sequences in one row of work, dealt out like cards.
        let units = self.sequences.len() * shape.num_kv_heads;
        for unit in (worker..units).step_by(num_workers) {
            let (i, head) = (unit / shape.num_kv_heads, unit % shape.num_kv_heads);
            let sequence = &self.sequences[i];
            let (lane, cell) = cache.config().lane_width.locate(shape, layer, head);
            let (_, spans) = self.lane(sequence, lane);
            let rows = Rows { key, value, first: sequence.first_token };
            let n = sequence.num_queries;
            write_head(cache, spans, cell, head, &rows, n, n);
            self.note_written(i, layer, n);
        }
        Ok(())
    }
}

/// Refuses keys and values of other shapes than `n` tokens of the model have.
pub(super) fn check_rows(
    shape: &ModelShape,
    n: usize,
    key: &Tensor<'_>,
    value: Option<&Tensor<'_>>,
) -> Result<()> {
    check_shape("key", key.shape(), [n, shape.num_kv_heads, shape.head_dim])?;
    match value {
        Some(_) if !shape.stores_values() => {
            bail!(InvalidArgument, "value is given, but values are the first elements of keys")
        }
        Some(value) => {
            check_shape("value", value.shape(), [n, shape.num_kv_heads, shape.value_dim()])
        }
        None if shape.stores_values() => bail!(InvalidArgument, "value is NULL"),
        None => Ok(()),
    }
}

/// Writes `n` rows of one head, the first of which is `from_end` rows before the end of the lane.
fn write_head(
    cache: &Cache,
    spans: &[Span],
    cell: usize,
    head: usize,
    rows: &Rows<'_>,
    from_end: usize,
    n: usize,
) {
    const MAX: usize = crate::shape::MAX_HEAD_DIM;
    let mut buffer = [0.0; MAX];
    let shape = &cache.config().shape;
    let mut token = rows.first;
    for (span, first, count) in Lane::tail(spans, from_end) {
        for target in first..first + count {
            if token == rows.first + n {
                return;
            }
            let write = |side, source: &Tensor<'_>, row: &mut [f32]| {
                source.read(token, head, row);
                cache.write_row(&span.block.view, cell, side, target, row);
            };
            write(Side::Key, rows.key, &mut buffer[..shape.head_dim]);
            if let Some(value) = rows.value {
                write(Side::Value, value, &mut buffer[..shape.value_dim()]);
            }
            token += 1;
        }
    }
}
