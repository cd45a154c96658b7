#include "evaluation.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <thread>

#include "math.hpp"
#include "scheduler.hpp"

namespace engine {
namespace {

using kvmgr::check;

constexpr size_t kBatch = 8, kChunk = 256, kQuestion = 4;

double resident_kib(const char *field) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (line.rfind(field, 0) == 0) return std::stod(line.substr(line.find(':') + 1));
  return 0;
}

std::string read_file(const std::string &path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// One spec in one process.
class Run {
 public:
  Run(const Task &task, const std::string &spec, std::shared_ptr<const Weights> weights)
      : task_(task),
        weights_(std::move(weights)),
        workers_(std::max(1u, std::thread::hardware_concurrency())),
        cache_(kvmgr::make_cache(cache_config(weights_->shape, spec.c_str(), 1 << 18))),
        model_(weights_, cache_, workers_) {
    row_.spec = spec;
    uint32_t needs = 0, window = 0;
    check(kvmgr_policy_needs(kvmgr::make_policy(spec.c_str()).get(), &needs, &window));
    replays_ = (needs & KVMGR_NEEDS_REPLAY) != 0;
  }

  Row run(const std::vector<float> &full, std::vector<float> &log_probs) {
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts now, where that is allowed
    const double before = resident_kib("VmRSS");
    const auto start = std::chrono::steady_clock::now();
    score_text(full, log_probs);
    recall();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const kvmgr_cache_stats stats = kvmgr::stats(cache_);
    row_.rss_kib = std::max(0.0, resident_kib("VmHWM") - before);
    row_.kept = kept_bytes_ / lossless_bytes_;
    row_.peak_kib = double(stats.bytes_peak) / 1024;
    row_.tokens_per_s = double(stats.tokens_appended) / seconds.count();
    return row_;
  }

 private:
  size_t vocab() const { return weights_->shape.vocab; }

  /// Reads a token list into a sequence, chunk by chunk; logits of the last token are left behind.
  void prefill(const std::vector<kvmgr::sequence> &sequences,
               const std::vector<std::vector<int32_t>> &tokens, size_t from_end) {
    std::vector<size_t> at(tokens.size(), 0);
    for (bool more = true; more;) {
      std::vector<Part> parts;
      for (size_t i = 0; i < tokens.size(); ++i) {
        const size_t left = tokens[i].size() - from_end - at[i];
        const size_t count = std::min(kChunk, left);
        if (count > 0) parts.push_back({sequences[i].get(), tokens[i].data() + at[i], count});
        at[i] += count;
      }
      more = !parts.empty();
      if (more) model_.step(parts);
    }
  }

  void score_text(const std::vector<float> &full, std::vector<float> &log_probs) {
    const std::string text = read_file(task_.text);
    const size_t window = task_.window;
    if (task_.scored < 2 || task_.scored >= window)
      throw std::runtime_error("--scored must be 2 to the window less 1");
    const size_t prompt = window - task_.scored;
    size_t scored = 0;
    for (size_t first = 0; first < task_.windows; first += kBatch) {
      std::vector<kvmgr::sequence> sequences;
      std::vector<std::vector<int32_t>> prompts, windows;
      for (size_t i = first; i < std::min(task_.windows, first + kBatch); ++i) {
        const size_t start = i * (text.size() - window) / task_.windows;
        windows.push_back(tokenize(weights_->shape, text.substr(start, window - 1)));
        prompts.emplace_back(windows.back().begin(), windows.back().begin() + std::ptrdiff_t(prompt));
        sequences.push_back(kvmgr::make_sequence(cache_));
      }
      prefill(sequences, prompts, 0);
      for (size_t i = 0; i < sequences.size(); ++i)
        end_prefill(sequences[i], prompts[i].data(), prompts[i].size());
      for (size_t t = prompt; t + 1 < window; ++t) {
        std::vector<Part> parts;
        for (size_t i = 0; i < windows.size(); ++i)
          parts.push_back({sequences[i].get(), windows[i].data() + t, 1});
        std::vector<float> logits = model_.step(parts);
        for (size_t i = 0; i < windows.size(); ++i) {
          float *row = &logits[i * vocab()];
          log_softmax(row, vocab());
          row_.loss -= row[windows[i][t + 1]];
          if (!full.empty()) row_.kl += divergence(&full[scored * vocab()], row);
          ++scored;
          if (full.empty()) log_probs.insert(log_probs.end(), row, row + vocab());
        }
        if (first == 0)
          row_.bytes.push_back(held(sequences) / double(windows.size()));
      }
      if (first == 0) {
        const double tokens = double((window - 1) * windows.size());
        row_.bits = 8 * held(sequences) / (tokens * elements());
      }
    }
    row_.loss /= double(scored);
    row_.kl /= double(scored);
  }

  /// Bytes of blocks and of what was fitted to each prompt.
  double held(const std::vector<kvmgr::sequence> &sequences) const {
    double bytes = double(kvmgr::stats(cache_).bytes_used);
    for (const kvmgr::sequence &sequence : sequences) bytes += double(stats_of(sequence).basis_bytes);
    return bytes;
  }

  static kvmgr_sequence_stats stats_of(const kvmgr::sequence &sequence) {
    kvmgr_sequence_stats stats{};
    stats.struct_size = sizeof stats;
    check(kvmgr_sequence_get_stats(sequence.get(), &stats));
    return stats;
  }

  /// Elements of K and V of a token.
  double elements() const {
    const Shape &shape = weights_->shape;
    return 2.0 * double(shape.layers * shape.kv_heads * shape.head_dim);
  }

  /// Repeats the prompt for a policy that wants to see that: computed, noted and forgotten.
  void replay(const kvmgr::sequence &sequence, const int32_t *prompt, size_t count) {
    std::vector<int32_t> again = tokenize(weights_->shape, "\n");
    again.insert(again.end(), prompt + 1, prompt + count);  // without the start of text
    check(kvmgr_sequence_replay(sequence.get(), 0, count));
    const Part part{sequence.get(), again.data(), again.size()};
    if (!model_.reserve({part})) throw kvmgr::error(KVMGR_OUT_OF_BLOCKS);
    model_.forward({part});
    check(kvmgr_sequence_commit(sequence.get(), nullptr, 0));
  }

  /// Lets the policy act on the prompt and counts what it leaves of a lossless 16-bit cache.
  void end_prefill(const kvmgr::sequence &sequence, const int32_t *prompt, size_t count) {
    if (replays_) replay(sequence, prompt, count);
    check(kvmgr_sequence_end_prefill(sequence.get()));
    const kvmgr_sequence_stats stats = stats_of(sequence);
    kept_bytes_ += double(stats.bytes + stats.basis_bytes);
    lossless_bytes_ += 2 * elements() * double(stats.num_tokens);
  }

  double divergence(const float *p, const float *q) const {
    double sum = 0;
    for (size_t i = 0; i < vocab(); ++i) sum += std::exp(double(p[i])) * (double(p[i]) - q[i]);
    return sum;
  }

  void recall() {
    std::ifstream file(task_.recall);
    std::vector<std::vector<int32_t>> prompts;
    std::vector<std::string> answers;
    std::string line;
    while (prompts.size() < task_.prompts && std::getline(file, line)) {
      const size_t tab = line.find('\t');
      prompts.push_back(tokenize(weights_->shape, line.substr(0, tab)));
      answers.push_back(line.substr(tab + 1) + ";");
    }
    if (prompts.empty()) throw std::runtime_error(task_.recall + ": no prompts");
    size_t aware = 0, blind = 0;
    for (size_t first = 0; first < prompts.size(); first += kBatch) {
      const size_t count = std::min(kBatch, prompts.size() - first);
      const std::vector<std::vector<int32_t>> batch(prompts.begin() + std::ptrdiff_t(first),
                                                    prompts.begin() + std::ptrdiff_t(first + count));
      std::vector<kvmgr::sequence> sequences, forks;
      for (size_t i = 0; i < count; ++i) sequences.push_back(kvmgr::make_sequence(cache_));
      prefill(sequences, batch, kQuestion);
      // The context is read once; one fork is compressed before the question, the other after it.
      for (const kvmgr::sequence &sequence : sequences) forks.push_back(kvmgr::fork(sequence));
      for (size_t i = 0; i < count; ++i) {
        blind += answer(forks[i], batch[i], answers[first + i], true);
        aware += answer(sequences[i], batch[i], answers[first + i], false);
      }
    }
    row_.recall_aware = double(aware) / double(prompts.size());
    row_.recall_blind = double(blind) / double(prompts.size());
  }

  /// Asks the question and generates; 1 if the answer is exact.
  size_t answer(const kvmgr::sequence &sequence, const std::vector<int32_t> &prompt,
                const std::string &expected, bool compress_first) {
    if (compress_first) end_prefill(sequence, prompt.data(), prompt.size() - kQuestion);
    const int32_t *question = prompt.data() + prompt.size() - kQuestion;
    int32_t token = argmax(model_.step({{sequence.get(), question, kQuestion}}).data(), vocab());
    if (!compress_first) end_prefill(sequence, prompt.data(), prompt.size());
    for (char c : expected) {
      if (token != int32_t(static_cast<unsigned char>(c))) return 0;
      token = argmax(model_.step({{sequence.get(), &token, 1}}).data(), vocab());
    }
    return 1;
  }

  const Task &task_;
  std::shared_ptr<const Weights> weights_;
  Workers workers_;
  kvmgr::cache cache_;
  Model model_;
  Row row_;
  bool replays_ = false;
  double kept_bytes_ = 0, lossless_bytes_ = 0;
};

template <class T>
void write_values(int fd, const T *values, size_t count) {
  const char *data = reinterpret_cast<const char *>(values);
  for (size_t left = count * sizeof(T); left > 0;) {
    const ssize_t written = write(fd, data, left);
    if (written <= 0) throw std::runtime_error("cannot write to the parent process");
    data += written;
    left -= size_t(written);
  }
}

template <class T>
std::vector<T> read_values(int fd, size_t count) {
  std::vector<T> values(count);
  char *data = reinterpret_cast<char *>(values.data());
  for (size_t left = count * sizeof(T); left > 0;) {
    const ssize_t got = read(fd, data, left);
    if (got <= 0) throw std::runtime_error("the process of a spec ended early");
    data += got;
    left -= size_t(got);
  }
  return values;
}

}  // namespace

bool Task::take(Arguments &arguments) {
  const std::string name = arguments.current();
  const auto number = [&](size_t &target) { return target = std::stoul(arguments.value()), true; };
  if (name == "--text") return text = arguments.value(), true;
  if (name == "--recall") return recall = arguments.value(), true;
  if (name == "--windows") return number(windows);
  if (name == "--window") return number(window);
  if (name == "--scored") return number(scored);
  if (name == "--prompts") return number(prompts);
  return false;
}

// The child's numbers come back through a pipe.
Row evaluate(const Task &task, const std::string &spec,
             const std::shared_ptr<const Weights> &weights, std::vector<float> &full) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("pipe failed");
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    try {
      close(ends[0]);
      std::vector<float> log_probs;
      const Row row = Run(task, spec, weights).run(full, log_probs);
      const size_t sizes[] = {row.bytes.size(), log_probs.size()};
      write_values(ends[1], static_cast<const Measures *>(&row), 1);
      write_values(ends[1], sizes, 2);
      write_values(ends[1], row.bytes.data(), row.bytes.size());
      write_values(ends[1], log_probs.data(), log_probs.size());
      _exit(0);
    } catch (const std::exception &error) {
      std::fprintf(stderr, "%s: %s\n", spec.c_str(), error.what());
      _exit(1);
    }
  }
  close(ends[1]);
  Row row;
  static_cast<Measures &>(row) = read_values<Measures>(ends[0], 1)[0];
  row.spec = spec;
  const std::vector<size_t> sizes = read_values<size_t>(ends[0], 2);
  row.bytes = read_values<double>(ends[0], sizes[0]);
  const std::vector<float> log_probs = read_values<float>(ends[0], sizes[1]);
  if (full.empty()) full = log_probs;
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error("the process of " + spec + " failed");
  return row;
}

void progress(size_t done, size_t total, const std::string &next) {
  if (!isatty(STDERR_FILENO)) {
    if (done < total) std::fprintf(stderr, "[%zu/%zu] %s\n", done + 1, total, next.c_str());
    return;
  }
  const size_t width = 30, filled = width * done / total;
  std::fprintf(stderr, "\r\033[K[%s%s] %zu/%zu %s", std::string(filled, '#').c_str(),
               std::string(width - filled, '.').c_str(), done, total, next.c_str());
  if (done == total) std::fputc('\n', stderr);
}

}  // namespace engine
