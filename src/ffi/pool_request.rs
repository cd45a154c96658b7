//! Prompts that want to become sequences of a pool, and what became of them.

use std::ffi::c_char;

use super::convert;
use super::pool::digests;
use super::pool_sequence::kvmgr_pool_sequence;
use crate::block::Admission;
use crate::block::groups::Reason;
use crate::block::keys::{Extra, Kind};
use crate::block::manager::{BlockManager, Keep};
use crate::block::pool::DEFAULT_PRIORITY;
use crate::block::prefix::{Digest, Hash};
use crate::block::tables::Request;
use crate::error::{Result, bail, ensure};

/// Why a match ended.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_miss(pub u32);
/// It did not: everything but the last token, which is always computed, was cached.
pub const KVMGR_MISS_NONE: kvmgr_miss = kvmgr_miss(0);
/// Tokens that were never seen, as far as is remembered.
pub const KVMGR_MISS_UNKNOWN: kvmgr_miss = kvmgr_miss(1);
/// An entry that has been reclaimed.
pub const KVMGR_MISS_EVICTED: kvmgr_miss = kvmgr_miss(2);
/// Blocks of a window group are missing.
pub const KVMGR_MISS_WINDOW: kvmgr_miss = kvmgr_miss(3);
/// A recurrent group has no state at a usable place.
pub const KVMGR_MISS_CHECKPOINT: kvmgr_miss = kvmgr_miss(4);

/// What an extra key is.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_key_kind(pub u32);
/// The identifier of an image or another input behind placeholder tokens. Its distance from the
/// start of the block is hashed with it, which tells its parts apart.
pub const KVMGR_KEY_ITEM: kvmgr_key_kind = kvmgr_key_kind(0);
/// A text.
pub const KVMGR_KEY_TEXT: kvmgr_key_kind = kvmgr_key_kind(1);
/// Bytes: the hash of prompt embeddings.
pub const KVMGR_KEY_BYTES: kvmgr_key_kind = kvmgr_key_kind(2);

/// What distinguishes equal tokens of a prompt: the hash of the image behind placeholder tokens. It
/// becomes part of the hash of every block that the tokens touch, and events tell it. With
/// KVMGR_HASH_VLLM items and texts are UTF-8.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_extra_key {
    /// First token.
    pub start: u64,
    /// Behind the last token.
    pub end: u64,
    /// The key.
    pub key: *const u8,
    /// Bytes of the key.
    pub key_size: usize,
    /// KVMGR_KEY_ITEM, _TEXT or _BYTES.
    pub kind: kvmgr_key_kind,
    /// Must be 0.
    pub reserved: u32,
}

/// A prompt that wants to become a sequence. Zero the struct; every zero but tokens is a default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_request {
    /// The prompt, at least one token.
    pub tokens: *const i32,
    /// How many.
    pub num_tokens: usize,
    /// NULL, or 32 bytes for each full block of the prompt, in place of hashing here. The caller is
    /// then the one who keeps tenants apart.
    pub hashes: *const u8,
    /// 0, or the full blocks of the prompt.
    pub num_hashes: usize,
    /// The operator's secret for this tenant: prompts with different salts share nothing and learn
    /// nothing of one another. NULL for none.
    pub salt: *const u8,
    /// Bytes of the salt.
    pub salt_size: usize,
    /// NULL, or keys of parts of the prompt.
    pub extra_keys: *const kvmgr_extra_key,
    /// How many.
    pub num_extra_keys: usize,
    /// The name of the adapter (LoRA) that computes the sequence, which shares nothing with others.
    /// Events tell it. NULL or "" for none.
    pub adapter: *const c_char,
    /// Microseconds after the sequence ends until its entries are reclaimed before all others; 0
    /// for never.
    pub ttl: u64,
    /// The session that the sequence is a state of; 0 for none. When it ends, entries of the state
    /// before that it does not share are reclaimed before all others.
    pub session: u64,
    /// Priority of its entries, 1 to 100, with an evictor that knows priorities; 0 means 35.
    pub priority: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// A prompt that became a sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_admission {
    /// Its name.
    pub sequence: kvmgr_pool_sequence,
    /// Tokens that were cached; they are committed.
    pub num_cached: u64,
    /// Of these, tokens in a block that the engine copies: kvmgr_pool_take_copies.
    pub num_copied: u64,
    /// The first token that was not cached, before copies.
    pub miss_token: u64,
    /// Why not.
    pub miss: kvmgr_miss,
    /// The group that ended the match.
    pub miss_group: u32,
}

/// A request whose pointers are checked.
pub(super) struct Parsed<'a> {
    tokens: &'a [i32],
    digests: &'a [Digest],
    salt: &'a [u8],
    extra: Vec<Extra<'a>>,
    adapter: &'a str,
    pub(super) keep: Keep,
}

impl<'a> Parsed<'a> {
    /// # Safety
    /// The request's pointers are what the header says, for `'a`.
    pub(super) unsafe fn new(request: &'a kvmgr_pool_request) -> Result<Self> {
        ensure!(
            request.reserved == 0,
            InvalidArgument,
            "reserved is {}, must be 0",
            request.reserved
        );
        // SAFETY: the caller promises the lists.
        let (tokens, digests, salt, keys) = unsafe {
            (
                convert::slice(request.tokens, request.num_tokens, "tokens")?,
                digests(request.hashes, request.num_hashes, "hashes")?,
                convert::slice(request.salt, request.salt_size, "salt")?,
                convert::slice(request.extra_keys, request.num_extra_keys, "extra_keys")?,
            )
        };
        let mut extra = Vec::with_capacity(keys.len());
        for it in keys {
            // SAFETY: the caller promises the key.
            let key = unsafe { convert::slice(it.key, it.key_size, "extra_keys.key") }?;
            let limit = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
            ensure!(
                it.reserved == 0,
                InvalidArgument,
                "reserved of an extra key is {}, must be 0",
                it.reserved
            );
            let Some(kind) = Kind::ALL.get(it.kind.0 as usize) else {
                bail!(InvalidArgument, "kind is {}, not a kvmgr_key_kind", it.kind.0);
            };
            extra.push(Extra { start: limit(it.start), end: limit(it.end), kind: *kind, key });
        }
        // SAFETY: the caller promises NULL or a string.
        let adapter = unsafe { convert::text(request.adapter, "adapter") }?.unwrap_or("");
        let keep = keep(request.priority, request.ttl, request.session)?;
        Ok(Self { tokens, digests, salt, extra, adapter, keep })
    }

    /// The request below the root of its tenant.
    pub(super) fn with<R>(
        &self,
        manager: &mut BlockManager,
        body: impl FnOnce(&mut BlockManager, &Request<'_>) -> Result<R>,
    ) -> Result<R> {
        let root = manager.root(self.salt, self.adapter);
        let mut extra = self.extra.clone();
        if manager.config().tables.hash == Hash::VllmCbor {
            let texts = extra.iter().filter(|it| it.kind != Kind::Bytes).map(|it| it.key);
            for key in texts.chain([self.salt]) {
                let is_text = std::str::from_utf8(key).is_ok();
                ensure!(is_text, InvalidArgument, "salts and extra keys of vLLM are UTF-8 texts");
            }
            if !self.salt.is_empty() && !self.tokens.is_empty() {
                extra.push(Extra { start: 0, end: 1, kind: Kind::Text, key: self.salt });
            }
        }
        let (digests, adapter) = (self.digests, self.adapter);
        let request =
            Request { digests, extra: &extra, adapter, ..Request::new(self.tokens, root) };
        body(manager, &request)
    }
}

/// What C says about retention.
pub(super) fn keep(priority: u32, ttl: u64, session: u64) -> Result<Keep> {
    let limit = u32::from(crate::block::pool::MAX_PRIORITY);
    ensure!(priority <= limit, InvalidArgument, "priority is {priority}, must be in 0..={limit}");
    let priority = if priority == 0 { DEFAULT_PRIORITY } else { priority as u8 };
    Ok(Keep { priority, ttl, session })
}

pub(super) fn to_c(admission: &Admission) -> kvmgr_pool_admission {
    kvmgr_pool_admission {
        sequence: admission.id.0,
        num_cached: admission.num_cached as u64,
        num_copied: admission.num_copied as u64,
        miss_token: admission.miss.token as u64,
        miss: match admission.miss.reason {
            Reason::Complete => KVMGR_MISS_NONE,
            Reason::Unknown => KVMGR_MISS_UNKNOWN,
            Reason::Evicted => KVMGR_MISS_EVICTED,
            Reason::Window => KVMGR_MISS_WINDOW,
            Reason::Checkpoint => KVMGR_MISS_CHECKPOINT,
        },
        miss_group: admission.miss.group as u32,
    }
}
