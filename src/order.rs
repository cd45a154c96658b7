//! Floats as integers, to rank them.

/// Maps floats to integers of the same order: NaN below everything, the two zeros equal.
pub(crate) fn ordered(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    // All bits of negative numbers turn, and the sign of the others; without a branch, for loops.
    let turned = bits ^ ((bits.cast_signed() >> 31).cast_unsigned() | 1 << 31);
    if score.is_nan() { 0 } else { turned }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_keep_their_order_as_integers() {
        let ascending =
            [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-40, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY];
        assert!(ascending.is_sorted_by(|a, b| ordered(*a) < ordered(*b)));
        assert_eq!(ordered(0.0), ordered(-0.0));
        assert!(ordered(f32::NAN) < ordered(f32::NEG_INFINITY));
        assert!(ordered(-f32::NAN) < ordered(f32::NEG_INFINITY));
    }
}
