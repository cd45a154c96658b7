//! A decode step of three sequences of one layer in buffers that stay, as a captured graph wants them.

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::types::kvmgr_tensor;

use crate::driver::Buffer;
use crate::twin::{Setup, Twin, ok, run};

/// Sequences, each with one token.
pub const TOKENS: usize = 3;

/// Key, value, query and output of the step, and its LSE.
#[derive(Debug)]
pub struct Step {
    setup: Setup,
    buffers: [Buffer; 4],
    lse: Buffer,
}

impl Step {
    pub fn new(setup: Setup) -> Self {
        let buffers = Self::heads(setup)
            .map(|heads| Buffer::new(TOKENS * heads * setup.dim * size_of::<u16>()));
        let lse = Buffer::new(TOKENS * Self::heads(setup)[3] * size_of::<f32>());
        Self { setup, buffers, lse }
    }

    fn heads(setup: Setup) -> [usize; 4] {
        let heads = setup.kv_heads * setup.group;
        [setup.kv_heads, setup.kv_heads, heads, heads]
    }

    /// Writes random keys, values and queries, which are answered.
    pub fn fill(&self, twin: &mut Twin) -> [Vec<u16>; 3] {
        let [key, value, query, _] = Self::heads(self.setup);
        let data = [key, value, query]
            .map(|heads| self.setup.random(&mut twin.random, TOKENS * heads * self.setup.dim));
        self.buffers.iter().zip(&data).for_each(|(buffer, data)| buffer.write(data));
        data
    }

    /// Queues append and run on the device.
    pub fn run(&self, twin: &Twin) {
        let heads = Self::heads(self.setup);
        let tensor = |i: usize| -> kvmgr_tensor {
            self.setup.tensor(self.buffers[i].pointer(), TOKENS, heads[i], true)
        };
        let [key, value, query, output] = [0, 1, 2, 3].map(tensor);
        let lse = self.setup.lse(self.lse.pointer(), TOKENS, true);
        let options = twin.options(0, ptr::null_mut());
        run(&twin.device, 0, [&key, &value, &query, &output, &lse], &options);
    }

    /// Compares what the device has made of `data` with what the host makes of it.
    pub fn compare(&self, twin: &mut Twin, data: &mut [Vec<u16>; 3]) {
        let (output, lse) = twin.run_host(data, TOKENS);
        let found = self.buffers[3].read::<u16>();
        let found: Vec<f32> = found.into_iter().map(|x| self.setup.value(x)).collect();
        twin.compare(&found, &output, &self.lse.read::<f32>(), &lse);
    }
}

/// What a graph of the current plan of the device is good for.
pub fn graph_key(twin: &Twin) -> u64 {
    let mut key = 0;
    // SAFETY: a live handle and a place for a number.
    ok(unsafe { kvmgr_attention_graph_key(twin.device.attention, &raw mut key) });
    key
}
