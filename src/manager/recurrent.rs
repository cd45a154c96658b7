//! A prefix match of a model with recurrent layers, whose states a store may have.

use super::Session;
use crate::block::prefix;
use crate::error::Result;
use crate::tier::Tier;

impl Session {
    /// [`super::Session::match_prefix`] with a store: fetches blocks up to the last state that it has,
    /// and that state. Answers the tokens taken.
    pub(super) fn match_with_state(&mut self, tokens: &[i32], tier: &Tier) -> Result<usize> {
        let cache = self.sequence.cache().clone();
        let block_size = cache.config().block_size;
        let mut matched = self.sequence.begin_match(tokens)?;
        let target = self.reach(tokens, tier);
        while matched < target * block_size
            && let Some(digest) = self.sequence.next_digest(tokens)
            && tier.fetch(&cache, &digest, matched)
        {
            let extended = self.sequence.extend_match(tokens)?;
            if extended == matched {
                break; // Reclaimed again before it could be held.
            }
            matched = extended;
        }
        self.sequence.settle_match(&mut |entry, digest| tier.fetch_state(&cache, entry, digest))
    }

    /// The most chunks of `tokens` that the cache or the store has with a state at their end, if these
    /// are more than are held.
    fn reach(&self, tokens: &[i32], tier: &Tier) -> usize {
        let cache = self.sequence.cache();
        let block_size = cache.config().block_size;
        let usable = tokens.len().saturating_sub(1) / block_size;
        let (mut next, mut target) = (self.sequence.next_digest(tokens), 0);
        let held = self.sequence.num_tokens() / block_size;
        for chunk in held..usable {
            let Some(digest) = next else { break };
            let (is_cached, has_state) = cache.knows(&digest);
            if !is_cached && !tier.has(&digest) {
                break;
            }
            if has_state || tier.has_state(&digest) {
                target = chunk + 1;
            }
            let following = tokens.get((chunk + 1) * block_size..(chunk + 2) * block_size);
            next = following.map(|ids| prefix::extend(&digest, ids));
        }
        target
    }
}
