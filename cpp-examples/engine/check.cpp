// kvmgr-check MODEL: the engine's logits through libkvmgr against a cache-free forward pass, in
// every way a sequence can live: alone, batched, forked, truncated, preempted, matched by prefix.
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "scheduler.hpp"

namespace {

using engine::Part;
using kvmgr::check;

constexpr double kTolerance = 1e-3;

struct Context {
  std::shared_ptr<const engine::Weights> weights;
  std::vector<int32_t> tokens;
  std::vector<float> dense;
  kvmgr_lane_width width;
  uint32_t block_size;
  uint32_t num_workers;
  int failures = 0;

  size_t vocab() const { return weights->shape.vocab; }

  kvmgr::cache cache(uint32_t flags = 0) const {
    kvmgr_cache_config config = engine::cache_config(weights->shape, "full", 8192);
    config.lane_width = width;
    config.block_size = block_size;
    config.flags = flags;
    return kvmgr::make_cache(config);
  }

  Part part(const kvmgr::sequence &sequence, size_t from, size_t count) const {
    return {sequence.get(), tokens.data() + from, count, true};
  }

  /// Compares logits of tokens [from, from + count) with the dense ones.
  void expect(const char *what, const float *logits, size_t from, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count * vocab(); ++i) {
      const double expected = dense[from * vocab() + i];
      difference += (logits[i] - expected) * (logits[i] - expected);
      norm += expected * expected;
    }
    const double error = std::sqrt(difference / norm);
    if (error < kTolerance) return;
    std::printf("FAIL %s: relative error %.2e (lanes %u, block %u, workers %u)\n", what, error,
                width, block_size, num_workers);
    ++failures;
  }
};

/// Prompt in chunks, then token by token.
void single(Context &context, engine::Model &model, const kvmgr::cache &cache) {
  const kvmgr::sequence sequence = kvmgr::make_sequence(cache);
  size_t at = 0;
  for (size_t count : {37, 64, 1, 50, 1, 1, 1}) {
    context.expect("single", model.step({context.part(sequence, at, count)}).data(), at, count);
    at += count;
  }
}

/// Sequences of different lengths side by side, some reading a prompt, some generating.
void batched(Context &context, engine::Model &model, const kvmgr::cache &cache) {
  std::vector<kvmgr::sequence> sequences;
  std::vector<size_t> at(3, 0);
  for (size_t i = 0; i < 3; ++i) sequences.push_back(kvmgr::make_sequence(cache));
  const size_t counts[4][3] = {{20, 33, 1}, {1, 40, 1}, {17, 1, 64}, {1, 1, 1}};
  for (const auto &row : counts) {
    std::vector<Part> parts;
    for (size_t i = 0; i < 3; ++i) parts.push_back(context.part(sequences[i], at[i], row[i]));
    const std::vector<float> &logits = model.step(parts);
    size_t offset = 0;
    for (size_t i = 0; i < 3; ++i) {
      context.expect("batched", logits.data() + offset * context.vocab(), at[i], row[i]);
      offset += row[i];
      at[i] += row[i];
    }
  }
}

/// A fork and its parent go on apart; each may write to the shared tail block.
void forked(Context &context, engine::Model &model, const kvmgr::cache &cache) {
  const kvmgr::sequence parent = kvmgr::make_sequence(cache);
  model.step({context.part(parent, 0, 45)});
  const kvmgr::sequence child = kvmgr::fork(parent);
  // The parent strays first: it must not disturb the child.
  const std::vector<int32_t> stray(9, int32_t('#'));
  model.step({{parent.get(), stray.data(), stray.size()}});
  context.expect("fork, child", model.step({context.part(child, 45, 30)}).data(), 45, 30);
  check(kvmgr_sequence_truncate(parent.get(), 45));
  context.expect("fork, parent", model.step({context.part(parent, 45, 20)}).data(), 45, 20);
  context.expect("fork, child", model.step({context.part(child, 75, 5)}).data(), 75, 5);
}

/// Drafts: reserved and computed, but only the accepted ones are committed.
void truncated(Context &context, engine::Model &model, const kvmgr::cache &cache) {
  const kvmgr::sequence sequence = kvmgr::make_sequence(cache);
  model.step({context.part(sequence, 0, 60)});
  std::vector<int32_t> draft(context.tokens.begin() + 60, context.tokens.begin() + 68);
  for (size_t i = 3; i < draft.size(); ++i) draft[i] = '#';
  const Part part{sequence.get(), draft.data(), draft.size(), true};
  if (!model.reserve({part})) throw std::runtime_error("out of blocks");
  context.expect("draft", model.forward({part}).data(), 60, 3);
  check(kvmgr_sequence_commit(sequence.get(), draft.data(), 3));
  context.expect("after drafts", model.step({context.part(sequence, 63, 30)}).data(), 63, 30);
  check(kvmgr_sequence_truncate(sequence.get(), 41));
  context.expect("after truncate", model.step({context.part(sequence, 41, 9)}).data(), 41, 9);
}

void preempted(Context &context, engine::Model &model, const kvmgr::cache &cache) {
  const kvmgr::store store = kvmgr::make_store("host");
  const kvmgr::sequence sequence = kvmgr::make_sequence(cache);
  const kvmgr::sequence other = kvmgr::make_sequence(cache);
  model.step({context.part(sequence, 0, 77)});
  const uint64_t before = kvmgr::stats(cache).bytes_used;
  check(kvmgr_sequence_preempt(sequence.get(), store.get()));
  if (kvmgr::stats(cache).bytes_used >= before || before == 0) {
    std::printf("FAIL preempt frees no memory\n");
    ++context.failures;
  }
  if (kvmgr_sequence_reserve(sequence.get(), 1) != KVMGR_INVALID_STATE) {
    std::printf("FAIL a preempted sequence can be extended\n");
    ++context.failures;
  }
  model.step({context.part(other, 0, 100)});
  check(kvmgr_sequence_resume(sequence.get()));
  context.expect("resumed", model.step({context.part(sequence, 77, 40)}).data(), 77, 40);
}

void matched(Context &context, engine::Workers &workers) {
  const kvmgr::cache cache = context.cache(KVMGR_CACHE_PREFIX);
  engine::Model model(context.weights, cache, workers);
  {
    const kvmgr::sequence first = kvmgr::make_sequence(cache);
    model.step({context.part(first, 0, 100)});
  }
  const kvmgr::sequence second = kvmgr::make_sequence(cache);
  size_t matched = 0;
  check(kvmgr_sequence_match_prefix(second.get(), context.tokens.data(), 100, &matched));
  const size_t expected = 99 / context.block_size * context.block_size;
  if (matched != expected) {
    std::printf("FAIL matched %zu of %zu tokens\n", matched, expected);
    ++context.failures;
  }
  context.expect("matched", model.step({context.part(second, matched, 120 - matched)}).data(),
                 matched, 120 - matched);
}

/// A cache that holds half of the batch: the scheduler preempts, and the text stays the same.
void scheduled(Context &context, engine::Workers &workers) {
  const auto run = [&](uint64_t num_blocks, size_t *preemptions) {
    kvmgr_cache_config config = engine::cache_config(context.weights->shape, "full", num_blocks);
    config.block_size = 16;
    const kvmgr::cache cache = kvmgr::make_cache(config);
    engine::Scheduler scheduler(context.weights, cache, workers, 64);
    std::vector<engine::Request> requests(6);
    for (size_t i = 0; i < requests.size(); ++i) {
      requests[i].prompt.assign(context.tokens.begin(), context.tokens.begin() + 60 + std::ptrdiff_t(i));
      requests[i].max_new_tokens = 40;
    }
    std::vector<std::vector<int32_t>> texts;
    for (const engine::Result &result : scheduler.run(requests)) {
      texts.push_back(result.tokens);
      *preemptions += result.preemptions;
    }
    return texts;
  };
  size_t none = 0, some = 0;
  const auto roomy = run(1024, &none), tight = run(20, &some);
  if (none != 0 || some == 0 || roomy != tight) {
    std::printf("FAIL preemption changes the text (%zu and %zu preemptions)\n", none, some);
    ++context.failures;
  }
}

/// Ragged heads really free what they drop: the pool's own bytes, after a prompt of 1536 tokens.
void compressed(Context &context, engine::Workers &workers) {
  std::vector<int32_t> prompt;
  while (prompt.size() < 1536)
    prompt.insert(prompt.end(), context.tokens.begin(), context.tokens.end());
  prompt.resize(1536);
  const auto bytes = [&](const char *spec) {
    const kvmgr::cache cache =
        kvmgr::make_cache(engine::cache_config(context.weights->shape, spec, 8192));
    engine::Model model(context.weights, cache, workers);
    const kvmgr::sequence sequence = kvmgr::make_sequence(cache);
    for (size_t at = 0; at < prompt.size(); at += 256)
      model.step({{sequence.get(), prompt.data() + at, 256}});
    check(kvmgr_sequence_end_prefill(sequence.get()));
    return double(kvmgr::stats(cache).bytes_used);
  };
  const double share = bytes("snapkv(w=32) | adakv(0.2) | keep(0.25)") / bytes("full");
  std::printf("snapkv | adakv | keep(0.25) holds %.3f of the full cache's bytes\n", share);
  if (share >= 0.30) ++context.failures;
}

}  // namespace

int main(int argc, char **argv) try {
  if (argc != 2) throw std::runtime_error("usage: kvmgr-check MODEL");
  Context context{engine::Weights::load(argv[1]), {}, {}, KVMGR_LANE_SEQUENCE, 16, 1};
  const std::string text =
      "In the beginning was the word, and ab=417; the word was kept in blocks of sixteen, and "
      "cd=902; every block that was full was sealed, so that no one could change it. ?ab=417; "
      "Then the scheduler saw that the memory was good.";
  context.tokens = engine::tokenize(context.weights->shape, text);
  context.dense = engine::dense_forward(*context.weights, context.tokens);
  int rounds = 0;
  const struct {
    kvmgr_lane_width width;
    uint32_t block_size, num_workers;
  } rounds_of[] = {{KVMGR_LANE_SEQUENCE, 16, 1}, {KVMGR_LANE_SEQUENCE, 32, 3},
                   {KVMGR_LANE_LAYER, 32, 2},    {KVMGR_LANE_HEAD, 16, 2},
                   {KVMGR_LANE_HEAD, 32, 1}};
  for (const auto &round : rounds_of) {
    context.width = round.width;
    context.block_size = round.block_size;
    context.num_workers = round.num_workers;
    engine::Workers workers(round.num_workers);
    const kvmgr::cache cache = context.cache();
    engine::Model model(context.weights, cache, workers);
    single(context, model, cache);
    batched(context, model, cache);
    forked(context, model, cache);
    truncated(context, model, cache);
    preempted(context, model, cache);
    matched(context, workers);
    if (kvmgr::stats(cache).bytes_used != 0) {
      std::printf("FAIL %llu bytes leak\n", (unsigned long long)kvmgr::stats(cache).bytes_used);
      ++context.failures;
    }
    ++rounds;
  }
  engine::Workers workers(2);
  scheduled(context, workers);
  compressed(context, workers);
  std::printf("kvmgr-check: %d rounds, %d failures\n", rounds, context.failures);
  return context.failures == 0 ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "kvmgr-check: %s\n", error.what());
  return 1;
}
