//! From scores to keep sets: shared by every pipeline.

use super::act::Evicted;
use super::budget::{LayerShare, Model};
use super::map::{Context, Decision, Scores};
use super::{Allowance, HeadInput, HeadScores, Kept, LayerInput, LayerSource, Phase};
use crate::error::{Result, ensure};
use crate::order::ordered;
use crate::shape::{KeepSet, LaneWidth, Needs};
use crate::simd;

impl Phase {
    /// What the engine has to hand over if it can hand over `offered` besides.
    pub(super) fn needs(&self, offered: Needs) -> Needs {
        let score = match self.score.shortcut() {
            Some(instead) if offered.contains(instead) => instead,
            _ => self.score.needs(),
        };
        let maps = self.maps.iter().map(|(_, map)| map.needs());
        let acts = self.act.iter().map(|(_, act)| act.needs());
        maps.chain(acts).fold(score.union(self.budget.needs()), Needs::union)
    }

    /// The quantizers in which tokens stay instead of being evicted.
    pub(super) fn demotes(&self) -> Option<[&str; 2]> {
        self.act.as_ref().and_then(|(_, act)| act.demotes())
    }

    /// Whether scores decide one by one.
    pub(super) fn has_threshold(&self) -> bool {
        matches!(self.allowance, Allowance::Threshold(_))
    }

    /// Queries of each head to remember.
    pub(super) fn query_window(&self) -> usize {
        self.score.query_window().max(self.budget.query_window())
    }

    /// The first stage whose needs are `wanted`.
    pub(super) fn needed_by(&self, wanted: impl Fn(Needs) -> bool) -> Option<&str> {
        if wanted(self.score.needs()) {
            return Some(&self.name);
        }
        let map = self.maps.iter().find(|(_, map)| wanted(map.needs()));
        let budget = wanted(self.budget.needs()).then_some(&self.budget_name);
        let act = self.act.iter().find(|(_, act)| wanted(act.needs()));
        let act = act.map(|(name, _)| name);
        map.map(|(name, _)| name).or(budget).or(act).map(String::as_str)
    }

    /// What each head of each layer keeps.
    pub(super) fn select(&self, source: &mut dyn LayerSource) -> Result<Vec<Vec<KeepSet>>> {
        if self.budget.is_global() {
            return self.select_all(source);
        }
        let mut kept = Vec::with_capacity(source.num_layers());
        for layer in 0..source.num_layers() {
            source.visit(layer, &mut |input| {
                kept.push(self.select_layer(input)?);
                Ok(())
            })?;
        }
        Ok(kept)
    }

    /// Heads of all layers compete, so that all scores come first.
    fn select_all(&self, source: &mut dyn LayerSource) -> Result<Vec<Vec<KeepSet>>> {
        let (mut heads, mut shares, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let mut preferences = Vec::new();
        for layer in 0..source.num_layers() {
            source.visit(layer, &mut |input| {
                let scores = self.score(input)?.heads;
                counts.push(scores.len());
                heads.extend(scores);
                shares.extend(self.shares(input));
                preferences.extend(self.budget.preference(input)?);
                Ok(())
            })?;
        }
        if !preferences.is_empty() {
            let lens: Vec<usize> = heads.iter().map(|head| head.scores.len()).collect();
            let model = Model { counts: &counts, lens: &lens, shares: &shares };
            shares = self.budget.divide(&model, &preferences);
        }
        let budgets = self.budget.spread_layers(&counts, &heads, &shares)?;
        let mut sets = heads.iter().zip(budgets).map(|(head, budget)| top(head, budget));
        Ok(counts.into_iter().map(|count| sets.by_ref().take(count).collect()).collect())
    }

    /// What each head of a layer keeps.
    fn select_layer(&self, layer: &LayerInput<'_>) -> Result<Vec<KeepSet>> {
        if self.maps.is_empty() && self.budget.lane_width() == LaneWidth::Sequence {
            let shares = self.shares(layer).into_iter().zip(&layer.heads);
            let top = |(n, head): (usize, &HeadInput<'_>)| self.score.top(head.positions.len(), n);
            if let Some(kept) = shares.map(top).collect() {
                return Ok(kept);
            }
        }
        if self.maps.is_empty() {
            let fixed = |(h, head): (usize, &HeadInput<'_>)| {
                self.score.fixed(layer.layer, layer.num_layers, h, head.positions.len())
            };
            if let Some(kept) = layer.heads.iter().enumerate().map(fixed).collect() {
                return Ok(kept);
            }
        }
        let scores = self.score(layer)?;
        self.choose(layer, &scores)
    }

    /// What each head of a layer keeps, with values that the act changed.
    pub(super) fn select_values(&self, layer: &LayerInput<'_>) -> Result<Vec<Kept>> {
        let scores = self.score(layer)?;
        let sets = self.choose(layer, &scores)?;
        let kept = |(head, set): (usize, KeepSet)| {
            let scores = &scores.heads[head];
            let values = match &self.act {
                Some((_, act)) if set.len() < scores.scores.len() => {
                    act.values(&Evicted { layer, head, scores, kept: &set })
                }
                _ => Vec::new(),
            };
            Kept { set, values }
        };
        Ok(sets.into_iter().enumerate().map(kept).collect())
    }

    /// What each head of a layer keeps by these scores.
    fn choose(&self, layer: &LayerInput<'_>, scores: &Scores) -> Result<Vec<KeepSet>> {
        let heads = &scores.heads;
        if let Allowance::Threshold(threshold) = self.allowance {
            let whole = self.score.keeps_whole();
            return Ok(heads.iter().map(|head| above(head, threshold, whole)).collect());
        }
        let budgets = match &scores.decision {
            Decision::Kept(kept) => return Ok(kept.clone()),
            Decision::Budgets(budgets) => budgets.clone(),
            Decision::Open => self.budget.spread(layer.layer, heads, &self.shares(layer))?,
        };
        Ok(heads.iter().zip(budgets).map(|(head, budget)| top(head, budget)).collect())
    }

    /// The scores of a layer after all maps.
    pub(super) fn score(&self, layer: &LayerInput<'_>) -> Result<Scores> {
        let LayerInput { group, head_dim, value_dim, .. } = *layer;
        ensure!(
            group > 0 && head_dim > 0 && value_dim > 0,
            InvalidArgument,
            "group is {group}, head_dim is {head_dim} and value_dim is {value_dim}, must be at least 1"
        );
        let needs = self.needs(layer.offered());
        for (h, head) in layer.heads.iter().enumerate() {
            let place = || format!("layer {}, KV head {h}", layer.layer);
            check(needs, layer, head).map_err(|error| error.within(place()))?;
        }
        check_projection(needs, layer)?;
        self.score_until(self.maps.len(), layer, &self.shares(layer))
    }

    /// The scores of a layer after the first `maps` maps, with these allowances.
    fn score_until(&self, maps: usize, layer: &LayerInput<'_>, shares: &[usize]) -> Result<Scores> {
        let lens = layer.heads.iter().map(|head| head.positions.len());
        let budgets: Vec<usize> = lens.zip(shares).map(|(len, share)| len.min(*share)).collect();
        let mut scores =
            Scores { heads: self.score.score(layer, &budgets)?, decision: Decision::default() };
        for (i, (_, map)) in self.maps[..maps].iter().enumerate() {
            let earlier =
                |layer: &LayerInput<'_>, shares: &[usize]| self.score_until(i, layer, shares);
            let budget = &*self.budget;
            map.map(&Context { layer, shares, budget, earlier: &earlier }, &mut scores)?;
        }
        Ok(scores)
    }

    /// The allowance of each head, which may be more than the head has.
    fn shares(&self, layer: &LayerInput<'_>) -> Vec<usize> {
        let whole = self.score.keeps_whole();
        let share = |head: &HeadInput<'_>| {
            let len = head.positions.len();
            let share = self.allowance.share(len, layer.sequence_len);
            let LayerInput { layer, num_layers, .. } = *layer;
            let share = self.budget.layer_share(&LayerShare { layer, num_layers, len, share });
            if len <= whole { share.max(len) } else { share }
        };
        layer.heads.iter().map(share).collect()
    }
}

/// Refuses lists whose lengths do not fit together.
fn check(needs: Needs, layer: &LayerInput<'_>, head: &HeadInput<'_>) -> Result<()> {
    let (len, dim) = (head.positions.len(), layer.head_dim);
    // Without a way out of the loop, which vectors have no use for.
    let pairs = head.positions.iter().zip(head.positions.iter().skip(1));
    ensure!(
        pairs.fold(true, |ascends, (a, b)| ascends & (a < b)),
        InvalidArgument,
        "positions must ascend without repeats"
    );
    let exact = |need: Needs, name: &str, found: usize, expected: usize| {
        ensure!(
            !needs.contains(need) || found == expected,
            InvalidArgument,
            "{name} has {found} elements, must have {expected}"
        );
        Ok(())
    };
    exact(Needs::KEYS, "keys", head.keys.len(), len * dim)?;
    exact(Needs::VALUES, "values", head.values.len(), len * layer.value_dim)?;
    let queries = layer.group * head.num_queries * dim;
    exact(Needs::QUERY_WINDOW, "queries", head.queries.len(), queries)?;
    if !head.query_mean.is_empty() || !head.query_covariance.is_empty() {
        let covariance = layer.group * dim * dim;
        let need = Needs::QUERY_STATISTICS;
        exact(need, "query_mean", head.query_mean.len(), layer.group * dim)?;
        exact(need, "query_covariance", head.query_covariance.len(), covariance)?;
    }
    exact(Needs::HIDDEN, "gate_scores", head.gate_scores.len(), len)?;
    if !head.replay_maxima.is_empty() {
        exact(Needs::REPLAY, "replay_maxima", head.replay_maxima.len(), layer.group * len)?;
    }
    ensure!(
        head.column_sums.len() <= len,
        InvalidArgument,
        "column_sums has {} elements, must have at most {len}",
        head.column_sums.len()
    );
    Ok(())
}

/// Refuses an output projection that does not fit the heads.
fn check_projection(needs: Needs, layer: &LayerInput<'_>) -> Result<()> {
    let Some(projection) = layer.output_projection else { return Ok(()) };
    if !needs.contains(Needs::OUTPUT_PROJECTION) {
        return Ok(());
    }
    let expected = layer.heads.len() * layer.group * layer.value_dim;
    let found = projection.width;
    ensure!(
        found == expected && projection.weights.len().is_multiple_of(found.max(1)),
        InvalidArgument,
        "layer {}: rows of the output projection have {found} elements, must have {expected}",
        layer.layer
    );
    Ok(())
}

/// The tokens of a head with at least this score, and protected ones; the best if there is none. A
/// head of at most `whole` tokens stays whole.
fn above(head: &HeadScores, threshold: f32, whole: usize) -> KeepSet {
    if head.scores.len() <= whole {
        return KeepSet::all(head.scores.len());
    }
    let stays = |i: &usize| head.protected[*i] || head.scores[*i] >= threshold;
    let kept = KeepSet::from_indices((0..head.scores.len()).filter(stays));
    if kept.is_empty() { top(head, 1) } else { kept }
}

/// Evicted tokens up to which they are looked for one by one.
const FEW: usize = 8;

/// The `n` best tokens of a head.
pub(super) fn top(head: &HeadScores, n: usize) -> KeepSet {
    let len = head.scores.len();
    if n >= len {
        return KeepSet::all(len);
    }
    if len - n <= FEW {
        return without_worst(head, len - n);
    }
    let mut ranks = ranks(head);
    ranks.select_nth_unstable_by(n, |a, b| b.cmp(a));
    ranks.truncate(n);
    let mut kept: Vec<usize> = ranks.into_iter().map(Rank::index).collect();
    kept.sort_unstable();
    KeepSet::from_indices(kept)
}

/// All tokens of a head but the `n` worst, which are few: at a decode step one goes.
fn without_worst(head: &HeadScores, n: usize) -> KeepSet {
    let lows = lows(&head.scores);
    let mut worst: Vec<Rank> = Vec::with_capacity(n + 1);
    for (run, (scores, protected)) in
        head.scores.chunks(RUN).zip(head.protected.chunks(RUN)).enumerate()
    {
        let last = worst.last().filter(|last| worst.len() == n && !last.is_protected());
        if let Some(last) = last.map(|last| last.score()) {
            // Protected ones included, which may be lower than all others.
            let is_above = lows.get(run).is_some_and(|low| ordered(*low) > last);
            if is_above || least(scores, protected) > last {
                continue;
            }
        }
        for (i, (score, is_protected)) in scores.iter().zip(protected).enumerate() {
            let rank = Rank::new(run * RUN + i, *score, *is_protected);
            if worst.len() == n && worst.last().is_some_and(|last| rank > *last) {
                continue;
            }
            worst.insert(worst.partition_point(|other| *other < rank), rank);
            worst.truncate(n);
        }
    }
    let mut gone: Vec<usize> = worst.into_iter().map(Rank::index).collect();
    gone.sort_unstable();
    let mut kept = KeepSet::default();
    let mut start = 0;
    for index in gone {
        kept.push_range(start..index);
        start = index + 1;
    }
    kept.push_range(start..head.scores.len());
    kept
}

/// Tokens that are passed over together if none of them can be among the worst.
const RUN: usize = 64;

/// The least score of each whole run; nothing if a score is not finite.
fn lows(scores: &[f32]) -> Vec<f32> {
    let kernels = simd::active();
    let whole = &scores[..scores.len() / RUN * RUN];
    if !kernels.all_within(whole, f32::MAX) {
        return Vec::new();
    }
    let (mut lows, mut highs) = (vec![0.0; whole.len() / RUN], vec![0.0; whole.len() / RUN]);
    kernels.group_ranges(whole, RUN, &mut lows, &mut highs);
    lows
}

/// The least score of tokens that are not protected, as an integer; the largest integer if all are.
fn least(scores: &[f32], protected: &[bool]) -> u32 {
    let score = |(score, is_protected): (&f32, &bool)| {
        ordered(*score) | 0u32.wrapping_sub(u32::from(*is_protected))
    };
    scores.iter().zip(protected).map(score).fold(u32::MAX, u32::min)
}

/// Orders the tokens of a head; greater is better. Protected tokens come first and the latest of
/// them are the best, for when not all fit. The others follow by score, and ties go to the lower
/// position. One bit of protection, 32 of score, 31 of index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u64);

const INDEX: u64 = (1 << 31) - 1;

impl Rank {
    fn new(index: usize, score: f32, is_protected: bool) -> Self {
        let index = index as u64;
        Self(match is_protected {
            true => 1 << 63 | index,
            false => u64::from(ordered(score)) << 31 | (INDEX - index),
        })
    }

    /// The token, as an index into its head.
    pub(super) fn index(self) -> usize {
        let tie = self.0 & INDEX;
        (if self.is_protected() { tie } else { INDEX - tie }) as usize
    }

    fn is_protected(self) -> bool {
        self.0 >> 63 == 1
    }

    /// The score as an integer of the same order.
    pub(super) fn score(self) -> u32 {
        (self.0 >> 31) as u32
    }
}

/// The ranks of all tokens of a head, in the order of their positions.
pub(super) fn ranks(head: &HeadScores) -> Vec<Rank> {
    let tokens = head.scores.iter().zip(&head.protected).enumerate();
    tokens.map(|(i, (score, is_protected))| Rank::new(i, *score, *is_protected)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(scores: &[f32], protected: &[usize]) -> HeadScores {
        let protected = (0..scores.len()).map(|i| protected.contains(&i)).collect();
        HeadScores { scores: scores.to_vec(), protected }
    }

    fn kept(head: &HeadScores, n: usize) -> Vec<usize> {
        top(head, n).iter().collect()
    }

    #[test]
    fn ties_go_to_the_lower_position_and_nan_comes_last() {
        let head = head(&[f32::NAN, 1.0, -0.0, 0.0, 1.0, f32::NEG_INFINITY], &[]);
        assert_eq!(kept(&head, 1), [1]);
        assert_eq!(kept(&head, 3), [1, 2, 4]);
        assert_eq!(kept(&head, 4), [1, 2, 3, 4]);
        assert_eq!(kept(&head, 5), [1, 2, 3, 4, 5]);
        assert_eq!(kept(&head, 6), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_few_are_found_as_many_are() {
        let mut scores: Vec<f32> = (0..200).map(|i| (i * 17 % 23) as f32 - 9.0).collect();
        scores[150] = f32::NAN;
        let all: Vec<usize> = (0..200).collect();
        for protected in [&[0, 3, 38, 120][..], &all[..196], &all] {
            let head = head(&scores, protected);
            let mut order = ranks(&head);
            order.sort_unstable();
            for gone in 0..20 {
                let mut expected: Vec<usize> =
                    order[gone..].iter().map(|rank| rank.index()).collect();
                expected.sort_unstable();
                assert_eq!(kept(&head, 200 - gone), expected);
            }
        }
    }

    #[test]
    fn protected_tokens_come_first_the_latest_of_them_if_not_all_fit() {
        let head = head(&[9.0, f32::NAN, 5.0, 0.0, -1.0], &[1, 3, 4]);
        assert_eq!(kept(&head, 0), [0usize; 0]);
        assert_eq!(kept(&head, 2), [3, 4]);
        assert_eq!(kept(&head, 3), [1, 3, 4]);
        assert_eq!(kept(&head, 4), [0, 1, 3, 4]);
    }
}
