//! The log of operations: what was asked and what was decided, so that a run can be repeated.
//!
//! ```text
//! log     = "kvmgr log 2\n" | configuration | record...
//! record  = bytes of the operation (u32) | bytes of the outcome (u32) | operation | outcome
//! ```
//!
//! Numbers are little-endian; lists start with their length as u32. [`replay`] runs the operations
//! on a new manager and compares every record, decisions included, byte by byte.

use super::codec::{MAGIC, OwnedExtra, Reader, Words};
use super::{BlockManager, Keep, LeaseId};
use crate::block::keys::{Extra, Range};
use crate::block::prefix::Digest;
use crate::block::tables::{Request, SequenceId};
use crate::error::{Result, bail, ensure};

/// Records since the last time somebody took them.
#[derive(Debug, Default)]
pub struct Recorder {
    bytes: Vec<u8>,
}

impl BlockManager {
    /// Records every operation from now on. A log that starts later than the manager's first
    /// operation cannot be replayed, so that is refused.
    pub fn start_log(&mut self) -> Result<()> {
        let fresh = self.stats().admissions == 0 && self.now == 0 && self.pool.num_entries() == 0;
        ensure!(fresh, InvalidState, "a log starts before the first operation of its pool");
        let mut words = Words(MAGIC.to_vec());
        words.config(&self.config);
        self.recorder = Some(Recorder { bytes: words.0 });
        Ok(())
    }

    /// Whether operations are recorded.
    pub fn is_logged(&self) -> bool {
        self.recorder.is_some()
    }

    /// What was recorded since the last call.
    pub fn take_log(&mut self) -> Vec<u8> {
        self.recorder.as_mut().map_or(Vec::new(), |recorder| std::mem::take(&mut recorder.bytes))
    }

    /// Bytes that [`Self::take_log`] would answer.
    pub fn log_len(&self) -> usize {
        self.recorder.as_ref().map_or(0, |recorder| recorder.bytes.len())
    }

    /// Writes a record, if somebody asked for a log.
    pub(super) fn record(
        &mut self,
        operation: impl FnOnce(&mut Words),
        outcome: impl FnOnce(&Self, &mut Words),
    ) {
        let Some(mut recorder) = self.recorder.take() else { return };
        let (mut first, mut second) = (Words::default(), Words::default());
        operation(&mut first);
        second.long(self.pool.evictions());
        outcome(self, &mut second);
        for part in [&first, &second] {
            recorder.bytes.extend_from_slice(&(part.0.len() as u32).to_le_bytes());
        }
        recorder.bytes.extend(first.0);
        recorder.bytes.extend(second.0);
        self.recorder = Some(recorder);
    }
}

/// Repeats a log on a new manager. Answers the manager and the number of operations, or `Corrupt`
/// with the number of the first operation whose decision differs.
pub fn replay(log: &[u8]) -> Result<(BlockManager, usize)> {
    let mut reader = Reader::new(log)?;
    let mut manager = BlockManager::new(reader.config()?)?;
    manager.start_log()?;
    manager.take_log();
    let mut operations = 0;
    while !reader.0.is_empty() {
        let rest = reader.0;
        let (operation, _) = reader.record()?;
        let record = &rest[..rest.len() - reader.0.len()];
        Operation::decode(operation)?.run(&mut manager);
        ensure!(
            manager.take_log() == record,
            Corrupt,
            "operation {operations} of the log was decided differently"
        );
        operations += 1;
    }
    Ok((manager, operations))
}

/// What a log says about requests, for a simulator that decides anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TraceEvent {
    /// A prompt became the sequence of this name.
    Admit {
        /// Its name in the log.
        sequence: u64,
        /// The prompt.
        tokens: Vec<i32>,
        /// The tenant's root.
        root: Digest,
    },
    /// A sequence grew by tokens that were not in its prompt.
    Extend {
        /// Its name in the log.
        sequence: u64,
        /// The tokens.
        tokens: Vec<i32>,
    },
    /// A sequence ended.
    End {
        /// Its name in the log.
        sequence: u64,
    },
}

/// The requests of a log in their order, and the tokens of a block.
pub fn trace(log: &[u8]) -> Result<(usize, Vec<TraceEvent>)> {
    let mut reader = Reader::new(log)?;
    let config = reader.config()?;
    let mut events = Vec::new();
    while !reader.0.is_empty() {
        let (operation, outcome) = reader.record()?;
        let mut outcome = Reader(outcome.get(8..).unwrap_or(&[]));
        match Operation::decode(operation)? {
            Operation::Admit { tokens, root, .. } if outcome.byte()? == 0 => {
                events.push(TraceEvent::Admit { sequence: outcome.long()?, tokens, root });
            }
            Operation::Append { ids, tokens } if outcome.byte()? == 0 => {
                let one = |(id, token): (&SequenceId, &i32)| TraceEvent::Extend {
                    sequence: id.0,
                    tokens: vec![*token],
                };
                events.extend(ids.iter().zip(&tokens).map(one));
            }
            Operation::Commit { ids, tokens, .. } if ids.len() == 1 && outcome.byte()? == 0 => {
                events.push(TraceEvent::Extend { sequence: ids[0].0, tokens });
            }
            Operation::Release { ids } if outcome.byte()? == 0 => {
                events.extend(ids.iter().map(|id| TraceEvent::End { sequence: id.0 }));
            }
            _ => {}
        }
    }
    Ok((config.tables.block_size, events))
}

macro_rules! operations {
    ($($code:literal $name:ident $function:ident { $($field:ident: $type:ty [$argument:ty] = $write:ident),* } ;)*) => {
        /// An operation as it was asked for.
        #[derive(Debug)]
        enum Operation {
            $($name { $($field: $type),* },)*
        }

        impl Operation {
            fn decode(bytes: &[u8]) -> Result<Self> {
                let mut reader = Reader(bytes);
                let operation = match reader.byte()? {
                    $($code => Self::$name { $($field: reader.$write()?),* },)*
                    code => bail!(Corrupt, "the log has an operation {code}"),
                };
                ensure!(reader.0.is_empty(), Corrupt, "an operation of the log is too long");
                Ok(operation)
            }
        }

        $(pub(super) fn $function(out: &mut Words, $($field: $argument),*) {
            out.0.push($code);
            $(out.$write($field);)*
        })*
    };
}

operations! {
    1 Reserve reserve { ids: Vec<SequenceId> [&[SequenceId]] = ids, counts: Vec<u32> [&[u32]] = words };
    2 Commit commit {
        ids: Vec<SequenceId> [&[SequenceId]] = ids,
        counts: Vec<u32> [&[u32]] = words,
        tokens: Vec<i32> [&[i32]] = tokens
    };
    3 Append append { ids: Vec<SequenceId> [&[SequenceId]] = ids, tokens: Vec<i32> [&[i32]] = tokens };
    4 Truncate truncate { id: SequenceId [SequenceId] = id, num_tokens: usize [usize] = size };
    5 Fork fork { id: SequenceId [SequenceId] = id };
    6 Release release { ids: Vec<SequenceId> [&[SequenceId]] = ids };
    7 Park park { id: SequenceId [SequenceId] = id };
    8 Resume resume { id: SequenceId [SequenceId] = id };
    9 TakeCopies take_copies {};
    10 Tick tick { now: u64 [u64] = long };
    11 Forget forget { digests: Vec<Digest> [&[Digest]] = digests, group: u8 [u8] = small };
    12 Clear clear {};
    13 Lookup lookup {
        digests: Vec<Digest> [&[Digest]] = digests, group: u8 [u8] = small, deadline: u64 [u64] = long
    };
    14 Pin pin { id: SequenceId [SequenceId] = id, deadline: u64 [u64] = long };
    15 EndLease end_lease { id: LeaseId [LeaseId] = lease };
    16 ExtendLease extend_lease { id: LeaseId [LeaseId] = lease, deadline: u64 [u64] = long };
    17 SetKeep set_keep { id: SequenceId [SequenceId] = id, keep: Keep [Keep] = keep };
    18 KeepEntries keep_entries {
        digests: Vec<Digest> [&[Digest]] = digests, group: u8 [u8] = small, keep: Keep [Keep] = keep
    };
    19 EndSession end_session { session: u64 [u64] = long };
    20 Admit admit_parts {
        tokens: Vec<i32> [&[i32]] = tokens,
        root: Digest [&Digest] = digest,
        digests: Vec<Digest> [&[Digest]] = digests,
        extra: Vec<OwnedExtra> [&[Extra<'_>]] = extra,
        adapter: Vec<u8> [&[u8]] = bytes,
        keep: Keep [Keep] = keep
    };
    21 KeepRange keep_range {
        id: SequenceId [SequenceId] = id,
        start: usize [usize] = size,
        end: usize [usize] = size,
        priority: u8 [u8] = small,
        ttl: u64 [u64] = long
    };
}

pub(super) fn admit(out: &mut Words, request: &Request<'_>, keep: Keep) {
    let adapter = request.adapter.as_bytes();
    admit_parts(out, request.tokens, &request.root, request.digests, request.extra, adapter, keep);
}

impl Operation {
    /// Asks for the same again. Refusals were recorded too, so they are not errors here.
    fn run(self, manager: &mut BlockManager) {
        match self {
            Self::Admit { tokens, root, digests, extra, adapter, keep } => {
                let extra: Vec<Extra<'_>> = extra
                    .iter()
                    .map(|(start, end, kind, key)| Extra {
                        start: *start,
                        end: *end,
                        kind: *kind,
                        key,
                    })
                    .collect();
                let (digests, extra) = (&digests[..], &extra[..]);
                let adapter = &String::from_utf8_lossy(&adapter);
                let request = Request { digests, extra, adapter, ..Request::new(&tokens, root) };
                _ = manager.admit(&request, keep);
            }
            Self::Reserve { ids, counts } => _ = manager.reserve(&ids, &counts),
            Self::Commit { ids, counts, tokens } => _ = manager.commit(&ids, &counts, &tokens),
            Self::Append { ids, tokens } => _ = manager.append(&ids, &tokens),
            Self::Truncate { id, num_tokens } => _ = manager.truncate(id, num_tokens),
            Self::Fork { id } => _ = manager.fork(id),
            Self::Release { ids } => _ = manager.release(&ids),
            Self::Park { id } => _ = manager.park(id),
            Self::Resume { id } => _ = manager.resume(id),
            Self::TakeCopies {} => _ = manager.take_copies(),
            Self::Tick { now } => _ = manager.tick(now),
            Self::Forget { digests, group } => _ = manager.forget(&digests, group),
            Self::Clear {} => _ = manager.clear(),
            Self::Lookup { digests, group, deadline } => {
                _ = manager.lookup_logged(&digests, group, deadline, &mut Vec::new());
            }
            Self::Pin { id, deadline } => _ = manager.pin(id, deadline),
            Self::EndLease { id } => _ = manager.end_lease(id),
            Self::ExtendLease { id, deadline } => _ = manager.extend_lease(id, deadline),
            Self::SetKeep { id, keep } => _ = manager.set_keep(id, keep),
            Self::KeepEntries { digests, group, keep } => {
                _ = manager.keep_entries(&digests, group, keep);
            }
            Self::EndSession { session } => _ = manager.end_session(session),
            Self::KeepRange { id, start, end, priority, ttl } => {
                _ = manager.keep_range(id, Range { start, end, priority, ttl });
            }
        }
    }
}
