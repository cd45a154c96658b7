// 03-prefix-sharing.cpp: an engine with tensors of its own (on a GPU, say; here a plain array) uses
// the block manager alone: a batch of prompts, cached prefixes, decode steps, a copy-on-write fork,
// and preemption. Each row of the tensor holds the token that was computed there, so the example
// can check that nobody ever reads another sequence's rows.
#include <cstdio>
#include <vector>

#include "kvmgr.hpp"

namespace {

constexpr size_t kBlockSize = 16, kNumBlocks = 64;

#define EXPECT(condition)                                                \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition); \
      return 1;                                                          \
    }                                                                    \
  } while (0)

struct engine {
  kvmgr::pool pool;
  std::vector<int32_t> tensor = std::vector<int32_t>(kNumBlocks * kBlockSize, -1);

  /// Runs the copies that the pool asks for, before anything is written.
  void copy_blocks() {
    size_t count = 0;
    kvmgr::check(kvmgr_pool_take_copies(pool.get(), nullptr, 0, &count));
    std::vector<kvmgr_block_copy> copies(count);
    kvmgr::check(kvmgr_pool_take_copies(pool.get(), copies.data(), count, &count));
    for (const kvmgr_block_copy &copy : copies) {
      for (size_t row = 0; row < kBlockSize; ++row)
        tensor[copy.target * kBlockSize + row] = tensor[copy.source * kBlockSize + row];
    }
  }

  /// "Computes" the next tokens of one sequence: writes their rows.
  void compute(kvmgr_pool_sequence sequence, const int32_t *tokens, uint32_t count) {
    std::vector<int64_t> slots(count);
    kvmgr::check(kvmgr_pool_slot_mapping(pool.get(), &sequence, &count, 1, 0, slots.data(), count));
    for (uint32_t i = 0; i < count; ++i) tensor[size_t(slots[i])] = tokens[i];
  }

  /// What attention would read: the rows of all committed tokens through the block table.
  std::vector<int32_t> read(kvmgr_pool_sequence sequence) {
    size_t committed = 0;
    kvmgr::check(kvmgr_pool_num_tokens(pool.get(), sequence, &committed, nullptr));
    uint32_t table[kNumBlocks];
    kvmgr::check(kvmgr_pool_block_tables(pool.get(), &sequence, 1, 0, table, kNumBlocks));
    std::vector<int32_t> out(committed);
    for (size_t i = 0; i < committed; ++i)
      out[i] = tensor[table[i / kBlockSize] * kBlockSize + i % kBlockSize];
    return out;
  }
};

}  // namespace

int main() try {
  kvmgr_pool_config config{};
  config.struct_size = sizeof config;
  config.num_blocks = kNumBlocks;
  config.block_size = kBlockSize;
  config.flags = KVMGR_POOL_PREFIX;
  engine engine{kvmgr::make_pool(config)};
  kvmgr_pool *pool = engine.pool.get();

  // A batch of two prompts that share 96 tokens; the second batch finds what the first computed.
  std::vector<int32_t> prompts[2];
  for (int32_t i = 0; i < 100; ++i) prompts[0].push_back(i * 7);
  prompts[1] = prompts[0];
  prompts[1].back() = 5;
  kvmgr_pool_sequence sequences[2];
  for (int i = 0; i < 2; ++i) {
    kvmgr_pool_request request{};
    request.tokens = prompts[i].data();
    request.num_tokens = prompts[i].size();
    kvmgr_pool_admission admission{};
    size_t admitted = 0;
    kvmgr::check(kvmgr_pool_admit(pool, &request, 1, &admission, &admitted));
    std::printf("prompt %d: %llu of 100 tokens are cached\n", i,
                (unsigned long long)admission.num_cached);
    EXPECT(admission.num_cached == (i == 0 ? 0u : 96u));
    const uint32_t rest = uint32_t(100 - admission.num_cached);
    engine.copy_blocks();
    engine.compute(admission.sequence, prompts[i].data() + admission.num_cached, rest);
    kvmgr::check(kvmgr_pool_commit(pool, &admission.sequence, &rest, 1, nullptr, 0));
    sequences[i] = admission.sequence;
  }

  // Decode: one call a step for all sequences.
  const uint32_t one[2] = {1, 1};
  kvmgr::check(kvmgr_pool_reserve(pool, sequences, one, 2));
  for (int32_t step = 0; step < 40; ++step) {
    const int32_t tokens[2] = {1000 + step, 2000 + step};
    for (int i = 0; i < 2; ++i) {
      engine.compute(sequences[i], &tokens[i], 1);
      prompts[i].push_back(tokens[i]);
    }
    kvmgr::check(kvmgr_pool_append(pool, sequences, tokens, 2));
    engine.copy_blocks();
  }
  EXPECT(engine.read(sequences[0]) == prompts[0] && engine.read(sequences[1]) == prompts[1]);

  // A branch: shares every block; the open one is copied when one of the two writes.
  kvmgr_pool_sequence branch = 0;
  kvmgr::check(kvmgr_pool_fork(pool, sequences[0], &branch, 1));
  kvmgr::check(kvmgr_pool_reserve(pool, &branch, one, 1));
  engine.copy_blocks();
  const int32_t token = 7;
  engine.compute(branch, &token, 1);
  kvmgr::check(kvmgr_pool_append(pool, &branch, &token, 1));
  EXPECT(engine.read(sequences[0]) == prompts[0]);
  EXPECT(engine.read(branch).back() == 7);

  // Preemption: the blocks go, the sequence stays; what is still cached comes back by itself.
  kvmgr_placement places[kNumBlocks];
  size_t parked = 0, missing = 0;
  kvmgr::check(kvmgr_pool_park(pool, sequences[1], places, kNumBlocks, &parked));
  std::vector<std::vector<int32_t>> swapped(kNumBlocks);
  for (size_t i = 0; i < parked; ++i) {
    const auto *rows = &engine.tensor[places[i].block * kBlockSize];
    swapped[places[i].place].assign(rows, rows + kBlockSize);
  }
  kvmgr::check(kvmgr_pool_resume(pool, sequences[1], places, kNumBlocks, &missing));
  for (size_t i = 0; i < missing; ++i) {
    for (size_t row = 0; row < kBlockSize; ++row)
      engine.tensor[places[i].block * kBlockSize + row] = swapped[places[i].place][row];
  }
  std::printf("preempted with %zu blocks, %zu of them had to be copied back\n", parked, missing);
  EXPECT(engine.read(sequences[1]) == prompts[1] && missing < parked);

  const kvmgr_pool_sequence all[3] = {sequences[0], sequences[1], branch};
  kvmgr::check(kvmgr_pool_end(pool, all, 3));
  EXPECT(kvmgr_pool_end(pool, all, 3) == KVMGR_INVALID_HANDLE);
  kvmgr_pool_stats stats{};
  stats.struct_size = sizeof stats;
  kvmgr::check(kvmgr_pool_get_stats(pool, &stats));
  std::printf("blocks: %llu used, %llu cached\n", (unsigned long long)stats.used_blocks,
              (unsigned long long)stats.idle_blocks);
  EXPECT(stats.used_blocks == 0 && stats.idle_blocks > 0);
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
