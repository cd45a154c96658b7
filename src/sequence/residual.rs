//! How much attention of a layer changes the residual stream, over the tokens of a prompt.

/// The mean cosine between the residual stream of a layer before and after attention. The states
/// themselves are not kept.
#[derive(Debug, Clone, Default)]
pub struct Residual {
    sum: f64,
    count: usize,
    /// The cosines of reserved tokens, which may be dropped.
    pending: Vec<f64>,
}

impl Residual {
    /// Takes the cosines of all reserved tokens, instead of those it has.
    pub fn put(&mut self, cosines: impl Iterator<Item = f64>) {
        self.pending.clear();
        self.pending.extend(cosines);
    }

    /// Reserved tokens whose cosines are known.
    pub fn num_pending(&self) -> usize {
        self.pending.len()
    }

    /// The first `n` reserved tokens are real, the others are dropped.
    pub fn commit(&mut self, n: usize) {
        let real = &self.pending[..n.min(self.pending.len())];
        self.sum += real.iter().sum::<f64>();
        self.count += real.len();
        // A prompt comes in few pieces, so that there is no need to keep the room.
        self.pending = Vec::new();
    }

    /// The mean over committed tokens; `None` before the first.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// The cosine between a state and what it is once `added` is added. A state without a direction, all
/// zero or not finite, counts as changed: 0.
pub fn cosine(before: &[f32], added: &[f32]) -> f64 {
    let (mut product, mut old, mut new) = (0.0, 0.0, 0.0);
    for (x, delta) in before.iter().zip(added) {
        // Squares of the largest f32 are far from the largest f64.
        let (x, y) = (f64::from(*x), f64::from(*x) + f64::from(*delta));
        product += x * y;
        old += x * x;
        new += y * y;
    }
    let cosine = product / (old * new).sqrt();
    if cosine.is_finite() { cosine.clamp(-1.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_of_every_kind_of_state() {
        let cases: [(&[f32], &[f32], f64); 9] = [
            (&[1.0, 2.0], &[0.0, 0.0], 1.0),
            (&[1.0, 2.0], &[2.0, 4.0], 1.0),
            (&[1.0, 0.0], &[-1.0, 1.0], 0.0),
            (&[1.0, 0.0], &[0.0, 1.0], 0.5f64.sqrt()),
            (&[1.0, 0.0], &[-3.0, 0.0], -1.0),
            (&[0.0, 0.0], &[1.0, 0.0], 0.0),
            (&[1.0, f32::NAN], &[1.0, 0.0], 0.0),
            (&[f32::INFINITY, 1.0], &[1.0, 0.0], 0.0),
            (&[f32::MAX, f32::MAX], &[f32::MAX, f32::MAX], 1.0),
        ];
        for (before, added, expected) in cases {
            assert!((cosine(before, added) - expected).abs() < 1e-12, "{before:?} + {added:?}");
        }
        let tiny = f32::from_bits(1);
        assert!((cosine(&[tiny, tiny], &[tiny, 0.0]) - 3.0 / 10f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn only_committed_tokens_count() {
        let mut residual = Residual::default();
        assert_eq!(residual.mean(), None);
        residual.put([0.5, 0.25, -1.0].into_iter());
        assert_eq!((residual.num_pending(), residual.mean()), (3, None));
        residual.commit(2);
        assert_eq!((residual.num_pending(), residual.mean()), (0, Some(0.375)));
        residual.put([9.0].into_iter());
        residual.put([0.75].into_iter());
        residual.commit(1);
        assert_eq!(residual.mean(), Some(0.5));
        residual.put([3.0].into_iter());
        residual.commit(0);
        assert_eq!(residual.mean(), Some(0.5));
    }
}
