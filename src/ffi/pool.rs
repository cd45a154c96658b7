//! Pools: block bookkeeping without memory, for engines with their own tensors.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::convert;
use super::guard::{guard, guard_or};
use super::handle::{self, Opaque};
use super::types::kvmgr_status;
use crate::block::TablesConfig;
use crate::block::groups::{Group, MAX_GROUPS};
use crate::block::manager::{self, BlockConfig, BlockManager, LeaseId};
use crate::block::prefix::{self, Digest, Hash};
use crate::error::{Result, bail, ensure};

/// A paged block allocator with reference counts, copy-on-write forks and a prefix index, for an
/// engine whose keys and values are in its own memory. Shared: retain and release, any thread.
/// Calls on one pool wait for one another; kvmgr_pool_lookup runs beside itself.
///
/// One step of an engine, with one call for all its sequences:
///   kvmgr_pool_admit(requests)        new prompts: what is cached, blocks for the rest
///   kvmgr_pool_take_copies            copies to make before anything is written
///   kvmgr_pool_slot_mapping           where the rows of reserved tokens go
///   ... the engine computes ...
///   kvmgr_pool_commit(prompt pieces)  what has been written can be found by others
///   kvmgr_pool_append(tokens)         commits one token of each and reserves the next
///   kvmgr_pool_end(sequences)         blocks stay cached until somebody needs their place
#[derive(Debug)]
pub struct kvmgr_pool {
    _opaque: [u8; 0],
}

/// What a kvmgr_pool holds; its leases hold it too.
pub(super) struct PoolHandle(pub(super) Arc<Shared>);

/// The manager behind its lock.
pub(super) struct Shared {
    manager: RwLock<BlockManager>,
    /// Leases whose handles died while the lock could not be taken.
    returned: Mutex<Vec<LeaseId>>,
    pub(super) listener: Mutex<Option<Listener>>,
}

/// The engine's function for events.
pub(super) struct Listener {
    pub(super) user_data: *mut c_void,
    pub(super) function: unsafe extern "C" fn(*mut c_void, u64, *const c_void, usize),
    pub(super) destroy: Option<unsafe extern "C" fn(*mut c_void)>,
}

// SAFETY: the engine promises that its functions may run on any thread.
unsafe impl Send for Listener {}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the engine's function with the engine's pointer, once.
            unsafe { destroy(self.user_data) };
        }
    }
}

impl Opaque for kvmgr_pool {
    type Inner = PoolHandle;
    const NAME: &'static str = "kvmgr_pool";
}

thread_local! {
    /// Whether this thread runs a callback of a pool, which holds the pool's lock.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Runs an engine's function that must not call the pool back.
pub(super) fn in_callback(body: impl FnOnce()) {
    IN_CALLBACK.set(true);
    body();
    IN_CALLBACK.set(false);
}

impl Shared {
    /// Shared access.
    pub(super) fn read<R>(&self, body: impl FnOnce(&BlockManager) -> Result<R>) -> Result<R> {
        check_callback()?;
        body(&self.manager.read())
    }

    /// Exclusive access; events that it caused go to the listener before it ends.
    pub(super) fn write<R>(&self, body: impl FnOnce(&mut BlockManager) -> Result<R>) -> Result<R> {
        check_callback()?;
        let mut manager = self.manager.write();
        for id in self.returned.lock().drain(..) {
            // The deadline may have passed meanwhile, which is as good.
            _ = manager.end_lease(id);
        }
        let result = body(&mut manager);
        if manager.pool().events().is_some()
            && let Some(listener) = &*self.listener.lock()
        {
            while let Some((number, bytes)) = manager.publish() {
                let (data, size) = (bytes.as_ptr().cast(), bytes.len());
                // SAFETY: the engine's function with the engine's pointer and live bytes.
                in_callback(|| unsafe {
                    (listener.function)(listener.user_data, number, data, size)
                });
            }
        }
        result
    }

    /// Gives a lease back, at once if that is possible here.
    pub(super) fn end_lease(&self, id: LeaseId) {
        self.returned.lock().push(id);
        if !IN_CALLBACK.get() {
            _ = self.write(|_| Ok(()));
        }
    }
}

fn check_callback() -> Result<()> {
    ensure!(!IN_CALLBACK.get(), Busy, "a callback of a pool must not call a pool");
    Ok(())
}

/// Exclusive access to the manager behind a handle.
pub(super) fn write<R>(
    pool: *const kvmgr_pool,
    body: impl FnOnce(&mut BlockManager) -> Result<R>,
) -> Result<R> {
    handle::with(pool, |pool| pool.0.write(body))
}

/// Shared access to the manager behind a handle.
pub(super) fn read<R>(
    pool: *const kvmgr_pool,
    body: impl FnOnce(&BlockManager) -> Result<R>,
) -> Result<R> {
    handle::with(pool, |pool| pool.0.read(body))
}

/// Flag: full blocks are kept after their sequence ends and shared by prefix.
pub const KVMGR_POOL_PREFIX: u32 = 1;
/// Flag: a full block whose prefix is cached already gives way to that one, so the block tables of
/// sequences change behind their end. Without it they only grow.
pub const KVMGR_POOL_DEDUP: u32 = 2;
/// Flag: a prompt that parts from all cached ones within a block copies the rows before. Costs 4
/// bytes for each token of the pool. One full or latent group only.
pub const KVMGR_POOL_PARTIAL: u32 = 4;
/// Flag: operations and decisions are recorded, see kvmgr_pool_take_log. Lookups then wait for one
/// another.
pub const KVMGR_POOL_LOG: u32 = 8;
/// Flag: blocks that are handed out with the bytes of a sequence before are listed, so that the
/// engine can wipe or poison them first: kvmgr_pool_take_recycled.
pub const KVMGR_POOL_RECYCLED: u32 = 16;

/// How prefixes are named.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_hash(pub u32);
/// SHA-256 of tokens and the hash before them; the fastest.
pub const KVMGR_HASH_NATIVE: kvmgr_hash = kvmgr_hash(0);
/// vLLM's sha256_cbor, so that its routers compute the same.
pub const KVMGR_HASH_VLLM: kvmgr_hash = kvmgr_hash(1);

/// What the layers of a group keep.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_group_kind(pub u32);
/// Keys and values of every token.
pub const KVMGR_GROUP_FULL: kvmgr_group_kind = kvmgr_group_kind(0);
/// One latent row of every token (MLA).
pub const KVMGR_GROUP_LATENT: kvmgr_group_kind = kvmgr_group_kind(1);
/// Keys and values of the last `value` tokens; older blocks go back to the pool.
pub const KVMGR_GROUP_WINDOW: kvmgr_group_kind = kvmgr_group_kind(2);
/// A state that every token changes, kept at the end of every `value`-th block.
pub const KVMGR_GROUP_RECURRENT: kvmgr_group_kind = kvmgr_group_kind(3);

/// A group of layers of a hybrid model. Every group has a block table of its own; all draw from the
/// same blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_group {
    /// What it keeps.
    pub kind: kvmgr_group_kind,
    /// Tokens of a window or blocks between states, at least 1; 0 for the other kinds.
    pub value: u32,
}

/// Settings of a pool. Set struct_size to its sizeof; every other zero means the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_config {
    /// sizeof(kvmgr_pool_config).
    pub struct_size: usize,
    /// Blocks, 1 to 2^31.
    pub num_blocks: u64,
    /// Tokens of a block, 1 to 1024; 0 means 16.
    pub block_size: u32,
    /// KVMGR_POOL_PREFIX, _DEDUP, _PARTIAL, _LOG, _RECYCLED or 0.
    pub flags: u32,
    /// The evictor's spec; NULL means "lru".
    pub evictor: *const c_char,
    /// The operator's secret that separates pools' prefixes.
    pub hash_salt: u64,
    /// Blocks that admission leaves available for sequences that run.
    pub watermark: u64,
    /// What else distinguishes prefixes: model, layout, number format. NULL means "".
    pub scope: *const c_char,
    /// With KVMGR_HASH_VLLM the text of PYTHONHASHSEED, which names the root; NULL means "0".
    pub hash_seed: *const c_char,
    /// Groups of a hybrid model; NULL means one full group.
    pub groups: *const kvmgr_group,
    /// How many, 0 to 16.
    pub num_groups: u32,
    /// KVMGR_HASH_NATIVE or KVMGR_HASH_VLLM.
    pub hash: kvmgr_hash,
}

/// Makes a pool.
///
/// @param config settings; num_blocks is required
/// @param out_pool receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_create(
    config: *const kvmgr_pool_config,
    out_pool: *mut *mut kvmgr_pool,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_pool, "out_pool") }?;
        // SAFETY: the caller passes NULL or a struct that starts with its size.
        let config = unsafe { convert::config(config, "kvmgr_pool_config") }?;
        let known = KVMGR_POOL_PREFIX
            | KVMGR_POOL_DEDUP
            | KVMGR_POOL_PARTIAL
            | KVMGR_POOL_LOG
            | KVMGR_POOL_RECYCLED;
        let unknown = config.flags & !known;
        ensure!(unknown == 0, InvalidArgument, "flags has unknown bits {unknown:#x}");
        // SAFETY: the caller passes strings and groups.
        let mut manager = BlockManager::new(unsafe { block_config(&config) }?)?;
        if config.flags & KVMGR_POOL_LOG != 0 {
            manager.start_log()?;
        }
        *out = handle::create(PoolHandle(Arc::new(Shared {
            manager: RwLock::new(manager),
            returned: Mutex::new(Vec::new()),
            listener: Mutex::new(None),
        })))?;
        Ok(())
    })
}

/// # Safety
/// The pointers of the configuration are what the header says.
unsafe fn block_config(config: &kvmgr_pool_config) -> Result<BlockConfig> {
    // SAFETY: the caller promises NULL or NUL-terminated strings.
    let (evictor, scope, seed) = unsafe {
        (
            convert::text(config.evictor, "evictor")?,
            convert::text(config.scope, "scope")?,
            convert::text(config.hash_seed, "hash_seed")?,
        )
    };
    let num_groups = config.num_groups as usize;
    ensure!(
        num_groups <= MAX_GROUPS,
        InvalidArgument,
        "num_groups is {num_groups}, must be in 0..={MAX_GROUPS}"
    );
    // SAFETY: the caller promises the groups.
    let groups = unsafe { convert::slice(config.groups, num_groups, "groups") }?;
    let mut groups: Vec<Group> = groups.iter().map(parse_group).collect::<Result<_>>()?;
    if groups.is_empty() {
        groups.push(Group::Full);
    }
    let block_size = if config.block_size == 0 { 16 } else { config.block_size as usize };
    ensure!(
        block_size <= 1024,
        InvalidArgument,
        "block_size is {block_size}, must be at most 1024"
    );
    let has = |flag: u32| config.flags & flag != 0;
    let prefix = has(KVMGR_POOL_PREFIX);
    ensure!(
        prefix || !(has(KVMGR_POOL_DEDUP) || has(KVMGR_POOL_PARTIAL)),
        InvalidArgument,
        "flags is {:#x}: DEDUP and PARTIAL need PREFIX",
        config.flags
    );
    let (hash, root) = match config.hash {
        KVMGR_HASH_NATIVE => {
            let scope = scope.unwrap_or("").as_bytes();
            (Hash::Native, prefix::root(block_size, config.hash_salt, scope))
        }
        KVMGR_HASH_VLLM => {
            ensure!(
                config.hash_salt == 0 && scope.is_none(),
                InvalidArgument,
                "hash_salt and scope are not part of vLLM's hashes; use hash_seed"
            );
            (Hash::VllmCbor, prefix::vllm_root(seed.unwrap_or("0")))
        }
        kvmgr_hash(value) => bail!(InvalidArgument, "hash is {value}, not a kvmgr_hash"),
    };
    let dedup = has(KVMGR_POOL_DEDUP);
    let watermark = to_usize(config.watermark, "watermark")?;
    Ok(BlockConfig {
        num_blocks: to_usize(config.num_blocks, "num_blocks")?,
        evictor: evictor.unwrap_or("lru").to_string(),
        tables: TablesConfig { block_size, groups, hash, prefix, dedup, watermark },
        root,
        partial: has(KVMGR_POOL_PARTIAL),
        recycled: has(KVMGR_POOL_RECYCLED),
    })
}

fn parse_group(group: &kvmgr_group) -> Result<Group> {
    let parsed = match group.kind {
        KVMGR_GROUP_FULL => Group::Full,
        KVMGR_GROUP_LATENT => Group::Latent,
        KVMGR_GROUP_WINDOW => Group::Window(group.value),
        KVMGR_GROUP_RECURRENT => Group::Recurrent(group.value),
        kvmgr_group_kind(kind) => {
            bail!(InvalidArgument, "groups has a kind {kind}, not a kvmgr_group_kind")
        }
    };
    let has_value = matches!(parsed, Group::Window(_) | Group::Recurrent(_));
    ensure!(
        has_value || group.value == 0,
        InvalidArgument,
        "groups has a value {} where the kind has none",
        group.value
    );
    parsed.validate()?;
    Ok(parsed)
}

/// Adds a reference; answers the same handle, or NULL if it is not a live pool.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_retain(pool: *mut kvmgr_pool) -> *mut kvmgr_pool {
    guard_or(std::ptr::null_mut(), || handle::retain(pool))
}

/// Drops a reference. NULL is fine. Leases keep the pool alive; its sequences end with it.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_release(pool: *mut kvmgr_pool) {
    guard(|| handle::release(pool));
}

/// Sets the clock of a pool in microseconds: leases and times to live that have passed end. The
/// clock is the engine's alone and starts at 0; it never goes back.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_tick(pool: *mut kvmgr_pool, now: u64) -> kvmgr_status {
    guard(|| write(pool, |manager| manager.tick(now)))
}

/// Reclaims every entry of the prefix index that nobody holds.
///
/// @param out_num receives how many there were; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_clear(
    pool: *mut kvmgr_pool,
    out_num: *mut usize,
) -> kvmgr_status {
    guard(|| {
        let cleared = write(pool, |manager| Ok(manager.clear()))?;
        if !out_num.is_null() {
            // SAFETY: the caller passes NULL or a place for a number.
            *unsafe { convert::output(out_num, "out_num") }? = cleared;
        }
        Ok(())
    })
}

/// What KVMGR_POOL_LOG recorded since the last call: operations and decisions, to be put together
/// in order. kvmgr_pool_replay repeats them.
///
/// @param out room for capacity bytes; NULL with capacity 0 asks for the size alone, takes nothing
/// @param out_size receives the number of bytes
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_take_log(
    pool: *mut kvmgr_pool,
    out: *mut c_void,
    capacity: usize,
    out_size: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room.
    guard(|| unsafe {
        let size = convert::output(out_size, "out_size")?;
        write(pool, |manager| {
            ensure!(manager.is_logged(), InvalidState, "the pool was made without KVMGR_POOL_LOG");
            let needed = manager.log_len();
            let room = convert::room(out.cast::<u8>(), capacity, needed, ("out", "bytes"))?;
            if let Some(out) = room {
                out.copy_from_slice(&manager.take_log());
            }
            *size = needed;
            Ok(())
        })
    })
}

/// Repeats a whole log on a new pool. KVMGR_CORRUPT if it is not one, or if any decision differs
/// in a single byte.
///
/// @param log the bytes of every kvmgr_pool_take_log of one pool, in order
/// @param out_num_operations receives how many operations were repeated
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_replay(
    log: *const c_void,
    size: usize,
    out_num_operations: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes bytes and a place for a number.
    guard(|| unsafe {
        let log = convert::slice(log.cast::<u8>(), size, "log")?;
        let out = convert::output(out_num_operations, "out_num_operations")?;
        *out = manager::replay(log)?.1;
        Ok(())
    })
}

/// 32-byte hashes, one after the other.
///
/// # Safety
/// As for [`convert::slice`], with 32 bytes for each of `num`.
pub(super) unsafe fn digests<'a>(
    hashes: *const u8,
    num: usize,
    name: &str,
) -> Result<&'a [Digest]> {
    // SAFETY: the caller promises it; an array of bytes needs no alignment.
    unsafe { convert::slice(hashes.cast::<Digest>(), num, name) }
}

/// A 64-bit number as a size of this machine.
pub(super) fn to_usize(value: u64, name: &str) -> Result<usize> {
    match usize::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!(InvalidArgument, "{name} is {value}, larger than this machine can address"),
    }
}
