#include "model.hpp"

#include <algorithm>

#include "math.hpp"

namespace engine {

std::shared_ptr<const Weights> Weights::load(const std::string &path) {
  Gguf file(path);
  if (file.text("general.architecture", "") != "llama")
    throw std::runtime_error(path + ": not a llama model");
  auto weights = std::make_shared<Weights>();
  Shape &shape = weights->shape;
  const auto size = [&](const char *key) { return size_t(file.number(std::string("llama.") + key)); };
  shape.layers = size("block_count");
  shape.hidden = size("embedding_length");
  shape.ffn = size("feed_forward_length");
  shape.q_heads = size("attention.head_count");
  shape.kv_heads = size("attention.head_count_kv");
  shape.head_dim =
      size_t(file.number("llama.attention.key_length", double(shape.hidden / shape.q_heads)));
  shape.epsilon = float(file.number("llama.attention.layer_norm_rms_epsilon"));
  shape.rope_base = file.number("llama.rope.freq_base", 10000.0);
  shape.bos = int32_t(file.number("tokenizer.ggml.bos_token_id", 257));
  weights->embedding = file.take("token_embd.weight");
  weights->output_norm = file.take("output_norm.weight");
  weights->output = file.take("output.weight");
  shape.vocab = weights->output.rows();
  for (size_t i = 0; i < shape.layers; ++i) {
    const auto take = [&](const char *name) {
      return file.take("blk." + std::to_string(i) + "." + name + ".weight");
    };
    weights->layers.push_back({take("attn_norm"), take("attn_q"), take("attn_k"), take("attn_v"),
                               take("attn_output"), take("ffn_norm"), take("ffn_gate"),
                               take("ffn_up"), take("ffn_down")});
  }
  return weights;
}

kvmgr_cache_config cache_config(const Shape &shape, const char *spec, uint64_t num_blocks) {
  kvmgr_cache_config config{};
  config.struct_size = sizeof config;
  config.num_layers = uint32_t(shape.layers);
  config.num_q_heads = uint32_t(shape.q_heads);
  config.num_kv_heads = uint32_t(shape.kv_heads);
  config.head_dim = uint32_t(shape.head_dim);
  config.num_blocks = num_blocks;
  config.spec = spec;
  config.rope_style = KVMGR_ROPE_INTERLEAVED;
  config.rope_base = float(shape.rope_base);
  return config;
}

Model::Model(std::shared_ptr<const Weights> weights, const kvmgr::cache &cache, Workers &workers)
    : weights_(std::move(weights)), attention_(kvmgr::make_attention(cache)), workers_(workers) {}

bool Model::reserve(const std::vector<Part> &parts) {
  for (size_t i = 0; i < parts.size(); ++i) {
    if (kvmgr::check_blocks(kvmgr_sequence_reserve(parts[i].sequence, parts[i].count))) continue;
    for (size_t j = 0; j < i; ++j) {
      // Committing nothing drops the reservation.
      kvmgr::check(kvmgr_sequence_commit(parts[j].sequence, nullptr, 0));
    }
    return false;
  }
  return true;
}

const std::vector<float> &Model::forward(const std::vector<Part> &parts) {
  const Weights &weights = *weights_;
  const Shape &shape = weights.shape;
  std::vector<kvmgr_sequence *> sequences;
  std::vector<uint32_t> counts;
  x_.clear();
  positions_.clear();
  for (const Part &part : parts) {
    size_t length = 0;
    kvmgr::check(kvmgr_sequence_length(part.sequence, &length));
    for (size_t i = 0; i < part.count; ++i) {
      const float *row = &weights.embedding.data[size_t(part.tokens[i]) * shape.hidden];
      x_.insert(x_.end(), row, row + shape.hidden);
      positions_.push_back(length + i);
    }
    sequences.push_back(part.sequence);
    counts.push_back(uint32_t(part.count));
  }
  kvmgr::check(kvmgr_attention_plan(attention_.get(), sequences.data(), counts.data(), parts.size()));

  const size_t tokens = positions_.size();
  norm_.resize(x_.size());
  for (size_t l = 0; l < shape.layers; ++l) {
    const Layer &layer = weights.layers[l];
    rms_norm(layer.attn_norm, x_.data(), tokens, shape.epsilon, norm_.data());
    multiply(layer.q, norm_, tokens, q_);
    multiply(layer.k, norm_, tokens, k_);
    multiply(layer.v, norm_, tokens, v_);
    for (size_t t = 0; t < tokens; ++t) {
      const double position = double(positions_[t]);
      rope(&q_[t * shape.q_heads * shape.head_dim], shape.q_heads, shape.head_dim, position,
           shape.rope_base);
      rope(&k_[t * shape.kv_heads * shape.head_dim], shape.kv_heads, shape.head_dim, position,
           shape.rope_base);
    }
    attend(l, tokens);
    multiply(layer.o, attended_, tokens, delta_);
    observe(l, parts);
    add(delta_);
    rms_norm(layer.ffn_norm, x_.data(), tokens, shape.epsilon, norm_.data());
    multiply(layer.gate, norm_, tokens, gate_);
    multiply(layer.up, norm_, tokens, up_);
    swiglu(gate_.data(), up_.data(), gate_.size());
    multiply(layer.down, gate_, tokens, delta_);
    add(delta_);
  }

  // Only the rows whose logits are wanted go through the output matrix.
  std::vector<float> wanted;
  size_t row = 0, num_wanted = 0;
  for (const Part &part : parts) {
    const size_t first = part.all_logits ? 0 : part.count - 1;
    wanted.insert(wanted.end(), x_.begin() + std::ptrdiff_t((row + first) * shape.hidden),
                  x_.begin() + std::ptrdiff_t((row + part.count) * shape.hidden));
    num_wanted += part.count - first;
    row += part.count;
  }
  rms_norm(weights.output_norm, wanted.data(), num_wanted, shape.epsilon, wanted.data());
  multiply(weights.output, wanted, num_wanted, logits_);
  return logits_;
}

const std::vector<float> &Model::step(const std::vector<Part> &parts) {
  if (!reserve(parts)) throw kvmgr::error(KVMGR_OUT_OF_BLOCKS);
  forward(parts);
  for (const Part &part : parts)
    kvmgr::check(kvmgr_sequence_commit(part.sequence, part.tokens, part.count));
  return logits_;
}

// The engine's own threads do the work of the library: all append, then all attend.
void Model::attend(size_t layer, size_t tokens) {
  const Shape &shape = weights_->shape;
  const int64_t n = int64_t(tokens), dim = int64_t(shape.head_dim);
  attended_.resize(q_.size());
  const kvmgr_tensor q = kvmgr::tensor(q_.data(), {n, int64_t(shape.q_heads), dim});
  const kvmgr_tensor k = kvmgr::tensor(k_.data(), {n, int64_t(shape.kv_heads), dim});
  const kvmgr_tensor v = kvmgr::tensor(v_.data(), {n, int64_t(shape.kv_heads), dim});
  const kvmgr_tensor o = kvmgr::tensor(attended_.data(), {n, int64_t(shape.q_heads), dim});
  workers_.run([&](uint32_t worker, uint32_t count) {
    kvmgr::check(kvmgr_attention_append(attention_.get(), uint32_t(layer), &k, &v, worker, count));
  });
  workers_.run([&](uint32_t worker, uint32_t count) {
    kvmgr::check(kvmgr_attention_run(attention_.get(), uint32_t(layer), &q, &o, nullptr, nullptr,
                                     worker, count));
  });
}

// Sequences whose policy compares the residual stream before and after attention are told both, the
// others do not look.
void Model::observe(size_t layer, const std::vector<Part> &parts) {
  const int64_t hidden = int64_t(weights_->shape.hidden);
  size_t row = 0;
  for (const Part &part : parts) {
    const int64_t count = int64_t(part.count);
    const kvmgr_tensor x = kvmgr::tensor(&x_[row * size_t(hidden)], {count, hidden});
    const kvmgr_tensor added = kvmgr::tensor(&delta_[row * size_t(hidden)], {count, hidden});
    kvmgr::check(kvmgr_sequence_observe_residual(part.sequence, uint32_t(layer), &x, &added));
    row += part.count;
  }
}

void Model::multiply(const Tensor &weights, const std::vector<float> &in, size_t tokens,
                     std::vector<float> &out) {
  const size_t rows = weights.rows();
  out.resize(tokens * rows);
  // Waking threads costs more than a small product.
  if (tokens * weights.data.size() < (1u << 21)) {
    matmul(weights, in.data(), tokens, 0, rows, out.data());
    return;
  }
  workers_.run([&](uint32_t worker, uint32_t count) {
    matmul(weights, in.data(), tokens, rows * worker / count, rows * (worker + 1) / count,
           out.data());
  });
}

void Model::add(const std::vector<float> &delta) {
  for (size_t i = 0; i < x_.size(); ++i) x_[i] += delta[i];
}

}  // namespace engine
