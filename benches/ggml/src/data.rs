//! Shapes and values that both sides use.

use kvmgr::shape::ModelShape;

/// One layer of the shape; benches repeat it as often as memory traffic needs.
pub fn shape(num_layers: usize) -> ModelShape {
    ModelShape::new(num_layers, 32, 8, 128)
}

/// Reproducible noise in -1..1.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Keys, values and queries of one layer.
pub struct Input {
    pub tokens: usize,
    pub queries: usize,
    /// `[tokens, num_kv_heads, head_dim]`.
    pub keys: Vec<f32>,
    /// As the keys.
    pub values: Vec<f32>,
    /// `[queries, num_q_heads, head_dim]`.
    pub query: Vec<f32>,
}

impl Input {
    pub fn new(tokens: usize, queries: usize) -> Self {
        let shape = shape(1);
        let wide = shape.num_kv_heads * shape.head_dim;
        Self {
            tokens,
            queries,
            keys: noise(tokens * wide, 1),
            values: noise(tokens * wide, 2),
            query: noise(queries * shape.num_q_heads * shape.head_dim, 3),
        }
    }
}
