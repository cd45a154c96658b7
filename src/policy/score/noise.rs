//! Random numbers by counter: what is drawn depends on its place alone, not on what was drawn before.

/// One step of SplitMix64.
pub(super) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in (0, 1).
pub(super) fn uniform(x: u64) -> f32 {
    ((mix(x) >> 40) as f32 + 0.5) / (1u32 << 24) as f32
}

/// A draw from the standard Gumbel distribution: the largest of logits plus such draws is one of them in
/// proportion to its exponential.
pub(super) fn gumbel(x: u64) -> f32 {
    -(-uniform(x).ln()).ln()
}

/// A draw from the standard normal distribution, by Box and Muller.
pub(super) fn normal(x: u64) -> f32 {
    let (a, b) = (uniform(x), uniform(mix(x) ^ 1));
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let n = 20_000;
        let mean = |f: &dyn Fn(u64) -> f32| (0..n).map(f).sum::<f32>() / n as f32;
        assert!((mean(&uniform) - 0.5).abs() < 0.01);
        assert!(mean(&normal).abs() < 0.02);
        assert!((mean(&|x| normal(x).powi(2)) - 1.0).abs() < 0.04);
        assert!((mean(&gumbel) - 0.5772).abs() < 0.04);
        assert!((0..n).all(|x| uniform(x) > 0.0 && uniform(x) < 1.0 && normal(x).is_finite()));
    }
}
