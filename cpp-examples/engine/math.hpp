// math.hpp: the few operations of a Llama model on rows of f32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gguf.hpp"

namespace engine {

/// out[t, r] = in[t] . weights[r], for rows [first, last) of the weights; in is [tokens, columns],
/// out is [tokens, rows].
void matmul(const Tensor &weights, const float *in, size_t tokens, size_t first, size_t last,
            float *out);

/// out = in / rms(in) * weight, row by row.
void rms_norm(const Tensor &weight, const float *in, size_t tokens, float epsilon, float *out);

/// Turns the pairs (2i, 2i + 1) of each head of `row` by position * base^(-2i / head_dim).
void rope(float *row, size_t heads, size_t head_dim, double position, double base);

/// gate = silu(gate) * up.
void swiglu(float *gate, const float *up, size_t count);

/// Turns logits into log-probabilities in place.
void log_softmax(float *logits, size_t count);

/// The index of the largest value.
int32_t argmax(const float *values, size_t count);

}  // namespace engine
