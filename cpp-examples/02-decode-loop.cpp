// 02-decode-loop.cpp: the step loop of an engine: a batch of sequences, the engine's own threads,
// a policy that keeps a sequence at its budget for ever.
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "kvmgr.hpp"

namespace {

constexpr uint32_t kLayers = 2, kQHeads = 4, kKvHeads = 2, kDim = 64, kThreads = 2;

/// Stands for the model: numbers that depend on the place only.
void fill(std::vector<float> &rows, size_t count, int salt) {
  rows.resize(count);
  for (size_t i = 0; i < count; ++i) rows[i] = std::sin(float(i * 31 + size_t(salt) * 17));
}

/// One step: every sequence gets `counts[i]` new tokens.
void step(const kvmgr::attention &attention, const std::vector<kvmgr_sequence *> &sequences,
          const std::vector<uint32_t> &counts) {
  int64_t tokens = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    kvmgr::check(kvmgr_sequence_reserve(sequences[i], counts[i]));
    tokens += counts[i];
  }
  kvmgr::check(kvmgr_attention_plan(attention.get(), sequences.data(), counts.data(), counts.size()));
  std::vector<float> q, k, v, o(size_t(tokens) * kQHeads * kDim);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    fill(q, o.size(), 1);
    fill(k, size_t(tokens) * kKvHeads * kDim, 2);
    fill(v, size_t(tokens) * kKvHeads * kDim, 3);
    const kvmgr_tensor key = kvmgr::tensor(k.data(), {tokens, kKvHeads, kDim});
    const kvmgr_tensor value = kvmgr::tensor(v.data(), {tokens, kKvHeads, kDim});
    const kvmgr_tensor query = kvmgr::tensor(q.data(), {tokens, kQHeads, kDim});
    const kvmgr_tensor output = kvmgr::tensor(o.data(), {tokens, kQHeads, kDim});
    // All parts of append are done before any part of run starts.
    for (int phase = 0; phase < 2; ++phase) {
      std::vector<std::thread> threads;
      for (uint32_t worker = 0; worker < kThreads; ++worker)
        threads.emplace_back([&, worker] {
          kvmgr::check(phase == 0 ? kvmgr_attention_append(attention.get(), layer, &key, &value,
                                                           worker, kThreads)
                                  : kvmgr_attention_run(attention.get(), layer, &query, &output,
                                                        nullptr, nullptr, worker, kThreads));
        });
      for (std::thread &thread : threads) thread.join();
    }
  }
  for (size_t i = 0; i < sequences.size(); ++i)
    kvmgr::check(kvmgr_sequence_commit(sequences[i], nullptr, counts[i]));
}

}  // namespace

int main() try {
  kvmgr_cache_config config{};
  config.struct_size = sizeof config;
  config.num_layers = kLayers;
  config.num_q_heads = kQHeads;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kDim;
  config.num_blocks = 1024;
  config.spec = "stream(sink=4, recent=60)";
  const kvmgr::cache cache = kvmgr::make_cache(config);
  const kvmgr::attention attention = kvmgr::make_attention(cache);

  std::vector<kvmgr::sequence> owned;
  std::vector<kvmgr_sequence *> sequences;
  for (int i = 0; i < 3; ++i) {
    owned.push_back(kvmgr::make_sequence(cache));
    sequences.push_back(owned.back().get());
  }
  step(attention, sequences, {100, 80, 7});
  for (kvmgr_sequence *sequence : sequences) kvmgr::check(kvmgr_sequence_end_prefill(sequence));
  uint64_t bytes = 0;
  for (int i = 0; i < 300; ++i) {
    step(attention, sequences, {1, 1, 1});
    if (i == 150) bytes = kvmgr::stats(cache).bytes_used;
  }
  for (kvmgr_sequence *sequence : sequences) {
    size_t kept = 0, length = 0;
    kvmgr::check(kvmgr_sequence_kept(sequence, 0, 0, &kept));
    kvmgr::check(kvmgr_sequence_length(sequence, &length));
    std::printf("%zu tokens, %zu kept\n", length, kept);
    if (kept != 64) return 1;
  }
  const uint64_t now = kvmgr::stats(cache).bytes_used;
  std::printf("bytes held: %llu after 150 steps, %llu after 300\n", (unsigned long long)bytes,
              (unsigned long long)now);
  return now <= bytes + bytes / 4 ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
