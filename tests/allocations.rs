//! Attention by slot allocates nothing once its buffers have grown.

#![expect(unsafe_code, reason = "an allocator that counts")]

mod common;
#[path = "common/counting.rs"]
mod counting;

use common::Random;
use counting::allocations;
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::quantizer::Side;
use kvmgr::slots::{Masked, Meeting, Options, Slots, SlotsConfig};

const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const ROWS: usize = 4096;

#[test]
fn a_steady_state_allocates_nothing() {
    let mut random = Random(5);
    for spec in ["full", "quant(k=had+q4_0, v=q4_0)", "quant(kivi4)", "quant(tq3)"] {
        let config = SlotsConfig {
            layer: 0,
            num_layers: 1,
            num_q_heads: Q_HEADS,
            num_kv_heads: KV_HEADS,
            key_dim: DIM,
            value_dim: DIM,
            num_slots: ROWS,
            num_streams: 1,
            block_size: 64,
            pieces: false,
        };
        let mut slots = Slots::new(config, spec).unwrap();
        let values = random.normals(ROWS * KV_HEADS * DIM);
        let values = Tensor::from_slice(&values, [ROWS, KV_HEADS, DIM]);
        let all: Vec<u32> = (0..ROWS as u32).collect();
        for side in [Side::Key, Side::Value] {
            slots.write(side, &all, &values, false).unwrap();
        }
        let meeting = Meeting::default();
        // One query over rows that are split, and a prompt whose rows are decoded.
        for n in [1, 40] {
            let query = random.normals(n * Q_HEADS * DIM);
            let mut output = vec![0.0; query.len()];
            let shape = [n, Q_HEADS, DIM];
            let call = Masked {
                query: Tensor::from_slice(&query, shape),
                output: TensorMut::from_slice(&mut output, shape),
                mask: None,
                options: Options { meeting: Some(&meeting), ..Options::default() },
            };
            let run = || {
                let before = allocations();
                (0..2).for_each(|worker| slots.attend(0, &call, worker, 2).unwrap());
                allocations() - before
            };
            run();
            assert_eq!(run(), 0, "{spec}, {n} queries");
        }
    }
    assert!(allocations() > 0, "allocations are counted");
}
