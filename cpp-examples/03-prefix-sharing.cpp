// 03-prefix-sharing.cpp: an engine with its own tensors uses the pool alone: block tables, slots,
// copy-on-write forks, and prompts that are shared by prefix.
#include <cstdio>
#include <vector>

#include "kvmgr.hpp"

namespace {

std::vector<int64_t> slots(const kvmgr::sequence &sequence) {
  size_t count = 0;
  kvmgr::check(kvmgr_sequence_slot_mapping(sequence.get(), 0, 0, nullptr, 0, &count));
  std::vector<int64_t> out(count);
  kvmgr::check(kvmgr_sequence_slot_mapping(sequence.get(), 0, 0, out.data(), count, &count));
  return out;
}

/// Reserves and commits; where `slots` points between the two, the engine writes its tensors.
void extend(const kvmgr::sequence &sequence, const std::vector<int32_t> &tokens) {
  kvmgr::check(kvmgr_sequence_reserve(sequence.get(), tokens.size()));
  kvmgr::check(kvmgr_sequence_commit(sequence.get(), tokens.data(), tokens.size()));
}

#define EXPECT(condition)                                       \
  do {                                                          \
    if (!(condition)) {                                         \
      std::fprintf(stderr, "expected %s\n", #condition);        \
      return 1;                                                 \
    }                                                           \
  } while (0)

}  // namespace

int main() try {
  kvmgr_pool_config config{};
  config.struct_size = sizeof config;
  config.num_blocks = 64;
  config.block_size = 16;
  config.flags = KVMGR_POOL_PREFIX;
  const kvmgr::pool pool = kvmgr::make_pool(config);

  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 100; ++i) prompt.push_back(i * 7);
  {
    const kvmgr::sequence first = kvmgr::make_sequence(pool);
    extend(first, prompt);
  }  // The sequence ends; its full blocks stay until somebody needs their place.

  const kvmgr::sequence second = kvmgr::make_sequence(pool);
  size_t matched = 0;
  kvmgr::check(kvmgr_sequence_match_prefix(second.get(), prompt.data(), prompt.size(), &matched));
  std::printf("second prompt: %zu of %zu tokens are cached\n", matched, prompt.size());
  EXPECT(matched == 96);
  extend(second, {prompt.begin() + 96, prompt.end()});

  const kvmgr::sequence branch = kvmgr::fork(second);
  kvmgr::check(kvmgr_sequence_reserve(branch.get(), 2));
  kvmgr_block_copy copy[1];
  size_t copies = 0;
  kvmgr::check(kvmgr_sequence_take_copies(branch.get(), copy, 1, &copies));
  EXPECT(copies == 1 && copy[0].source != copy[0].target);
  std::printf("fork: copy block %u to %u, then write to slots %lld and %lld\n", copy[0].source,
              copy[0].target, (long long)slots(branch)[0], (long long)slots(branch)[1]);
  EXPECT(slots(branch)[0] == int64_t(copy[0].target) * 16 + 4);
  const int32_t tokens[] = {1, 2};
  kvmgr::check(kvmgr_sequence_commit(branch.get(), tokens, 2));

  kvmgr_pool_stats stats{};
  stats.struct_size = sizeof stats;
  kvmgr::check(kvmgr_pool_get_stats(pool.get(), &stats));
  std::printf("blocks: %llu used by two sequences of 100 and 102 tokens\n",
              (unsigned long long)stats.used_blocks);
  EXPECT(stats.used_blocks == 8);
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
