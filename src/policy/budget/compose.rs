//! KVCompose: layers compete for the allowance of the model, and all heads of a layer keep as much.
//!
//! ```text
//! curve[l, r] = mean over the heads of layer l of the score of the head's r-th best token
//! curve[0, r] = max over l of curve[l, r]: no layer keeps more than the first
//! layer l keeps n[l] tokens of each head: as many as its curve has among the best of all curves
//! ```
//!
//! The tokens of rank `r` of all heads make up a composite token, whatever their positions; here each
//! head has rows of its own, so that it only has to keep its best `n[l]`. Scores must mean the same in
//! every layer. A layer keeps at least one token of each head. The authors take the mean over the
//! query heads of a group where `kvzip` takes the largest, and add the mean over the KV heads: `agree`
//! before this budget ranks by that mean alone.

use super::adakv::compete;
use super::{Budget, Entry};
use crate::error::Result;
use crate::policy::HeadScores;
use crate::policy::select::ranks;
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "compose",
    summary: "layers compete with the mean of their heads' best tokens; heads of a layer keep as much",
    paper: "KVCompose, arXiv 2509.05165",
    params: &[],
    needs: Needs::NONE,
    examples: &["h2o | compose | keep(0.5)", "kvzip | compose | keep(0.3)"],
    create: |_| Ok(Box::new(Compose)),
};

#[derive(Debug)]
struct Compose;

impl Budget for Compose {
    fn spread(&self, _layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        self.spread_layers(&[scores.len()], scores, shares)
    }

    fn spread_layers(
        &self,
        counts: &[usize],
        scores: &[HeadScores],
        shares: &[usize],
    ) -> Result<Vec<usize>> {
        let mut rest = (scores, shares);
        let (mut curves, mut rows, mut safe) = (Vec::new(), Vec::new(), Vec::new());
        for &count in counts {
            let (heads, shares);
            (heads, rest.0) = rest.0.split_at(count);
            (shares, rest.1) = rest.1.split_at(count);
            let curve = curve(heads);
            let share = ranks_within(heads, shares.iter().sum());
            let protected = curve.protected.iter().filter(|protected| **protected).count();
            safe.push(protected.max(1).min(share).min(curve.scores.len()));
            curves.push(curve);
            rows.push(share);
        }
        raise_first(&mut curves);
        let kept = compete(&curves, &rows, &safe);
        let layers = counts.iter().zip(kept).flat_map(|(n, kept)| std::iter::repeat_n(kept, *n));
        Ok(layers.zip(scores).map(|(kept, head)| kept.min(head.scores.len())).collect())
    }

    fn is_global(&self) -> bool {
        true
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }
}

/// How many composite tokens `rows` pay for. One costs a row of each head that has its rank; the first
/// may cost more than there is.
fn ranks_within(heads: &[HeadScores], rows: usize) -> usize {
    let mut lens: Vec<usize> = heads.iter().map(|head| head.scores.len()).collect();
    lens.sort_unstable();
    let (mut left, mut paid) = (rows, 0);
    for (shorter, len) in lens.iter().enumerate() {
        let width = lens.len() - shorter;
        let more = (len - paid).min(left / width);
        (left, paid) = (left - more * width, paid + more);
        if paid < *len {
            break;
        }
    }
    paid.max(rows.min(1))
}

/// The composite tokens of a layer, best first. One is protected if a token of any head in it is; the
/// ranks that shorter heads lack count as 0.
fn curve(heads: &[HeadScores]) -> HeadScores {
    let len = heads.iter().map(|head| head.scores.len()).max().unwrap_or(0);
    let mut curve = HeadScores { scores: vec![0.0; len], protected: vec![false; len] };
    for head in heads {
        let mut order = ranks(head);
        order.sort_unstable_by(|a, b| b.cmp(a));
        for (r, rank) in order.into_iter().enumerate() {
            curve.scores[r] += head.scores[rank.index()] / heads.len() as f32;
            curve.protected[r] |= head.protected[rank.index()];
        }
    }
    curve
}

/// Makes the curve of the first layer the largest at each rank.
fn raise_first(curves: &mut [HeadScores]) {
    let Some((first, others)) = curves.split_first_mut() else { return };
    for other in others {
        for (most, score) in first.scores.iter_mut().zip(&other.scores) {
            *most = most.max(*score);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(scores: &[f32]) -> HeadScores {
        HeadScores { scores: scores.to_vec(), protected: vec![false; scores.len()] }
    }

    #[test]
    fn layers_get_what_their_composite_tokens_win() {
        // Curves: 5.5 5.5 0.5 0.5, raised to 6 6 6 0.5; 6 6 6 0; 2 2 0 0.
        let heads = [
            head(&[9.0, 0.0, 9.0, 0.0]),
            head(&[1.0, 2.0, 1.0, 2.0]),
            head(&[0.0, 6.0, 6.0, 6.0]),
            head(&[6.0, 6.0, 0.0, 6.0]),
            head(&[4.0, 4.0, 0.0, 0.0]),
            head(&[0.0, 0.0, 0.0, 0.0]),
        ];
        let spread = |share| Compose.spread_layers(&[2, 2, 2], &heads, &[share; 6]).unwrap();
        assert_eq!(spread(1), [1, 1, 1, 1, 1, 1]);
        let uneven = [head(&[]), head(&[1.0, 2.0])];
        assert_eq!(Compose.spread_layers(&[2], &uneven, &[0, 1]).unwrap(), [0, 1]);
        // All that there is stays if the shares pay for it, whichever head they were meant for.
        assert_eq!(Compose.spread_layers(&[2], &uneven, &[0, 2]).unwrap(), [0, 2]);
        let uneven = [head(&[2.0]), head(&[1.0; 9]), head(&[1.0; 4])];
        assert_eq!(Compose.spread_layers(&[3], &uneven, &[1, 9, 4]).unwrap(), [1, 9, 4]);
        assert_eq!(Compose.spread_layers(&[3], &uneven, &[1, 5, 4]).unwrap(), [1, 5, 4]);
        assert_eq!(Compose.spread_layers(&[3], &uneven, &[1, 3, 4]).unwrap(), [1, 3, 3]);
        assert_eq!(spread(2), [3, 3, 2, 2, 1, 1]);
        assert_eq!(spread(3), [4, 4, 3, 3, 2, 2]);
        assert_eq!(spread(4), [4; 6]);
        assert_eq!(spread(9), [4; 6]);
    }

    #[test]
    fn protected_tokens_stay_and_heads_may_be_ragged_or_empty() {
        let mut low = head(&[0.0; 6]);
        low.protected[3..].fill(true);
        let heads = [head(&[9.0; 6]), low];
        assert_eq!(Compose.spread_layers(&[1, 1], &heads, &[4, 4]).unwrap(), [5, 3]);
        let heads = [head(&[1.0; 6]), head(&[1.0; 2])];
        assert_eq!(Compose.spread_layers(&[2], &heads, &[4, 4]).unwrap(), [6, 2]);
        assert_eq!(Compose.spread(0, &[], &[]).unwrap(), [0usize; 0]);
        assert_eq!(Compose.spread(0, &[head(&[])], &[3]).unwrap(), [0]);
    }
}
