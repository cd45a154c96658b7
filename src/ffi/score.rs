//! Scores of the engine's own behind a table of functions.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::convert;
use super::guard::guard;
use super::policy::kvmgr_policy_input;
use super::types::{KVMGR_OK, kvmgr_status};
use crate::error::{Result, bail, ensure};
use crate::policy::custom;
use crate::policy::score::Score;
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::shape::Needs;

/// Flag: the score acts after each decode step too, not only when the prompt ends.
pub const KVMGR_SCORE_EACH_STEP: u32 = 1;

/// A score of the engine's own. Set struct_size to sizeof(kvmgr_score_ops).
///
/// The functions may be called from several threads at once, for different sequences. They must not
/// call the library back, throw or longjmp; pointers are valid during the call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_score_ops {
    /// sizeof(kvmgr_score_ops).
    pub struct_size: usize,
    /// KVMGR_NEEDS_ bits of what it reads: KEYS, VALUES, QUERY_WINDOW, COLUMN_SUM.
    pub needs: u32,
    /// Queries of each head that it reads, at most 4096; not 0 with KVMGR_NEEDS_QUERY_WINDOW.
    pub query_window: u32,
    /// KVMGR_SCORE_EACH_STEP or 0.
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Scores the T tokens of one KV head: input->num_kv_heads is 1, input->kv_head says which it is,
    /// and input->event is 0 always. Higher stays; NaN goes first. out_protected is all 0; what is
    /// set to 1 stays whatever its score. Anything but KVMGR_OK fails the call that ran the policy.
    pub score: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            input: *const kvmgr_policy_input,
            out_scores: *mut f32,
            out_protected: *mut u8,
        ) -> kvmgr_status,
    >,
    /// Called once when the name is taken back and no policy uses the score any more. May be NULL.
    pub destroy: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
}

/// Lets specs name a score of the engine, such as "mine | adakv | keep(0.5)", in the whole process. On
/// failure destroy is not called.
///
/// @param name a word that is no stage of the library
/// @param user_data passed to every function
/// @param ops copied; need not outlive the call
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_register_score(
    name: *const c_char,
    user_data: *mut c_void,
    ops: *const kvmgr_score_ops,
) -> kvmgr_status {
    // SAFETY: the caller passes NULL or a NUL-terminated string, and NULL or a struct that starts with
    // its size; NULL functions are valid for all-zero bytes.
    guard(|| unsafe {
        let name = convert::required_text(name, "name")?;
        let ops = convert::config(ops, "kvmgr_score_ops")?;
        check(&ops)?;
        custom::register(name, || Arc::new(Custom { name: name.into(), user_data, ops }))
    })
}

/// Takes the name of a score back. Policies made with it go on. KVMGR_NOT_FOUND if there is none.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_unregister_score(name: *const c_char) -> kvmgr_status {
    // SAFETY: the caller passes NULL or a NUL-terminated string.
    guard(|| unsafe { custom::unregister(convert::required_text(name, "name")?) })
}

fn check(ops: &kvmgr_score_ops) -> Result<()> {
    let known =
        Needs::KEYS.union(Needs::VALUES).union(Needs::QUERY_WINDOW).union(Needs::COLUMN_SUM);
    let unknown = Needs(ops.needs).without(known).0;
    ensure!(
        unknown == 0,
        InvalidArgument,
        "needs has bits {unknown:#x} that scores cannot ask for"
    );
    let reads_queries = Needs(ops.needs).contains(Needs::QUERY_WINDOW);
    ensure!(
        ops.query_window <= 4096 && (ops.query_window > 0) == reads_queries,
        InvalidArgument,
        "query_window is {}, must be in 1..=4096 with KVMGR_NEEDS_QUERY_WINDOW and 0 without",
        ops.query_window
    );
    let flags = ops.flags;
    ensure!(
        flags & !KVMGR_SCORE_EACH_STEP == 0,
        InvalidArgument,
        "flags has unknown bits {flags:#x}"
    );
    ensure!(ops.reserved == 0, InvalidArgument, "reserved is {}, must be 0", ops.reserved);
    ensure!(ops.score.is_some(), InvalidArgument, "kvmgr_score_ops.score is NULL");
    Ok(())
}

/// The engine's score.
#[derive(Debug)]
struct Custom {
    name: String,
    user_data: *mut c_void,
    ops: kvmgr_score_ops,
}

// SAFETY: the engine promised that its functions may run on any thread, several at once.
unsafe impl Send for Custom {}
// SAFETY: as above.
unsafe impl Sync for Custom {}

impl Score for Custom {
    fn needs(&self) -> Needs {
        Needs(self.ops.needs)
    }

    fn query_window(&self) -> usize {
        self.ops.query_window as usize
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        match self.ops.flags & KVMGR_SCORE_EACH_STEP {
            0 => &[Event::PrefillEnd],
            _ => &[Event::PrefillEnd, Event::Step],
        }
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let heads = layer.heads.iter().enumerate();
        heads.map(|(h, head)| self.score_head(layer, h, head)).collect()
    }
}

impl Custom {
    fn score_head(
        &self,
        layer: &LayerInput<'_>,
        kv_head: usize,
        head: &HeadInput<'_>,
    ) -> Result<HeadScores> {
        let len = head.positions.len();
        let mut scores = vec![0.0f32; len];
        let mut protected = vec![0u8; len];
        if len > 0 {
            let Some(score) = self.ops.score else { bail!(Internal, "score is NULL") };
            let mut sums = head.column_sums.to_vec();
            sums.resize(len, 0.0);
            let input = input(layer, kv_head, head, &sums);
            // SAFETY: the engine's function with its pointer, an input and room for len answers each.
            let status = unsafe {
                score(self.user_data, &raw const input, scores.as_mut_ptr(), protected.as_mut_ptr())
            };
            if status != KVMGR_OK {
                bail!(InvalidState, "the engine's score {} answered {status}", self.name);
            }
        }
        Ok(HeadScores { scores, protected: protected.iter().map(|byte| *byte != 0).collect() })
    }
}

/// One KV head as C sees it.
fn input(
    layer: &LayerInput<'_>,
    kv_head: usize,
    head: &HeadInput<'_>,
    column_sums: &[f32],
) -> kvmgr_policy_input {
    kvmgr_policy_input {
        layer: layer.layer as u32,
        num_layers: layer.num_layers as u32,
        num_q_heads: layer.group as u32,
        num_kv_heads: 1,
        head_dim: layer.head_dim as u32,
        value_dim: layer.value_dim as u32,
        num_tokens: head.positions.len() as u32,
        num_queries: head.num_queries as u32,
        keys: head.keys.as_ptr(),
        values: head.values.as_ptr(),
        queries: head.queries.as_ptr(),
        column_sums: column_sums.as_ptr(),
        positions: head.positions.as_ptr(),
        kv_head: kv_head as u32,
        ..kvmgr_policy_input::EMPTY
    }
}

impl Drop for Custom {
    fn drop(&mut self) {
        if let Some(destroy) = self.ops.destroy {
            // SAFETY: the last use of the engine's pointer.
            unsafe { destroy(self.user_data) };
        }
    }
}
