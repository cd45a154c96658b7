//! Who does what: the rows of all heads, laid end to end and cut into equal shares.
//!
//! ```text
//! heads     |------ 0 ------|-- 1 --|- 2 -|---------- 3 ----------|
//! CTAs      |  0   |  1   |  2   |  3   |  4   |  5   |  6   |  7  |
//! items      0.0    0.1,1.0 1.1,2.0  2.1..                             head.part
//! ```
//!
//! Every CTA reads about as many rows as every other, whatever the lengths are. A head that was cut has
//! parts; the CTA that finishes its last part merges them. Where heads are few, parts are equal and each
//! CTA has one, which is quicker to merge.

use std::ops::Range;

use crate::device::cuda::params::Item;
use crate::sequence::Lane;

/// What a part costs besides its rows, in units of the rows that a CTA does at a time. Shorter parts
/// are not cut off.
const OVERHEAD: u64 = 2;

/// Rows of open blocks that a warp does at a time, at multiples of which parts begin.
const OPEN_STEP: u32 = 16;

/// Rows of a lane whose blocks follow each other without a gap. Row numbers count from the start of
/// the first block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index of the first block in the page table.
    pub(super) first_page: u32,
    /// The rows, of which only the first block's may be missing at the start.
    pub(super) rows: Range<u32>,
    /// Rows below lie in sealed blocks.
    pub(super) sealed_end: u32,
    /// What a row number lacks to the index in the lane; may be negative.
    pub(super) shift: i64,
}

/// Appends the segments of `lane` to `out` and its blocks to `pages`.
pub(super) fn segments(
    lane: &Lane,
    block_size: usize,
    page_of: impl Fn(&crate::cache::Block) -> (u32, bool),
    pages: &mut Vec<u32>,
    out: &mut Vec<Segment>,
) {
    let start = out.len();
    let mut index = 0i64;
    let mut evicted = 0;
    for span in &lane.spans {
        let (page, is_sealed) = page_of(&span.block);
        let continues = out[start..].last().is_some_and(|last| {
            last.rows.end.is_multiple_of(block_size as u32)
                && span.first == 0
                && span.evicted_before == evicted
                && (!is_sealed || last.sealed_end == last.rows.end)
        });
        if !continues {
            let rows = span.first..span.first;
            let shift = index - i64::from(span.first);
            let first_page = pages.len() as u32;
            out.push(Segment { first_page, rows, sealed_end: 0, shift });
        }
        pages.push(page);
        if let Some(segment) = out.last_mut() {
            segment.rows.end += span.count;
            if is_sealed {
                segment.sealed_end = segment.rows.end;
            }
        }
        index += i64::from(span.count);
        evicted = span.evicted_before;
    }
}

/// The work of a table. Buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// What is to be done, in the order of the CTAs.
    items: Vec<Item>,
    /// CTA `i` does the items `starts[i]..starts[i + 1]`.
    starts: Vec<u32>,
    /// Partial results.
    pub(super) num_slots: u32,
    /// Heads that were cut.
    pub(super) num_tickets: u32,
    /// Whole heads, one item for each segment, before they are cut.
    whole: Vec<Item>,
    /// Segments and units of each head.
    heads: Vec<(Range<usize>, u64)>,
}

impl Schedule {
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.starts.clear();
        self.whole.clear();
        self.heads.clear();
        (self.num_slots, self.num_tickets) = (0, 0);
    }

    /// Adds `num_queries` queries, the first of which is row `token` of Q, of one KV head of a lane
    /// made of `segments`; the last of them sees `len` rows. Those from `fresh` on are of this step.
    pub(super) fn push(
        &mut self,
        (token, num_queries, kv_head): (u32, u32, u32),
        segments: &[Segment],
        (len, fresh): (i64, i64),
        block_size: u32,
    ) {
        let before = self.whole.len();
        for segment in segments {
            let seen = len - segment.shift;
            if seen <= i64::from(segment.rows.start) {
                continue;
            }
            let end = seen.min(i64::from(segment.rows.end)) as u32;
            // The last block of a sealed prefix may have lost rows; it is sealed all the same.
            let sealed_end = segment.sealed_end.next_multiple_of(block_size);
            // Kernels begin where they can and pass over what was evicted before the first row.
            let first = segment.rows.start;
            let step = if sealed_end > 0 { block_size } else { OPEN_STEP };
            self.whole.push(Item {
                token,
                num_queries,
                kv_head,
                first_page: segment.first_page,
                len: seen as u32,
                begin: first / step * step,
                end,
                sealed_end,
                first,
                fresh: (fresh - segment.shift).clamp(0, i64::from(u32::MAX)) as u32,
                ..Item::default()
            });
        }
        self.heads.push((before..self.whole.len(), 0));
    }

    /// Cuts what was pushed into shares for `grid` CTAs, which do `unit` rows at a time.
    pub(super) fn cut(&mut self, grid: u32, unit: u32) {
        let mut heads = std::mem::take(&mut self.heads);
        for (segments, units) in &mut heads {
            *units = self.whole[segments.clone()].iter().map(|item| units_of(item, unit)).sum();
        }
        let grid = u64::from(grid);
        let total: u64 = heads.iter().map(|(_, units)| units + OVERHEAD).sum();
        self.starts.push(0);
        match chunk_of(&heads, grid) {
            Some(chunk) if chunk <= total / grid + 1 => {
                let mut cta = 0;
                for (segments, units) in &heads {
                    let (first, num) = (self.items.len(), units.div_ceil(chunk).max(1));
                    for i in 0..num {
                        let part = units * i / num..units * (i + 1) / num;
                        self.push_part(segments.clone(), part, unit, cta);
                        cta += 1;
                    }
                    self.finish_head(first);
                }
            }
            _ => self.cut_shares(&heads, total, grid, unit),
        }
        self.starts.resize(grid as usize + 1, self.items.len() as u32);
        self.heads = heads;
    }

    /// Cuts heads that lie end to end at the ends of equal shares.
    fn cut_shares(&mut self, heads: &[(Range<usize>, u64)], total: u64, grid: u64, unit: u32) {
        let limit = |cta: u64| (cta + 1) as f64 * total as f64 / grid as f64;
        let (mut start, mut cta) = (0, 0);
        for (segments, units) in heads {
            let (units, first) = (*units, self.items.len());
            let end = start + units + OVERHEAD;
            let mut from = 0;
            while cta + 1 < grid && limit(cta) < end as f64 {
                let cut = (limit(cta) - (start + OVERHEAD) as f64).round().max(0.0) as u64;
                let is_short = |part: u64| part < OVERHEAD && units > OVERHEAD;
                let cut = if is_short(cut) { 0 } else { cut.min(units) };
                let cut = if is_short(units - cut) { units } else { cut }.max(from);
                self.push_part(segments.clone(), from..cut, unit, cta);
                from = cut;
                cta += 1;
            }
            self.push_part(segments.clone(), from..units, unit, cta);
            self.finish_head(first);
            start = end;
        }
    }

    /// Gives units `part` of a head to a CTA that is not before the last that got some.
    fn push_part(&mut self, segments: Range<usize>, part: Range<u64>, unit: u32, cta: u64) {
        if part.is_empty() {
            return;
        }
        while self.starts.len() as u64 <= cta {
            self.starts.push(self.items.len() as u32);
        }
        let mut before = 0;
        for i in segments {
            let item = self.whole[i];
            let units = units_of(&item, unit);
            let (from, to) = (part.start.max(before), part.end.min(before + units));
            if from < to {
                // Cuts are at multiples of a unit, wherever the segment starts.
                let row = |at: u64| (item.begin / unit + (at - before) as u32) * unit;
                let (begin, end) = (row(from).max(item.begin), row(to).min(item.end));
                self.items.push(Item { begin, end, ..item });
            }
            before += units;
        }
    }

    /// Deals whole heads out to `grid` CTAs, the longest first and there and back again, so that all have
    /// about as much to do. For kernels that do not merge parts; each head has one segment.
    pub(super) fn deal(&mut self, grid: u32) {
        let cost = |item: &Item| u64::from(item.end) * u64::from(item.num_queries);
        self.whole.sort_by_key(|item| std::cmp::Reverse(cost(item)));
        let (grid, n) = (grid as usize, self.whole.len());
        self.starts.push(0);
        for cta in 0..grid {
            for first in (0..n).step_by(grid) {
                let is_back = first / grid % 2 == 1;
                let at = first + if is_back { grid - 1 - cta } else { cta };
                if at < n {
                    self.items.push(Item { num_parts: 1, ..self.whole[at] });
                }
            }
            self.starts.push(self.items.len() as u32);
        }
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.whole.is_empty()
    }

    /// Words of [`Self::write`].
    pub(super) fn num_words(&self) -> usize {
        // The first item of a CTA has a place of its own, whether there is one or not.
        let first = self.starts.windows(2).filter(|pair| pair[0] < pair[1]).count();
        (self.starts.len() - 1 + self.items.len() - first) * Item::WORDS
    }

    /// Writes the items as kernels read them: the first of each CTA, then the others, linked.
    pub(super) fn write(&self, out: &mut [u32]) {
        let grid = self.starts.len() - 1;
        let mut next = grid;
        for cta in 0..grid {
            let items = &self.items[self.starts[cta] as usize..self.starts[cta + 1] as usize];
            let mut place = cta;
            let mut put = |place: usize, item: &Item| {
                out[place * Item::WORDS..][..Item::WORDS].copy_from_slice(&item.words());
            };
            if items.is_empty() {
                put(place, &Item::default());
            }
            for (i, item) in items.iter().enumerate() {
                let is_last = i + 1 == items.len();
                put(place, &Item { next: if is_last { 0 } else { next as u32 }, ..*item });
                if !is_last {
                    place = next;
                    next += 1;
                }
            }
        }
    }

    /// Numbers the parts of the head whose items start at `first`.
    fn finish_head(&mut self, first: usize) {
        let items = &mut self.items[first..];
        let num_parts = items.len() as u32;
        let is_cut = num_parts > 1;
        for (part, item) in items.iter_mut().enumerate() {
            (item.part, item.num_parts) = (part as u32, num_parts);
            (item.slot, item.ticket) =
                if is_cut { (self.num_slots, self.num_tickets) } else { (0, 0) };
        }
        if is_cut {
            self.num_slots += num_parts;
            self.num_tickets += 1;
        }
    }
}

fn units_of(item: &Item, unit: u32) -> u64 {
    u64::from(item.end.div_ceil(unit) - item.begin / unit)
}

/// The smallest number of units such that parts of this size have a CTA each; `None` if even whole
/// heads are too many.
fn chunk_of(heads: &[(Range<usize>, u64)], grid: u64) -> Option<u64> {
    if heads.len() as u64 > grid {
        return None;
    }
    let parts = |chunk: u64| heads.iter().map(|(_, n)| n.div_ceil(chunk).max(1)).sum::<u64>();
    let (mut low, mut high) = (1, heads.iter().map(|(_, n)| *n).max().unwrap_or(1).max(1));
    while low < high {
        let middle = low.midpoint(high);
        if parts(middle) <= grid { high = middle } else { low = middle + 1 }
    }
    Some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u32 = 64;

    fn whole(rows: Range<u32>, shift: i64) -> Segment {
        Segment { first_page: 0, rows, sealed_end: 0, shift }
    }

    /// Every row of every head is in one item, shares are even, and cuts are where kernels can.
    fn check(schedule: &Schedule, heads: &[u32], grid: u32) {
        let mut seen: Vec<Vec<bool>> = heads.iter().map(|len| vec![false; *len as usize]).collect();
        for item in &schedule.items {
            assert!(item.begin < item.end && item.begin.is_multiple_of(UNIT));
            assert!(item.part < item.num_parts);
            for row in item.begin..item.end {
                let row = &mut seen[item.token as usize][row as usize];
                assert!(!std::mem::replace(row, true), "a row is done twice");
            }
        }
        assert!(seen.iter().flatten().all(|seen| *seen));
        assert_eq!(schedule.starts.len(), grid as usize + 1);
        assert!(schedule.starts.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(*schedule.starts.last().unwrap() as usize, schedule.items.len());
        let share = |cta: usize| -> u64 {
            let items = schedule.starts[cta] as usize..schedule.starts[cta + 1] as usize;
            schedule.items[items].iter().map(|item| units_of(item, UNIT)).sum()
        };
        let most = (0..grid as usize).map(share).max().unwrap();
        let units: u64 = heads.iter().map(|len| u64::from(len.div_ceil(UNIT)) + OVERHEAD).sum();
        let fair = units.div_ceil(u64::from(grid)) + 2 * OVERHEAD;
        assert!(most <= fair, "a CTA has {most} units, {fair} would be fair");
    }

    /// Following the links of every CTA gives its items.
    fn check_links(schedule: &Schedule, grid: usize) {
        let mut words = vec![u32::MAX; schedule.num_words()];
        schedule.write(&mut words);
        let (queries, next) = (1, 12);
        for cta in 0..grid {
            let mut at = cta * Item::WORDS;
            let items = schedule.starts[cta] as usize..schedule.starts[cta + 1] as usize;
            assert_eq!(words[at + queries] == 0, items.is_empty());
            for i in items.clone() {
                assert_eq!(words[at..at + next], schedule.items[i].words()[..next]);
                let link = words[at + next] as usize;
                assert_eq!(link == 0, i + 1 == items.end);
                at = link * Item::WORDS;
            }
        }
    }

    #[test]
    fn rows_are_shared_evenly_whatever_the_lengths_are() {
        let long: Vec<u32> = (0..50).map(|i| i * i * 3 % 1777 + 1).collect();
        for heads in [vec![1], vec![70_000], vec![5, 64, 65, 128, 1, 1000], long, vec![]] {
            for grid in [1, 3, 8, 264] {
                let mut schedule = Schedule::default();
                for (i, len) in heads.iter().enumerate() {
                    let segment = whole(0..*len, 0);
                    let len = i64::from(*len);
                    schedule.push((i as u32, 1, 0), &[segment], (len, len - 1), 16);
                }
                schedule.cut(grid, UNIT);
                check(&schedule, &heads, grid);
                check_links(&schedule, grid as usize);
                let cut: Vec<_> = schedule.items.iter().filter(|item| item.num_parts > 1).collect();
                assert_eq!(cut.len() as u32, schedule.num_slots);
                for item in cut {
                    assert!(item.ticket < schedule.num_tickets);
                    assert!(item.slot + item.num_parts <= schedule.num_slots);
                }
            }
        }
    }

    #[test]
    fn whole_heads_are_dealt_out_evenly() {
        for (n, grid) in [(0, 3), (1, 3), (7, 3), (100, 8)] {
            let mut schedule = Schedule::default();
            for i in 0..n {
                let len = 100 + 10 * i;
                schedule.push((i, 4, 0), &[whole(0..len, 0)], (i64::from(len), 0), 16);
            }
            schedule.deal(grid);
            check_links(&schedule, grid as usize);
            let mut seen: Vec<u32> = schedule.items.iter().map(|item| item.token).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>());
            let loads: Vec<u32> = schedule
                .starts
                .windows(2)
                .map(|pair| {
                    let items = pair[0] as usize..pair[1] as usize;
                    schedule.items[items].iter().map(|item| item.end).sum()
                })
                .collect();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            let longest = if n == 0 { 0 } else { 100 + 10 * n };
            assert!(most - least <= longest, "{loads:?}");
        }
    }

    #[test]
    fn a_lane_with_a_gap_has_one_part_for_each_side_of_it() {
        let mut schedule = Schedule::default();
        // 20 rows in blocks of 16 of which the second lost 12; then 10 rows in a new block.
        let second = Segment { first_page: 2, rows: 0..10, sealed_end: 0, shift: 20 };
        // Two queries see 29 and 30 rows, two before them 27 and 28: none or a part of the second.
        schedule.push((0, 2, 0), &[whole(0..20, 0), second.clone()], (30, 28), 16);
        schedule.push((2, 1, 0), &[whole(0..20, 0), second], (20, 19), 16);
        schedule.cut(1, UNIT);
        let rows: Vec<_> = schedule
            .items
            .iter()
            .map(|item| (item.token, item.first_page, item.begin..item.end, item.len, item.fresh))
            .collect();
        assert_eq!(rows, [(0, 0, 0..20, 30, 28), (0, 2, 0..10, 10, 8), (2, 0, 0..20, 20, 19)]);
        assert_eq!(schedule.items.iter().map(|item| item.num_parts).collect::<Vec<_>>(), [2, 2, 1]);
    }

    #[test]
    fn a_lane_that_lost_the_start_of_a_block_begins_where_kernels_can() {
        // Blocks of 64 whose first lost 37 rows.
        for (sealed_end, begin) in [(0, 32), (128, 0)] {
            let mut schedule = Schedule::default();
            let segment = Segment { first_page: 0, rows: 37..150, sealed_end, shift: -37 };
            schedule.push((0, 1, 0), &[segment], (113, 112), 64);
            schedule.cut(1, UNIT);
            let [item] = schedule.items[..] else { panic!("one item") };
            assert_eq!((item.begin, item.end, item.first, item.len), (begin, 150, 37, 150));
            assert_eq!(item.fresh, 149);
        }
    }
}
