//! The running softmax of many rows at once: one loop, compiled for each level with its own functions
//! inside.

/// What the vector levels compute `e^x` with: `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and the
/// polynomial of Cephes' `expf` for `e^r`, within 2 units in the last place.
pub(super) mod exp {
    pub(in crate::simd) const LN2_HIGH: f32 = 0.693_359_4;
    pub(in crate::simd) const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Logarithm of the smallest normal number: below it the result is 0.
    pub(in crate::simd) const LOWEST: f32 = -87.336_54;
    pub(in crate::simd) const HIGHEST: f32 = 88.0;
    /// Of r^7 down to r^2; those of r and 1 are 1.
    pub(in crate::simd) const COEFFICIENTS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
}

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
