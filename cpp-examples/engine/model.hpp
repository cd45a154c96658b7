// model.hpp: a Llama model whose whole KV cache is libkvmgr.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gguf.hpp"
#include "kvmgr.hpp"
#include "workers.hpp"

namespace engine {

/// Numbers of the architecture.
struct Shape {
  size_t layers, hidden, ffn, q_heads, kv_heads, head_dim, vocab;
  float epsilon;
  double rope_base;
  int32_t bos;
};

struct Layer {
  Tensor attn_norm, q, k, v, o, ffn_norm, gate, up, down;
};

/// Weights, read once and shared by every batch.
struct Weights {
  Shape shape;
  Tensor embedding, output_norm, output;
  std::vector<Layer> layers;

  static std::shared_ptr<const Weights> load(const std::string &path);
};

/// A cache configuration for a model: what libkvmgr has to know about it.
kvmgr_cache_config cache_config(const Shape &shape, const char *spec, uint64_t num_blocks);

/// The part of a batch that belongs to one sequence: its next tokens.
struct Part {
  kvmgr_sequence *sequence;
  const int32_t *tokens;
  size_t count;
  /// Whether logits are wanted for each token; otherwise only for the last.
  bool all_logits = false;
};

/// Runs batches of sequences through the model.
class Model {
 public:
  Model(std::shared_ptr<const Weights> weights, const kvmgr::cache &cache, Workers &workers);

  /// Reserves room for all parts. False, with nothing reserved, if the cache is out of blocks.
  bool reserve(const std::vector<Part> &parts);

  /// Computes reserved parts. Logits [rows, vocab] come in the order of the parts. The tokens are
  /// not committed: the caller decides how many of them become real.
  const std::vector<float> &forward(const std::vector<Part> &parts);

  /// What the last forward computed.
  const std::vector<float> &last_logits() const { return logits_; }

  /// reserve, forward and commit of everything; throws when out of blocks.
  const std::vector<float> &step(const std::vector<Part> &parts);

 private:
  void attend(size_t layer, size_t tokens);
  void observe(size_t layer, const std::vector<Part> &parts);
  void multiply(const Tensor &weights, const std::vector<float> &in, size_t tokens,
                std::vector<float> &out);
  void add(const std::vector<float> &delta);

  std::shared_ptr<const Weights> weights_;
  kvmgr::attention attention_;
  Workers &workers_;
  std::vector<float> x_, norm_, q_, k_, v_, attended_, delta_, gate_, up_, logits_;
  std::vector<size_t> positions_;
};

/// The same model without any cache: every token from scratch, for checking. Logits of each
/// token, [tokens, vocab].
std::vector<float> dense_forward(const Weights &weights, const std::vector<int32_t> &tokens);

}  // namespace engine
