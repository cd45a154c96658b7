//! Part of a layer as an input of its own.

use crate::policy::{HeadInput, LayerInput};

/// Some tokens of each head of a layer, copied. Queries are left out: they see the whole.
#[derive(Debug)]
pub(super) struct Subset {
    heads: Vec<Rows>,
}

#[derive(Debug, Default)]
struct Rows {
    positions: Vec<i32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    column_sums: Vec<f32>,
    low_counts: Vec<f32>,
    gate_scores: Vec<f32>,
    replay_maxima: Vec<f32>,
}

impl Subset {
    /// The tokens `indices[h]` of each head, ascending.
    pub(super) fn new(layer: &LayerInput<'_>, indices: &[Vec<usize>]) -> Self {
        let rows = |(head, indices): (&HeadInput<'_>, &Vec<usize>)| {
            let pick = |list: &[f32], width: usize| -> Vec<f32> {
                let row = |i: &usize| list.get(i * width..(i + 1) * width).unwrap_or(&[]);
                indices.iter().flat_map(row).copied().collect()
            };
            Rows {
                positions: indices.iter().map(|i| head.positions[*i]).collect(),
                keys: pick(head.keys, layer.head_dim),
                values: pick(head.values, layer.value_dim),
                column_sums: pick(head.column_sums, 1),
                low_counts: pick(head.low_counts, 1),
                gate_scores: pick(head.gate_scores, 1),
                // One row for each query head of the group.
                replay_maxima: head
                    .replay_maxima
                    .chunks_exact(head.positions.len().max(1))
                    .flat_map(|row| pick(row, 1))
                    .collect(),
            }
        };
        Self { heads: layer.heads.iter().zip(indices).map(rows).collect() }
    }

    /// The part as an input, with everything else of `layer`.
    pub(super) fn input<'a>(&'a self, layer: &LayerInput<'a>) -> LayerInput<'a> {
        let head = |(rows, head): (&'a Rows, &HeadInput<'a>)| HeadInput {
            positions: &rows.positions,
            keys: &rows.keys,
            values: &rows.values,
            column_sums: &rows.column_sums,
            low_counts: &rows.low_counts,
            gate_scores: &rows.gate_scores,
            replay_maxima: &rows.replay_maxima,
            queries: &[],
            num_queries: 0,
            last_row: &[],
            ..*head
        };
        LayerInput {
            heads: self.heads.iter().zip(&layer.heads).map(head).collect(),
            ..layer.clone()
        }
    }
}
