// 06-custom-policy.cpp: a token policy of the engine's own. It keeps the tokens whose keys stand out
// from their neighbours, under a name that specs can use like any other.
#include <cmath>
#include <cstdio>
#include <vector>

#include "kvmgr.hpp"

namespace {

constexpr uint32_t kHeads = 2, kDim = 32;

/// The engine's state; a real one would hold weights.
struct Contrast {
  int calls = 0;
  bool destroyed = false;
};

/// Scores the tokens of one KV head by the distance of their keys from those before them.
kvmgr_status contrast(void *user_data, const kvmgr_policy_input *input, float *scores,
                      uint8_t *kept_anyway) {
  ++static_cast<Contrast *>(user_data)->calls;
  for (uint32_t i = 0; i < input->num_tokens; ++i) {
    const float *key = input->keys + size_t(i) * input->head_dim;
    const float *before = i > 0 ? key - input->head_dim : key;
    float sum = 0;
    for (uint32_t c = 0; c < input->head_dim; ++c) sum += std::fabs(key[c] - before[c]);
    scores[i] = sum;
  }
  kept_anyway[0] = 1;  // The first token is where attention rests.
  return KVMGR_OK;
}

void destroy(void *user_data) { static_cast<Contrast *>(user_data)->destroyed = true; }

}  // namespace

int main() try {
  Contrast state;
  kvmgr_score_ops ops{};
  ops.struct_size = sizeof ops;
  ops.needs = KVMGR_NEEDS_KEYS;
  ops.score = contrast;
  ops.destroy = destroy;
  kvmgr::check(kvmgr_policy_register_score("contrast", &state, &ops));

  kvmgr_cache_config config{};
  config.struct_size = sizeof config;
  config.num_layers = 1;
  config.num_q_heads = kHeads;
  config.num_kv_heads = kHeads;
  config.head_dim = kDim;
  config.num_blocks = 64;
  config.spec = "contrast | protect(sink=2, recent=4) | adakv(0.2) | keep(0.25)";
  size_t kept = 0;
  {
    const kvmgr::cache cache = kvmgr::make_cache(config);
    const kvmgr::sequence sequence = kvmgr::make_sequence(cache);
    constexpr int64_t kTokens = 100;
    std::vector<float> rows(size_t(kTokens) * kHeads * kDim, 0.5f);
    // Every tenth token of head 0 is different.
    for (int64_t token = 0; token < kTokens; token += 10)
      for (uint32_t c = 0; c < kDim; ++c) rows[size_t(token) * kHeads * kDim + c] = -1;
    const kvmgr_tensor tensor = kvmgr::tensor(rows.data(), {kTokens, kHeads, kDim});
    kvmgr::check(kvmgr_sequence_reserve(sequence.get(), kTokens));
    kvmgr::check(kvmgr_sequence_append(sequence.get(), 0, &tensor, &tensor));
    kvmgr::check(kvmgr_sequence_commit(sequence.get(), nullptr, kTokens));
    kvmgr::check(kvmgr_sequence_end_prefill(sequence.get()));
    for (uint32_t head = 0; head < kHeads; ++head) {
      size_t num = 0;
      kvmgr::check(kvmgr_sequence_kept(sequence.get(), 0, head, &num));
      std::printf("head %u keeps %zu of %d tokens\n", unsigned(head), num, int(kTokens));
      kept += num;
    }
    kvmgr::check(kvmgr_policy_unregister_score("contrast"));
    if (state.destroyed) return 1;  // The cache still uses it.
  }
  std::printf("%d calls, destroyed: %s\n", state.calls, state.destroyed ? "yes" : "no");
  return kept == 50 && state.calls == int(kHeads) && state.destroyed ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
