//! Groups of a hybrid model: layers whose cached rows have different lives.
//!
//! Each chunk of `block_size` tokens has one block for each group. What a group needs at the start
//! of a token decides how much of a cached prefix serves it:
//!
//! ```text
//! full, latent    every chunk before the token
//! window(w)       the chunks that the last w - 1 tokens lie in; older ones go back to the pool
//! recurrent(k)    the state at the end of the chunk before it, kept for every k-th chunk
//! ```
//!
//! A prefix of n chunks is a hit if every group is served by it; [`reconcile`] finds the longest.

use crate::error::{Result, ensure};

/// Groups of a model at most: an index of one fits the pool's records.
pub const MAX_GROUPS: usize = 16;

/// What the layers of a group keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Keys and values of every token.
    Full,
    /// One latent row of every token (MLA): the same life as `Full`.
    Latent,
    /// Keys and values of the last tokens, the current one included.
    Window(u32),
    /// A state that every token changes, kept at the end of every n-th chunk.
    Recurrent(u32),
}

/// Why a match ended before the last usable token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reason {
    /// Nothing is missing.
    #[default]
    Complete,
    /// No entry of these tokens was seen, as far as is remembered.
    Unknown,
    /// There was an entry; it has been reclaimed.
    Evicted,
    /// Blocks of a window group are missing.
    Window,
    /// No state of a recurrent group lies at a usable place.
    Checkpoint,
}

/// Where and why a match ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Miss {
    /// Why.
    pub reason: Reason,
    /// The first token that is not served.
    pub token: usize,
    /// The group that limited the match.
    pub group: usize,
}

impl Group {
    /// Refuses a window or an interval of 0.
    pub fn validate(self) -> Result<()> {
        let (value, name) = match self {
            Self::Full | Self::Latent => return Ok(()),
            Self::Window(value) => (value, "window"),
            Self::Recurrent(value) => (value, "interval"),
        };
        ensure!(value > 0, InvalidArgument, "{name} of a group is 0, must be at least 1");
        Ok(())
    }

    /// Whether the group has a block of its own for `chunk` when chunks up to `last` are reserved.
    pub(super) fn has_block(self, chunk: usize, last: usize) -> bool {
        chunk == last || self.is_kept(chunk)
    }

    /// Whether the block of a full `chunk` becomes an entry.
    pub(super) fn is_kept(self, chunk: usize) -> bool {
        match self {
            Self::Recurrent(interval) => (chunk + 1).is_multiple_of(interval as usize),
            _ => true,
        }
    }

    /// The first chunk that the token at position `token` needs.
    pub(super) fn first_needed(self, token: usize, block_size: usize) -> usize {
        match self {
            Self::Full | Self::Latent => 0,
            Self::Window(window) => (token + 1).saturating_sub(window as usize) / block_size,
            Self::Recurrent(_) => token.saturating_sub(1) / block_size,
        }
    }

    /// The most chunks, at most `limit`, that serve this group.
    fn longest(self, limit: usize, block_size: usize, has: &dyn Fn(usize) -> bool) -> usize {
        match self {
            Self::Full | Self::Latent => (0..limit).find(|chunk| !has(*chunk)).unwrap_or(limit),
            Self::Recurrent(interval) => {
                let last = limit / interval as usize * interval as usize;
                let mut candidates = (1..=last).rev().step_by(interval as usize);
                candidates.find(|chunks| has(chunks - 1)).unwrap_or(0)
            }
            Self::Window(_) => {
                let mut end = limit;
                let mut chunk = end;
                while chunk > self.first_needed(end * block_size, block_size).min(end) {
                    chunk -= 1;
                    if !has(chunk) {
                        end = chunk;
                    }
                }
                end
            }
        }
    }
}

/// The most chunks, at most `limit`, that serve every group, and the group that allowed no more.
/// `has(group, chunk)` tells what is cached.
pub fn reconcile(
    groups: &[Group],
    block_size: usize,
    limit: usize,
    has: &dyn Fn(usize, usize) -> bool,
) -> (usize, Option<usize>) {
    let (mut chunks, mut limiting) = (limit, None);
    loop {
        let before = chunks;
        for (index, group) in groups.iter().enumerate() {
            let longest = group.longest(chunks, block_size, &|chunk| has(index, chunk));
            if longest < chunks {
                (chunks, limiting) = (longest, Some(index));
            }
        }
        // A shorter prefix may move a window or a checkpoint, so all groups are asked again.
        if chunks == before {
            return (chunks, limiting);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `chunks` chunks serve `group`, in the words of the module's comment.
    fn serves(group: Group, chunks: usize, size: usize, has: &dyn Fn(usize) -> bool) -> bool {
        if chunks == 0 {
            return true;
        }
        match group {
            Group::Full | Group::Latent => (0..chunks).all(has),
            Group::Recurrent(interval) => {
                chunks.is_multiple_of(interval as usize) && has(chunks - 1)
            }
            Group::Window(window) => {
                let token = chunks * size;
                (0..chunks).filter(|c| (c + 1) * size + window as usize > token + 1).all(has)
            }
        }
    }

    #[test]
    fn the_longest_prefix_that_serves_all_groups_is_found() {
        let mut random = 1u64;
        let mut next = move |n: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % n
        };
        for _ in 0..20_000 {
            let kinds = [
                Group::Full,
                Group::Latent,
                Group::Window(1 + next(12) as u32),
                Group::Recurrent(1 + next(3) as u32),
            ];
            let groups: Vec<_> = (0..1 + next(3)).map(|_| kinds[next(4) as usize]).collect();
            let cached: Vec<Vec<bool>> =
                groups.iter().map(|_| (0..8).map(|_| next(4) > 0).collect()).collect();
            let has = |group: usize, chunk: usize| cached[group][chunk];
            let limit = next(9) as usize;
            let slow = (0..=limit).rev().find(|chunks| {
                let serves =
                    |(i, group): (usize, &Group)| serves(*group, *chunks, 4, &|c| has(i, c));
                groups.iter().enumerate().all(serves)
            });
            let (found, limiting) = reconcile(&groups, 4, limit, &has);
            assert_eq!(Some(found), slow, "{groups:?} {cached:?}");
            assert_eq!(limiting.is_some(), found < limit);
        }
    }

    #[test]
    fn an_empty_window_is_refused() {
        assert!(Group::Window(0).validate().is_err() && Group::Recurrent(0).validate().is_err());
        assert!(Group::Window(1).validate().is_ok() && Group::Full.validate().is_ok());
    }
}
