//! Split rows: the state of one head over a long context is made by several workers, each from a
//! part of the rows, and merged by whoever comes last.
//!
//! How many parts there are depends on the sequence alone, or on the group that it shares its first
//! rows with, not on the number of workers, and parts are merged in order: so the result is the same,
//! bit for bit, however the work is shared.

use parking_lot::Mutex;

use super::state::States;

/// Most parts of a head, and of what it shares with other sequences: one bit each.
const MAX_PARTS: usize = 16;

/// Rows that are worth a part of their own.
const MIN_ROWS: usize = 1024;

/// How many parts the rows of a head are split into, for `num_queries` queries. More queries need
/// larger states and are more work for each row, so they are split less.
pub(crate) fn num_parts(rows: usize, num_queries: usize) -> usize {
    (rows / MIN_ROWS).min(MAX_PARTS / num_queries).max(1)
}

/// Rows of a shared prefix that are worth a part of their own: a part leaves a state for each of many
/// queries.
const MIN_SHARED_ROWS: usize = 2048;

/// How many parts the rows are split into that several sequences share.
pub(crate) fn num_shared_parts(rows: usize) -> usize {
    (rows / MIN_SHARED_ROWS).clamp(1, MAX_PARTS)
}

/// Where the workers of one split head meet.
#[derive(Debug, Default)]
pub(crate) struct Split(Mutex<Arrivals>);

#[derive(Debug, Default)]
struct Arrivals {
    /// The layer that `done` is about.
    layer: usize,
    /// Which parts are in `states`.
    done: u32,
    /// At least one for each part.
    states: Vec<States>,
}

impl Split {
    /// Forgets earlier arrivals and makes room for `parts` states of `rows` rows, so that
    /// [`Self::arrive`] does not have to.
    pub(super) fn reset(&mut self, parts: usize, rows: usize, dim: usize) {
        let Arrivals { done, states, .. } = self.0.get_mut();
        *done = 0;
        if states.len() < parts {
            states.resize_with(parts, States::default);
        }
        states[..parts].iter_mut().for_each(|state| state.reset(rows, dim));
    }

    /// Brings the state of one of `parts` parts of a layer. The last to come gets the merged state in
    /// its place and `true`.
    pub(crate) fn arrive(
        &self,
        layer: usize,
        part: usize,
        parts: usize,
        state: &mut States,
    ) -> bool {
        let mut arrivals = self.0.lock();
        let Arrivals { layer: current, done, states } = &mut *arrivals;
        if *current != layer || *done >> part & 1 == 1 {
            // What an abandoned run has left.
            (*current, *done) = (layer, 0);
        }
        if states.len() < parts {
            states.resize_with(parts, States::default);
        }
        states[part].copy_from(state);
        *done |= 1 << part;
        if done.count_ones() as usize != parts {
            return false;
        }
        *done = 0;
        state.clear();
        states[..parts].iter().for_each(|part| state.merge(part));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_parts_is_bounded() {
        assert_eq!(num_parts(0, 1), 1);
        assert_eq!(num_parts(2047, 1), 1);
        assert_eq!(num_parts(2048, 1), 2);
        assert_eq!(num_parts(1 << 20, 1), MAX_PARTS);
        assert_eq!(num_parts(1 << 20, 4), 4);
        assert_eq!(num_parts(1 << 20, 17), 1);
    }

    #[test]
    fn the_last_part_gets_the_sum_in_any_order_and_again_in_the_next_layer() {
        let state = |value: f32| {
            let mut state = States::default();
            state.reset(1, 1);
            state.raise(0, 0.0);
            state.sum[0] = 1.0;
            state.out[0] = value;
            state
        };
        let mut split = Split::default();
        split.reset(3, 1, 1);
        // Abandoned runs of another layer and of this one.
        assert!(!split.arrive(7, 2, 3, &mut state(99.0)));
        assert!(!split.arrive(0, 0, 3, &mut state(99.0)));
        for (layer, order) in [(0, [0, 1, 2]), (0, [2, 0, 1]), (1, [1, 2, 0])] {
            for (i, part) in order.into_iter().enumerate() {
                let mut state = state(part as f32 + 1.0);
                assert_eq!(split.arrive(layer, part, 3, &mut state), i == 2);
                if i == 2 {
                    assert_eq!((state.finish(0), state.out[0]), (3.0f32.ln(), 2.0));
                }
            }
        }
    }
}
