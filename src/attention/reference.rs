//! The oracle: attention in f64, one query at a time, straight from its definition. Slow and
//! obvious; tests compare every fast path with it.

use super::Options;
use crate::quantizer::Side;
use crate::sequence::Sequence;

/// The result for one query vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `softmax(logits) V`, `[value_dim]`.
    pub output: Vec<f64>,
    /// Log of the sum of the exponentials of the logits.
    pub lse: f64,
    /// Probability of each row of the lane.
    pub probabilities: Vec<f64>,
}

/// Attends for query `i` of the last `n` tokens of `sequence`, query head `q_head` of `layer`.
/// `query` is `[head_dim]`.
pub fn attend(
    sequence: &Sequence,
    layer: usize,
    q_head: usize,
    query: &[f32],
    (i, n): (usize, usize),
    options: &Options<'_>,
) -> Attended {
    attend_selected(sequence, layer, q_head, query, (i, n), options, None)
}

/// Like [`attend`], over these blocks of the lane and those that hold the last `n` tokens.
pub fn attend_selected(
    sequence: &Sequence,
    layer: usize,
    q_head: usize,
    query: &[f32],
    (i, n): (usize, usize),
    options: &Options<'_>,
    blocks: Option<&[u32]>,
) -> Attended {
    let config = sequence.cache().config();
    let (dim, kv_head) = (config.shape.head_dim, q_head / config.shape.group());
    let (mut keys, mut values, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    sequence.decode(layer, kv_head, Side::Key, &mut keys);
    sequence.decode(layer, kv_head, Side::Value, &mut values);
    let (lane_index, _) = sequence.locate(layer, kv_head);
    sequence.positions(lane_index, &mut positions);
    let lane = &sequence.lanes()[lane_index];
    let shifts: Vec<i32> = lane
        .spans
        .iter()
        .flat_map(|span| vec![lane.evicted - span.evicted_before; span.count as usize])
        .collect();
    let len = positions.len();
    let mut is_selected = vec![blocks.is_none(); len];
    let mut start = 0;
    for (block, span) in lane.spans.iter().enumerate() {
        let end = start + span.count as usize;
        if end > len - n || blocks.is_some_and(|blocks| blocks.contains(&(block as u32))) {
            is_selected[start..end].fill(true);
        }
        start = end;
    }
    let last = len - n + i;
    let position = (sequence.num_tokens() + sequence.num_reserved() - n + i) as i64;
    let relative = sequence.config().cache_relative;

    let logits: Vec<f64> = (0..len)
        .map(|t| {
            let distance =
                if relative { last as i64 - t as i64 } else { position - i64::from(positions[t]) };
            let window = i64::from(options.sliding_window);
            if t > last || !is_selected[t] || (window > 0 && distance >= window) {
                return f64::NEG_INFINITY;
            }
            let mut query = query.to_vec();
            if let (true, Some(rope)) = (relative, &config.rope) {
                rope.rotate(&mut query, -shifts[t]);
            }
            let key = &keys[t * dim..][..dim];
            let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let mut logit = dot * f64::from(options.scale_for(dim));
            if options.softcap > 0.0 {
                let cap = f64::from(options.softcap);
                logit = cap * (logit / cap).tanh();
            }
            logit - options.alibi_slopes.map_or(0.0, |s| f64::from(s[q_head])) * distance as f64
        })
        .collect();
    finish(
        &logits,
        &values,
        config.shape.value_dim(),
        options.sinks.map(|sinks| f64::from(sinks[q_head])),
    )
}

fn finish(logits: &[f64], values: &[f32], dim: usize, sink: Option<f64>) -> Attended {
    let all = logits.iter().copied().chain(sink);
    let max = all.clone().fold(f64::NEG_INFINITY, f64::max);
    let mut output = vec![0.0; dim];
    if max == f64::NEG_INFINITY {
        return Attended { output, lse: max, probabilities: vec![0.0; logits.len()] };
    }
    let sum: f64 = all.map(|logit| (logit - max).exp()).sum();
    let probabilities: Vec<f64> = logits.iter().map(|logit| (logit - max).exp() / sum).collect();
    for (p, value) in probabilities.iter().zip(values.chunks_exact(dim)) {
        output.iter_mut().zip(value).for_each(|(o, v)| *o += p * f64::from(*v));
    }
    Attended { output, lse: max + sum.ln(), probabilities }
}
