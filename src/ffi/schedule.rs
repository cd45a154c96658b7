//! Help for schedulers. Pure functions: no handle, no state.

use super::convert;
use super::guard::guard;
use super::pool::{kvmgr_pool, read};
use super::types::kvmgr_status;
use crate::block::schedule::{self, Running, Waiting};
use crate::error::{bail, ensure};

/// A request that waits.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_waiting {
    /// Blocks of its prompt that are cached now.
    pub cached_blocks: u32,
    /// Blocks that it needs besides.
    pub needed_blocks: u32,
    /// Whose it is.
    pub tenant: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Microseconds that it has waited.
    pub waited: u64,
}

/// A sequence that runs.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_running {
    /// Blocks that become available if it goes: those that nobody shares.
    pub own_blocks: u32,
    /// Tokens to compute again if it comes back without its blocks.
    pub tokens: u32,
    /// Sequences of lower priority go first.
    pub priority: u32,
    /// Must be 0.
    pub reserved: u32,
    /// When it was admitted; among equals the youngest goes first.
    pub admitted: u64,
}

/// Tokens that can be admitted now even if nothing of them is cached, above the watermark.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_num_admissible(
    pool: *const kvmgr_pool,
    out_num_tokens: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a place for a number.
    guard(|| unsafe {
        let out = convert::output(out_num_tokens, "out_num_tokens")?;
        *out = read(pool, |manager| Ok(manager.num_admissible_tokens()))?;
        Ok(())
    })
}

/// The order in which to admit requests, as indices: who has waited `patience` microseconds or
/// longer first, so that nobody starves; then tenants in turn; within a tenant the longest cached
/// prefix first.
///
/// @param available blocks that may be used
/// @param out_order room for num_waiting indices
/// @param out_num_fitting receives how many of them fit one after the other
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_schedule_admission(
    waiting: *const kvmgr_waiting,
    num_waiting: usize,
    patience: u64,
    available: usize,
    out_order: *mut u32,
    out_num_fitting: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists of that length.
    guard(|| unsafe {
        let waiting = convert::slice(waiting, num_waiting, "waiting")?;
        let out = convert::slice_mut(out_order, num_waiting, "out_order")?;
        let fitting = convert::output(out_num_fitting, "out_num_fitting")?;
        let used = waiting.iter().all(|it| it.reserved == 0);
        ensure!(used, InvalidArgument, "reserved of a kvmgr_waiting must be 0");
        let list: Vec<Waiting> = waiting
            .iter()
            .map(|it| Waiting {
                cached_blocks: it.cached_blocks,
                needed_blocks: it.needed_blocks,
                tenant: it.tenant,
                waited: it.waited,
            })
            .collect();
        let order = schedule::admission_order(&list, patience);
        *fitting = schedule::num_admissible(&list, &order, available);
        out.copy_from_slice(&order);
        Ok(())
    })
}

/// Whom to preempt so that `needed` blocks become available, as indices: the lowest priority first,
/// then the youngest; nobody who need not go. KVMGR_OUT_OF_BLOCKS if all of them free too few.
///
/// @param out_victims room for num_running indices
/// @param out_num_victims receives how many go
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_schedule_preemption(
    running: *const kvmgr_running,
    num_running: usize,
    needed: usize,
    out_victims: *mut u32,
    out_num_victims: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists of that length.
    guard(|| unsafe {
        let running = convert::slice(running, num_running, "running")?;
        let out = convert::slice_mut(out_victims, num_running, "out_victims")?;
        let num = convert::output(out_num_victims, "out_num_victims")?;
        let used = running.iter().all(|it| it.reserved == 0);
        ensure!(used, InvalidArgument, "reserved of a kvmgr_running must be 0");
        let list: Vec<Running> = running
            .iter()
            .map(|it| Running {
                own_blocks: it.own_blocks,
                tokens: it.tokens,
                priority: it.priority,
                admitted: it.admitted,
            })
            .collect();
        let Some(victims) = schedule::preemption(&list, needed) else {
            bail!(
                OutOfBlocks,
                "all {num_running} sequences together free fewer than {needed} blocks"
            );
        };
        *num = victims.len();
        out[..victims.len()].copy_from_slice(&victims);
        Ok(())
    })
}

/// Which layers of a prompt keep their blocks on the device when there is room for `available`
/// blocks and each layer needs `per_layer`: as many as fit, spread evenly, so that the others are
/// written out while those are computed.
///
/// @param num_layers at least 1
/// @param out_on_device room for num_layers bytes: 1 for layers that stay, 0 for others
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_schedule_layers(
    num_layers: usize,
    per_layer: usize,
    available: usize,
    out_on_device: *mut u8,
) -> kvmgr_status {
    // SAFETY: the caller passes room of that size.
    guard(|| unsafe {
        ensure!(num_layers > 0, InvalidArgument, "num_layers is 0, must be at least 1");
        let out = convert::slice_mut(out_on_device, num_layers, "out_on_device")?;
        let layers = schedule::layers_on_device(num_layers, per_layer, available);
        out.iter_mut().zip(layers).for_each(|(out, stays)| *out = u8::from(stays));
        Ok(())
    })
}
