#include "scheduler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "math.hpp"

namespace engine {

Scheduler::Scheduler(std::shared_ptr<const Weights> weights, const kvmgr::cache &cache,
                     Workers &workers, size_t chunk, size_t max_running)
    : weights_(std::move(weights)),
      cache_(cache),
      model_(weights_, cache, workers),
      swap_(kvmgr::make_store("host")),
      chunk_(chunk),
      max_running_(max_running) {}

std::vector<Result> Scheduler::run(const std::vector<Request> &requests) {
  std::vector<Result> results(requests.size());
  next_ = 0;
  while (next_ < requests.size() || !running_.empty() || !preempted_.empty()) {
    resume();
    admit(requests, results);
    const std::vector<Part> parts = plan();
    if (!model_.reserve(parts)) {
      if (!preempt_youngest(results))
        throw std::runtime_error("the cache is too small for a single sequence");
      continue;
    }
    model_.forward(parts);
    for (const Part &part : parts)
      kvmgr::check(kvmgr_sequence_commit(part.sequence, part.tokens, part.count));
    advance(requests, results);
  }
  return results;
}

// Preempted sequences come first: they have waited longest and hold finished work.
void Scheduler::resume() {
  // What was preempted waits until a sequence has ended: coming back at once it would only push
  // out the next one, and nobody would get on.
  if (crowded_ && !running_.empty()) return;
  while (!preempted_.empty() && running_.size() < max_running_) {
    if (!kvmgr::check_blocks(kvmgr_sequence_resume(preempted_.front().sequence.get()))) return;
    running_.push_back(std::move(preempted_.front()));
    preempted_.pop_front();
  }
}

void Scheduler::admit(const std::vector<Request> &requests, std::vector<Result> &results) {
  while (preempted_.empty() && next_ < requests.size() && running_.size() < max_running_) {
    const Request &request = requests[next_];
    Running running{next_, kvmgr::make_sequence(cache_), request.prompt, false,
                    request.seed * 2 + 1};
    size_t matched = 0;
    kvmgr::check(kvmgr_sequence_match_prefix(running.sequence.get(), request.prompt.data(),
                                             request.prompt.size(), &matched));
    running.pending.erase(running.pending.begin(), running.pending.begin() + std::ptrdiff_t(matched));
    results[next_].matched = matched;
    running_.push_back(std::move(running));
    ++next_;
  }
}

std::vector<Part> Scheduler::plan() const {
  std::vector<Part> parts;
  for (const Running &running : running_) {
    const size_t count = std::min(chunk_, running.pending.size());
    parts.push_back({running.sequence.get(), running.pending.data(), count});
  }
  return parts;
}

bool Scheduler::preempt_youngest(std::vector<Result> &results) {
  if (running_.size() < 2) return false;
  Running youngest = std::move(running_.back());
  running_.pop_back();
  kvmgr::check(kvmgr_sequence_preempt(youngest.sequence.get(), swap_.get()));
  ++results[youngest.request].preemptions;
  preempted_.push_front(std::move(youngest));
  crowded_ = true;
  return true;
}

void Scheduler::advance(const std::vector<Request> &requests, std::vector<Result> &results) {
  // The logits of the step are those of the last token of each part.
  const std::vector<float> logits = model_.last_logits();
  const size_t vocab = weights_->shape.vocab;
  std::vector<Running> still;
  for (size_t i = 0; i < running_.size(); ++i) {
    Running &running = running_[i];
    const Request &request = requests[running.request];
    Result &result = results[running.request];
    const size_t count = std::min(chunk_, running.pending.size());
    running.pending.erase(running.pending.begin(), running.pending.begin() + std::ptrdiff_t(count));
    if (running.pending.empty()) {
      if (!running.prompt_done) {
        kvmgr::check(kvmgr_sequence_end_prefill(running.sequence.get()));
        running.prompt_done = true;
      }
      const int32_t token =
          sample(&logits[i * vocab], vocab, request.temperature, running.random);
      if (result.tokens.size() < request.max_new_tokens) {
        result.tokens.push_back(token);
        if (request.on_token) request.on_token(token);
      }
      if (token == request.stop || result.tokens.size() >= request.max_new_tokens) {
        crowded_ = false;
        continue;
      }
      running.pending.push_back(token);
    }
    still.push_back(std::move(running));
  }
  running_ = std::move(still);
}

std::vector<int32_t> tokenize(const Shape &shape, const std::string &text) {
  std::vector<int32_t> tokens{shape.bos};
  for (unsigned char byte : text) tokens.push_back(byte);
  return tokens;
}

std::string detokenize(int32_t token) {
  return token < 256 ? std::string(1, char(token)) : std::string();
}

int32_t sample(const float *logits, size_t count, float temperature, uint64_t &random) {
  if (temperature <= 0) return argmax(logits, count);
  std::vector<float> p(logits, logits + count);
  for (float &x : p) x /= temperature;
  log_softmax(p.data(), count);
  random = random * 6364136223846793005u + 1442695040888963407u;
  double left = double(random >> 11) / 9007199254740992.0;
  for (size_t i = 0; i < count; ++i) {
    left -= std::exp(double(p[i]));
    if (left < 0) return int32_t(i);
  }
  return int32_t(count - 1);
}

}  // namespace engine
