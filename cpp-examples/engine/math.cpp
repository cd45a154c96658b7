#include "math.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

// One build runs well on old and new x86 CPUs: the dynamic linker picks the clone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(ENGINE_NO_CLONES)
#define FAST __attribute__((target_clones("default", "arch=haswell")))
#else
#define FAST
#endif

namespace engine {
namespace {

typedef float Vector __attribute__((vector_size(32)));
constexpr size_t kWidth = 8;

// A tile keeps kRows x kTokens sums in registers; kBlock tokens of input stay in the cache while
// all weights pass by.
constexpr size_t kRows = 3, kTokens = 4, kBlock = 32;

}  // namespace

FAST void matmul(const Tensor &weights, const float *in, size_t tokens, size_t first, size_t last,
                 float *out) {
  const size_t columns = weights.columns(), rows = weights.rows();
  for (size_t block = 0; block < tokens; block += kBlock)
    for (size_t r = first; r < last; r += kRows)
      for (size_t t = block; t < std::min(tokens, block + kBlock); t += kTokens) {
        // Rows and tokens past the end repeat the last one; their sums are dropped.
        const float *w[kRows], *x[kTokens];
        for (size_t j = 0; j < kRows; ++j) w[j] = &weights.data[std::min(r + j, last - 1) * columns];
        for (size_t i = 0; i < kTokens; ++i) x[i] = in + std::min(t + i, tokens - 1) * columns;
        Vector sums[kRows][kTokens] = {};
        size_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) {
          Vector a[kRows];
          for (size_t j = 0; j < kRows; ++j) std::memcpy(&a[j], w[j] + c, sizeof a[j]);
          for (size_t i = 0; i < kTokens; ++i) {
            Vector b;
            std::memcpy(&b, x[i] + c, sizeof b);
            for (size_t j = 0; j < kRows; ++j) sums[j][i] += a[j] * b;
          }
        }
        for (size_t j = 0; j < kRows && r + j < last; ++j)
          for (size_t i = 0; i < kTokens && t + i < tokens; ++i) {
            float sum = 0;
            for (size_t k = 0; k < kWidth; ++k) sum += sums[j][i][k];
            for (size_t k = c; k < columns; ++k) sum += w[j][k] * x[i][k];
            out[(t + i) * rows + r + j] = sum;
          }
      }
}

void rms_norm(const Tensor &weight, const float *in, size_t tokens, float epsilon, float *out) {
  const size_t n = weight.data.size();
  for (size_t t = 0; t < tokens; ++t, in += n, out += n) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += double(in[i]) * in[i];
    const float scale = 1.0f / std::sqrt(float(sum / double(n)) + epsilon);
    for (size_t i = 0; i < n; ++i) out[i] = in[i] * scale * weight.data[i];
  }
}

void rope(float *row, size_t heads, size_t head_dim, double position, double base) {
  for (size_t i = 0; i < head_dim / 2; ++i) {
    const double angle = position * std::pow(base, -2.0 * double(i) / double(head_dim));
    const float cosine = float(std::cos(angle)), sine = float(std::sin(angle));
    for (size_t h = 0; h < heads; ++h) {
      float *pair = row + h * head_dim + 2 * i;
      const float x = pair[0], y = pair[1];
      pair[0] = x * cosine - y * sine;
      pair[1] = x * sine + y * cosine;
    }
  }
}

void swiglu(float *gate, const float *up, size_t count) {
  for (size_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void log_softmax(float *logits, size_t count) {
  const float max = *std::max_element(logits, logits + count);
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += std::exp(double(logits[i] - max));
  const float lse = max + float(std::log(sum));
  for (size_t i = 0; i < count; ++i) logits[i] -= lse;
}

int32_t argmax(const float *values, size_t count) {
  return int32_t(std::max_element(values, values + count) - values);
}

}  // namespace engine
