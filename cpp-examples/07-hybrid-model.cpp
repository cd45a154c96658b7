// 07-hybrid-model.cpp: recurrent layers beside attention. Their state is written in place, drafts that
// turn out wrong are undone from snapshots, and a second request starts from the state of its prompt.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kvmgr.hpp"

namespace {

constexpr uint32_t kDim = 32, kBlock = 32, kRecurrent = 2, kWidth = 16, kDrafts = 4;

using tokens = std::vector<int32_t>;

/// A toy of a recurrent layer: the state of all tokens so far and one more.
void scan(float *state, uint32_t layer, int32_t token) {
  for (uint32_t i = 0; i < kWidth; ++i)
    state[i] = 0.9f * state[i] + std::sin(float(token) * float(i + 1) + float(layer));
}

float *state_of(const kvmgr::sequence &sequence, uint32_t layer) {
  void *state = nullptr;
  kvmgr::check(kvmgr_sequence_recurrent_state(sequence.get(), layer, &state, nullptr));
  return static_cast<float *>(state);
}

/// The layers with keys and values, of which there is one: reserved tokens get their rows.
void attend(const kvmgr::sequence &sequence, size_t num_tokens) {
  std::vector<float> rows(num_tokens * kDim, 0.5f);
  const kvmgr_tensor tensor = kvmgr::tensor(rows.data(), {int64_t(num_tokens), 1, kDim});
  kvmgr::check(kvmgr_sequence_reserve(sequence.get(), num_tokens));
  kvmgr::check(kvmgr_sequence_append(sequence.get(), 0, &tensor, &tensor));
}

/// A piece of a prompt.
void read(const kvmgr::sequence &sequence, const int32_t *ids, size_t num_tokens) {
  attend(sequence, num_tokens);
  for (uint32_t layer = 0; layer < kRecurrent; ++layer)
    for (size_t i = 0; i < num_tokens; ++i) scan(state_of(sequence, layer), layer, ids[i]);
  kvmgr::check(kvmgr_sequence_commit(sequence.get(), ids, num_tokens));
}

/// Runs drafts with a snapshot after each, and keeps the first `good` of them.
void speculate(const kvmgr::sequence &sequence, size_t length, const tokens &drafts, size_t good) {
  attend(sequence, drafts.size());
  kvmgr::check(kvmgr_sequence_snapshot(sequence.get(), length));
  for (int32_t draft : drafts) {
    for (uint32_t layer = 0; layer < kRecurrent; ++layer)
      scan(state_of(sequence, layer), layer, draft);
    kvmgr::check(kvmgr_sequence_snapshot(sequence.get(), ++length));
  }
  kvmgr::check(kvmgr_sequence_commit(sequence.get(), drafts.data(), good));
}

/// Whether the states are those of `text`, computed token by token.
bool is_right(const kvmgr::sequence &sequence, const int32_t *text, size_t num_tokens) {
  for (uint32_t layer = 0; layer < kRecurrent; ++layer) {
    float state[kWidth] = {};
    for (size_t i = 0; i < num_tokens; ++i) scan(state, layer, text[i]);
    if (std::memcmp(state, state_of(sequence, layer), sizeof state) != 0) return false;
  }
  return true;
}

}  // namespace

int main() try {
  kvmgr_cache_config config{};
  config.struct_size = sizeof config;
  config.num_layers = 1;
  config.num_q_heads = config.num_kv_heads = 1;
  config.head_dim = kDim;
  config.block_size = kBlock;
  config.num_blocks = 64;
  config.flags = KVMGR_CACHE_PREFIX;
  config.recurrent_layers = kRecurrent;
  config.recurrent_bytes = kWidth * sizeof(float);
  config.recurrent_snapshots = kDrafts + 1;
  config.num_states = 2 * (1 + config.recurrent_snapshots);
  const kvmgr::cache cache = kvmgr::make_cache(config);

  tokens text;
  for (int32_t i = 0; i < 100; ++i) text.push_back(i * 7 % 50);
  const tokens prompt = text;
  // Another request with this prompt can go on from here: the last block that leaves it a token.
  const size_t shared = (prompt.size() - 1) / kBlock * kBlock;
  const kvmgr::sequence first = kvmgr::make_sequence(cache);
  read(first, text.data(), shared);
  kvmgr::check(kvmgr_sequence_snapshot(first.get(), shared));
  read(first, text.data() + shared, text.size() - shared);
  for (int32_t step = 0; step < 20; ++step) {
    const tokens drafts = {step, step + 1, step + 2, step + 3};
    const size_t good = size_t(step) % (kDrafts + 1);
    speculate(first, text.size(), drafts, good);
    text.insert(text.end(), drafts.begin(), drafts.begin() + int(good));
    if (!is_right(first, text.data(), text.size())) return 1;
  }

  const kvmgr::sequence second = kvmgr::make_sequence(cache);
  size_t matched = 0;
  kvmgr::check(
      kvmgr_sequence_match_prefix(second.get(), prompt.data(), prompt.size(), &matched));
  const kvmgr_cache_stats stats = kvmgr::stats(cache);
  std::printf("%zu tokens, of which a second request shares %zu; %llu states, %llu bytes\n",
              text.size(), matched, static_cast<unsigned long long>(stats.used_states),
              static_cast<unsigned long long>(stats.state_bytes_used));
  return matched == shared && is_right(second, prompt.data(), matched) ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
