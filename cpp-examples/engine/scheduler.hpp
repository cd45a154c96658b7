// scheduler.hpp: continuous batching. Prompts are read in chunks next to sequences that generate;
// when blocks run out, the youngest sequence is preempted to host memory and resumed later.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "model.hpp"

namespace engine {

struct Request {
  std::vector<int32_t> prompt;
  size_t max_new_tokens = 0;
  /// Generation ends after this token; -1 for never.
  int32_t stop = -1;
  /// 0 for greedy.
  float temperature = 0;
  uint64_t seed = 0;
  /// Called with each generated token; may be empty.
  std::function<void(int32_t)> on_token;
};

struct Result {
  std::vector<int32_t> tokens;
  size_t matched = 0;  ///< prompt tokens that came from the prefix cache
  size_t preemptions = 0;
};

class Scheduler {
 public:
  Scheduler(std::shared_ptr<const Weights> weights, const kvmgr::cache &cache, Workers &workers,
            size_t chunk = 256, size_t max_running = 16);

  /// Runs all requests to their end; results in the order of the requests.
  std::vector<Result> run(const std::vector<Request> &requests);

 private:
  struct Running {
    size_t request;
    kvmgr::sequence sequence;
    std::vector<int32_t> pending;  ///< tokens to compute next
    bool prompt_done = false;
    uint64_t random;
  };

  void admit(const std::vector<Request> &requests, std::vector<Result> &results);
  bool preempt_youngest(std::vector<Result> &results);
  void resume();
  void advance(const std::vector<Request> &requests, std::vector<Result> &results);
  std::vector<Part> plan() const;

  std::shared_ptr<const Weights> weights_;
  const kvmgr::cache &cache_;
  Model model_;
  kvmgr::store swap_;
  size_t chunk_, max_running_, next_ = 0;
  std::vector<Running> running_;
  std::deque<Running> preempted_;
  bool crowded_ = false;  ///< a sequence was preempted and none has ended since
};

/// Bytes as tokens, with the model's BOS in front.
std::vector<int32_t> tokenize(const Shape &shape, const std::string &text);

/// One token as text; empty for control tokens.
std::string detokenize(int32_t token);

/// Picks a token from logits; temperature 0 is greedy.
int32_t sample(const float *logits, size_t count, float temperature, uint64_t &random);

}  // namespace engine
