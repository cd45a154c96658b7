//! Where requests come from: the log of a pool, or a table of conversations.

use std::collections::HashMap;

use kvmgr::block::manager::{TraceEvent, trace};
use kvmgr::block::prefix;
use kvmgr::error::{Error, Kind, Result};

/// Requests in their order.
pub(crate) struct Trace {
    /// Tokens of a block.
    pub(crate) block_size: usize,
    /// What happened.
    pub(crate) events: Vec<TraceEvent>,
}

/// Reads what `kvmgr_pool_take_log` wrote.
pub(crate) fn recorded(log: &[u8]) -> Result<Trace> {
    let (block_size, events) = trace(log)?;
    Ok(Trace { block_size, events })
}

/// Conversations from lines `user,turn,message tokens,answer tokens`: every history starts with the
/// same `system` tokens, and every request is the whole history of its user and one more message.
pub(crate) fn conversations(text: &str, system: usize, block_size: usize) -> Result<Trace> {
    let root = prefix::root(block_size, 0, b"simulation");
    let mut histories: HashMap<u64, Vec<i32>> = HashMap::new();
    let mut events = Vec::new();
    for (index, line) in text.lines().filter(|line| !line.trim().is_empty()).enumerate() {
        let fields: Vec<u64> = line.split(',').filter_map(|it| it.trim().parse().ok()).collect();
        let [user, _, message, answer] = fields[..] else {
            return Err(wrong(format!("line {} is not four numbers: {line:?}", index + 1)));
        };
        let start = || (0..system as u64).map(|position| token(0, position)).collect();
        let history = histories.entry(user).or_insert_with(start);
        let mut speak = |count: u64| {
            let from = history.len() as u64;
            history.extend((from..from + count).map(|position| token(user + 1, position)));
            history.clone()
        };
        let (sequence, tokens) = (index as u64, speak(message));
        let answer = speak(answer)[tokens.len()..].to_vec();
        events.push(TraceEvent::Admit { sequence, tokens, root });
        events.push(TraceEvent::Extend { sequence, tokens: answer });
        events.push(TraceEvent::End { sequence });
    }
    Ok(Trace { block_size, events })
}

/// A token that depends on who says it and where: splitmix64.
fn token(space: u64, position: u64) -> i32 {
    let gamma = 0x9E37_79B9_7F4A_7C15;
    let mut z = space.wrapping_mul(gamma).wrapping_add(position).wrapping_add(gamma);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) % 32_000) as i32
}

/// An error about what somebody asked for.
pub(crate) fn wrong(message: String) -> Error {
    Error::new(Kind::InvalidArgument, message)
}
