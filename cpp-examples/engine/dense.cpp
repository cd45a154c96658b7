// dense.cpp: the forward pass without a cache. Shares the matrices with model.cpp, but computes
// attention for all tokens at once, in plain loops.
#include <algorithm>
#include <cmath>

#include "math.hpp"
#include "model.hpp"

namespace engine {
namespace {

void attend(const Shape &shape, size_t tokens, const std::vector<float> &q,
            const std::vector<float> &k, const std::vector<float> &v, std::vector<float> &out) {
  const size_t dim = shape.head_dim, group = shape.q_heads / shape.kv_heads;
  out.assign(q.size(), 0.0f);
  std::vector<double> p(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t h = 0; h < shape.q_heads; ++h) {
      const float *query = &q[(t * shape.q_heads + h) * dim];
      double max = -INFINITY, sum = 0;
      for (size_t s = 0; s <= t; ++s) {
        const float *key = &k[(s * shape.kv_heads + h / group) * dim];
        double dot = 0;
        for (size_t c = 0; c < dim; ++c) dot += double(query[c]) * key[c];
        p[s] = dot / std::sqrt(double(dim));
        max = std::max(max, p[s]);
      }
      for (size_t s = 0; s <= t; ++s) sum += p[s] = std::exp(p[s] - max);
      float *row = &out[(t * shape.q_heads + h) * dim];
      for (size_t s = 0; s <= t; ++s) {
        const float *value = &v[(s * shape.kv_heads + h / group) * dim];
        for (size_t c = 0; c < dim; ++c) row[c] += float(p[s] / sum) * value[c];
      }
    }
  }
}

}  // namespace

std::vector<float> dense_forward(const Weights &weights, const std::vector<int32_t> &tokens) {
  const Shape &shape = weights.shape;
  const size_t n = tokens.size();
  const auto multiply = [&](const Tensor &matrix, const std::vector<float> &in) {
    std::vector<float> out(n * matrix.rows());
    matmul(matrix, in.data(), n, 0, matrix.rows(), out.data());
    return out;
  };
  const auto norm = [&](const Tensor &weight, const std::vector<float> &in) {
    std::vector<float> out(in.size());
    rms_norm(weight, in.data(), n, shape.epsilon, out.data());
    return out;
  };
  std::vector<float> x;
  for (int32_t token : tokens) {
    const float *row = &weights.embedding.data[size_t(token) * shape.hidden];
    x.insert(x.end(), row, row + shape.hidden);
  }
  std::vector<float> attended;
  for (const Layer &layer : weights.layers) {
    const std::vector<float> in = norm(layer.attn_norm, x);
    std::vector<float> q = multiply(layer.q, in), k = multiply(layer.k, in);
    const std::vector<float> v = multiply(layer.v, in);
    for (size_t t = 0; t < n; ++t) {
      rope(&q[t * shape.q_heads * shape.head_dim], shape.q_heads, shape.head_dim, double(t),
           shape.rope_base);
      rope(&k[t * shape.kv_heads * shape.head_dim], shape.kv_heads, shape.head_dim, double(t),
           shape.rope_base);
    }
    attend(shape, n, q, k, v, attended);
    const std::vector<float> delta = multiply(layer.o, attended);
    for (size_t i = 0; i < x.size(); ++i) x[i] += delta[i];
    const std::vector<float> mid = norm(layer.ffn_norm, x);
    std::vector<float> gate = multiply(layer.gate, mid);
    const std::vector<float> up = multiply(layer.up, mid);
    swiglu(gate.data(), up.data(), gate.size());
    const std::vector<float> down = multiply(layer.down, gate);
    for (size_t i = 0; i < x.size(); ++i) x[i] += down[i];
  }
  return multiply(weights.output, norm(weights.output_norm, x));
}

}  // namespace engine
