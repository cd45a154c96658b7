//! The block manager through the C ABI: every call and every error it can give.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

#[path = "../common/mod.rs"]
mod common;
mod index;
mod records;
mod retention;
mod settings;
mod tables;

use std::ffi::CStr;
use std::ptr::null_mut;

use kvmgr::ffi::pool::*;
use kvmgr::ffi::pool_index::*;
use kvmgr::ffi::pool_request::*;
use kvmgr::ffi::pool_sequence::*;
use kvmgr::ffi::pool_stats::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::kvmgr_last_error_message;

pub(crate) const SIZE: usize = 4;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

#[track_caller]
pub(crate) fn ok(status: kvmgr_status) {
    assert_eq!(status, KVMGR_OK, "{}", message());
}

#[track_caller]
pub(crate) fn refused(status: kvmgr_status, expected: kvmgr_status, text: &str) {
    assert_eq!(status, expected, "{}", message());
    assert!(message().contains(text), "{text:?} is not in {:?}", message());
}

pub(crate) fn config(num_blocks: u64, flags: u32) -> kvmgr_pool_config {
    // SAFETY: zero is valid for every field.
    let mut config: kvmgr_pool_config = unsafe { std::mem::zeroed() };
    config.struct_size = size_of::<kvmgr_pool_config>();
    (config.num_blocks, config.block_size, config.flags) = (num_blocks, SIZE as u32, flags);
    config
}

pub(crate) fn create(config: &kvmgr_pool_config) -> *mut kvmgr_pool {
    let mut pool = null_mut();
    // SAFETY: a valid configuration and a place.
    ok(unsafe { kvmgr_pool_create(config, &raw mut pool) });
    pool
}

pub(crate) fn request(tokens: &[i32]) -> kvmgr_pool_request {
    // SAFETY: zero is valid for every field.
    let mut request: kvmgr_pool_request = unsafe { std::mem::zeroed() };
    (request.tokens, request.num_tokens) = (tokens.as_ptr(), tokens.len());
    request
}

pub(crate) fn try_admit(
    pool: *mut kvmgr_pool,
    request: &kvmgr_pool_request,
) -> (kvmgr_status, kvmgr_pool_admission) {
    // SAFETY: zero is valid for every field; room for one answer.
    unsafe {
        let (mut admission, mut num) = (std::mem::zeroed(), 0);
        let status = kvmgr_pool_admit(pool, request, 1, &raw mut admission, &raw mut num);
        assert_eq!(num, usize::from(status == KVMGR_OK));
        (status, admission)
    }
}

/// Admits a prompt and commits all of it.
pub(crate) fn start(pool: *mut kvmgr_pool, request: &kvmgr_pool_request) -> kvmgr_pool_admission {
    let (status, admission) = try_admit(pool, request);
    ok(status);
    let rest = [request.num_tokens as u32 - admission.num_cached as u32];
    ok(commit(pool, admission.sequence, &rest, &[]));
    admission
}

pub(crate) fn commit(
    pool: *mut kvmgr_pool,
    sequence: u64,
    count: &[u32; 1],
    tokens: &[i32],
) -> kvmgr_status {
    // SAFETY: lists of the lengths that are passed.
    unsafe { kvmgr_pool_commit(pool, &sequence, count.as_ptr(), 1, tokens.as_ptr(), tokens.len()) }
}

pub(crate) fn reserve(pool: *mut kvmgr_pool, sequence: u64, count: u32) -> kvmgr_status {
    // SAFETY: lists of one.
    unsafe { kvmgr_pool_reserve(pool, &sequence, &count, 1) }
}

pub(crate) fn append(pool: *mut kvmgr_pool, sequence: u64, token: i32) -> kvmgr_status {
    // SAFETY: lists of one.
    unsafe { kvmgr_pool_append(pool, &sequence, &token, 1) }
}

pub(crate) fn end(pool: *mut kvmgr_pool, sequence: u64) -> kvmgr_status {
    // SAFETY: a list of one.
    unsafe { kvmgr_pool_end(pool, &sequence, 1) }
}

pub(crate) fn stats(pool: *const kvmgr_pool) -> kvmgr_pool_stats {
    let mut stats =
        kvmgr_pool_stats { struct_size: size_of::<kvmgr_pool_stats>(), ..Default::default() };
    // SAFETY: a struct with its size.
    ok(unsafe { kvmgr_pool_get_stats(pool, &raw mut stats) });
    stats
}

pub(crate) fn hashes(pool: *mut kvmgr_pool, request: &kvmgr_pool_request) -> Vec<u8> {
    let mut num = 0;
    // SAFETY: room for as many hashes as are asked for.
    unsafe {
        ok(kvmgr_pool_hash(pool, request, null_mut(), 0, &raw mut num));
        let mut out = vec![0; num * 32];
        ok(kvmgr_pool_hash(pool, request, out.as_mut_ptr(), num, &raw mut num));
        out
    }
}

pub(crate) fn lookup(
    pool: *mut kvmgr_pool,
    hashes: &[u8],
    deadline: u64,
) -> (usize, *mut kvmgr_lease) {
    let (mut found, mut lease) = (0, null_mut());
    let num = hashes.len() / 32;
    let mut blocks = vec![0u32; num];
    // SAFETY: room for as many blocks as hashes.
    ok(unsafe {
        kvmgr_pool_lookup(
            pool,
            hashes.as_ptr(),
            num,
            0,
            deadline,
            blocks.as_mut_ptr(),
            &raw mut found,
            &raw mut lease,
        )
    });
    (found, lease)
}
