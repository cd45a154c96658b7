//! Our side: one sequence in sealed blocks, the same rows in every layer.

use std::sync::Arc;

use kvmgr::attention::{Attention, Options, write_sequence};
use kvmgr::cache::{Cache, CacheConfig, MemoryFormats};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::sequence::{Sequence, SequenceConfig};
use kvmgr::shape::LaneWidth;

use crate::data::{Input, shape};
use crate::team::Team;

const BLOCK_SIZE: usize = 32;

pub struct Ours {
    pub num_layers: usize,
    /// Keeps its blocks alive.
    sequence: Sequence,
    attention: Attention,
    query: Vec<f32>,
    pub output: Vec<f32>,
}

impl Ours {
    pub fn new(spec: &str, input: &Input, num_layers: usize) -> Self {
        let shape = shape(num_layers);
        let cache = Cache::new(CacheConfig {
            shape,
            block_size: BLOCK_SIZE,
            lane_width: LaneWidth::Sequence,
            num_blocks: input.tokens.div_ceil(BLOCK_SIZE) + 1,
            memory_limit: 0,
            memory: Some(MemoryFormats::new(DType::F16, spec, spec)),
            evictor: "lru".into(),
            salt: 0,
            prefix: false,
            rope: None,
            device: None,
            recurrent: None,
        });
        let cache = cache.expect("a valid configuration");
        let sequence = Sequence::new(Arc::clone(&cache), SequenceConfig::default(), None);
        let mut sequence = sequence.expect("no states are needed");
        let committed = input.tokens - input.queries;
        let wide = shape.num_kv_heads * shape.head_dim;
        let rows = |data| Tensor::from_slice(data, [committed, shape.num_kv_heads, shape.head_dim]);
        sequence.reserve(committed).expect("room");
        let (keys, values) = (&input.keys[..committed * wide], &input.values[..committed * wide]);
        for layer in 0..num_layers {
            write_sequence(&sequence, layer, &rows(keys), Some(&rows(values)))
                .expect("reserved rows");
        }
        sequence.commit(committed, None).expect("written tokens");
        let mut attention = Attention::new(cache).expect("a cache with memory");
        sequence.reserve(input.queries).expect("room");
        attention.plan(&[(&sequence, input.queries)]).expect("a sequence of this cache");
        let rows =
            |data| Tensor::from_slice(data, [input.queries, shape.num_kv_heads, shape.head_dim]);
        let (keys, values) = (&input.keys[committed * wide..], &input.values[committed * wide..]);
        for layer in 0..num_layers {
            attention.append(layer, &rows(keys), Some(&rows(values)), 0, 1).expect("reserved rows");
        }
        let output = vec![0.0; input.query.len()];
        Self { num_layers, sequence, attention, query: input.query.clone(), output }
    }

    pub fn run(&mut self, layer: usize, team: &Team) {
        let shape = shape(1);
        let shape = [self.attention.num_tokens(), shape.num_q_heads, shape.head_dim];
        let query = Tensor::from_slice(&self.query, shape);
        let output = TensorMut::from_slice(&mut self.output, shape);
        team.run(&|worker| {
            self.attention
                .run(layer, &query, &output, None, &Options::default(), worker, team.len())
                .expect("a current plan");
        });
    }

    /// Bytes of K and V in one layer.
    pub fn layer_bytes(&self) -> f64 {
        self.sequence.bytes() as f64 / self.num_layers as f64
    }
}
