//! The running softmax of many rows at once: one loop, compiled for each level with its own functions
//! inside.

/// Values that are added up in f32.
pub(super) const RUN: usize = 1024;

/// The body of a level's `weigh`: see [`super::Kernels::weigh`].
macro_rules! weigh {
    ($scores:ident, $softmax:ident, $max:path, $exp_sub:path) => {
        let n = $scores.len() / $softmax.max.len();
        if n == 0 {
            $softmax.factor.fill(1.0);
            return;
        }
        for (row, scores) in $scores.chunks_exact_mut(n).enumerate() {
            let before = $softmax.max[row];
            let mut most = $max(scores);
            if most == f32::NEG_INFINITY {
                $softmax.factor[row] = 1.0;
                if !scores.iter().any(|score| score.is_nan()) {
                    scores.fill(0.0);
                    continue;
                }
                // Nothing but NaN is not the same as nothing: let it into the sum.
                most = f32::MIN;
            }
            let rises = most > before;
            let factor =
                if rises && before != f32::NEG_INFINITY { (before - most).exp() } else { 1.0 };
            let max = if rises { most } else { before };
            let mut sum = 0.0;
            for run in scores.chunks_mut($crate::simd::softmax::RUN) {
                sum += f64::from($exp_sub(run, max));
            }
            $softmax.max[row] = max;
            $softmax.factor[row] = factor;
            $softmax.sum[row] = $softmax.sum[row] * factor + sum as f32;
        }
    };
}

pub(super) use weigh;
