// kvmgr-compare MODEL --text FILE --recall FILE --out DIR [--spec SPEC]... [--windows N]
//               [--prompts N] [--window TOKENS]
//
// Runs one model under several cache specs side by side. Each spec runs in its own process, so
// that its memory can be measured, and does two tasks:
//   text    windows of held-out text: the first half is the prompt, then the policy compresses,
//           and the second half is scored token by token through the compressed cache;
//   recall  prompts that ask for a value they contain: once compressed after the question
//           ("recall"), once before it ("recall blind").
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#include "arguments.hpp"
#include "math.hpp"
#include "report.hpp"
#include "scheduler.hpp"

namespace {

using engine::Part;
using engine::Row;
using kvmgr::check;

struct Options {
  std::string model, text, recall, out;
  std::vector<std::string> specs;
  size_t windows = 4, prompts = 16, window = 768;
};

const char *kSpecs[] = {
    "full",
    "quant(q8_0)",
    "quant(q4_0)",
    "quant(k=had+q4_0, v=q4_0)",
    "quant(kivi4)",
    "quant(kivi2)",
    "stream(sink=4) | keep(0.25)",
    "stream(sink=4) | keep(0.25) | pos(cache_relative)",
    "h2o(recent=64) | keep(0.25)",
    "snapkv(w=32) | keep(0.25)",
    "snapkv(w=32) | adakv(0.2) | keep(0.25)",
    "snapkv(w=32) | adakv(0.2) | keep(0.25) | quant(k=had+q4_0, v=q4_0)",
};

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
  Run(const Options &options, const std::string &spec, std::shared_ptr<const engine::Weights> weights)
      : options_(options),
        weights_(std::move(weights)),
        workers_(std::max(1u, std::thread::hardware_concurrency())),
        cache_(kvmgr::make_cache(engine::cache_config(weights_->shape, spec.c_str(), 1 << 18))),
        model_(weights_, cache_, workers_) {
    row_.spec = spec;
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
    const std::string text = read_file(options_.text);
    const size_t window = options_.window, half = window / 2;
    size_t scored = 0;
    for (size_t first = 0; first < options_.windows; first += kBatch) {
      std::vector<kvmgr::sequence> sequences;
      std::vector<std::vector<int32_t>> prompts, windows;
      for (size_t i = first; i < std::min(options_.windows, first + kBatch); ++i) {
        const size_t start = i * (text.size() - window) / options_.windows;
        windows.push_back(engine::tokenize(weights_->shape, text.substr(start, window - 1)));
        prompts.emplace_back(windows.back().begin(), windows.back().begin() + std::ptrdiff_t(half));
        sequences.push_back(kvmgr::make_sequence(cache_));
      }
      prefill(sequences, prompts, 0);
      for (const kvmgr::sequence &sequence : sequences)
        check(kvmgr_sequence_end_prefill(sequence.get()));
      for (size_t t = half; t + 1 < window; ++t) {
        std::vector<Part> parts;
        for (size_t i = 0; i < windows.size(); ++i)
          parts.push_back({sequences[i].get(), windows[i].data() + t, 1});
        std::vector<float> logits = model_.step(parts);
        for (size_t i = 0; i < windows.size(); ++i) {
          float *row = &logits[i * vocab()];
          engine::log_softmax(row, vocab());
          row_.loss -= row[windows[i][t + 1]];
          if (!full.empty()) row_.kl += divergence(&full[scored * vocab()], row);
          ++scored;
          if (full.empty()) log_probs.insert(log_probs.end(), row, row + vocab());
        }
        if (first == 0)
          row_.bytes.push_back(double(kvmgr::stats(cache_).bytes_used) / double(windows.size()));
      }
      if (first == 0) {
        const engine::Shape &shape = weights_->shape;
        const double elements = 2.0 * double(shape.layers * shape.kv_heads * shape.head_dim) *
                                double((window - 1) * windows.size());
        row_.bits = 8 * double(kvmgr::stats(cache_).bytes_used) / elements;
      }
    }
    row_.loss /= double(scored);
    row_.kl /= double(scored);
  }

  double divergence(const float *p, const float *q) const {
    double sum = 0;
    for (size_t i = 0; i < vocab(); ++i) sum += std::exp(double(p[i])) * (double(p[i]) - q[i]);
    return sum;
  }

  void recall() {
    std::ifstream file(options_.recall);
    std::vector<std::vector<int32_t>> prompts;
    std::vector<std::string> answers;
    std::string line;
    while (prompts.size() < options_.prompts && std::getline(file, line)) {
      const size_t tab = line.find('\t');
      prompts.push_back(engine::tokenize(weights_->shape, line.substr(0, tab)));
      answers.push_back(line.substr(tab + 1) + ";");
    }
    if (prompts.empty()) throw std::runtime_error(options_.recall + ": no prompts");
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
    if (compress_first) check(kvmgr_sequence_end_prefill(sequence.get()));
    const int32_t *question = prompt.data() + prompt.size() - kQuestion;
    int32_t token = engine::argmax(model_.step({{sequence.get(), question, kQuestion}}).data(), vocab());
    if (!compress_first) check(kvmgr_sequence_end_prefill(sequence.get()));
    for (char c : expected) {
      if (token != int32_t(static_cast<unsigned char>(c))) return 0;
      token = engine::argmax(model_.step({{sequence.get(), &token, 1}}).data(), vocab());
    }
    return 1;
  }

  const Options &options_;
  std::shared_ptr<const engine::Weights> weights_;
  engine::Workers workers_;
  kvmgr::cache cache_;
  engine::Model model_;
  Row row_;
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

/// Runs a spec in a child process and brings its numbers back through a pipe.
Row run_in_child(const Options &options, const std::string &spec,
                 const std::shared_ptr<const engine::Weights> &weights, std::vector<float> &full) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("pipe failed");
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    try {
      close(ends[0]);
      std::vector<float> log_probs;
      const Row row = Run(options, spec, weights).run(full, log_probs);
      const double numbers[] = {row.bits, row.peak_kib, row.rss_kib, row.tokens_per_s, row.loss,
                                row.kl, row.recall_aware, row.recall_blind,
                                double(row.bytes.size()), double(log_probs.size())};
      write_values(ends[1], numbers, 10);
      write_values(ends[1], row.bytes.data(), row.bytes.size());
      write_values(ends[1], log_probs.data(), log_probs.size());
      _exit(0);
    } catch (const std::exception &error) {
      std::fprintf(stderr, "%s: %s\n", spec.c_str(), error.what());
      _exit(1);
    }
  }
  close(ends[1]);
  const std::vector<double> numbers = read_values<double>(ends[0], 10);
  Row row;
  row.spec = spec;
  row.bits = numbers[0];
  row.peak_kib = numbers[1];
  row.rss_kib = numbers[2];
  row.tokens_per_s = numbers[3];
  row.loss = numbers[4];
  row.kl = numbers[5];
  row.recall_aware = numbers[6];
  row.recall_blind = numbers[7];
  row.bytes = read_values<double>(ends[0], size_t(numbers[8]));
  const std::vector<float> log_probs = read_values<float>(ends[0], size_t(numbers[9]));
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

Options parse(int argc, char **argv) {
  Options options;
  engine::Arguments arguments(argc, argv);
  while (arguments.next()) {
    const std::string arg = arguments.current();
    if (arg == "--text") options.text = arguments.value();
    else if (arg == "--recall") options.recall = arguments.value();
    else if (arg == "--out") options.out = arguments.value();
    else if (arg == "--spec") options.specs.push_back(arguments.value());
    else if (arg == "--windows") options.windows = std::stoul(arguments.value());
    else if (arg == "--prompts") options.prompts = std::stoul(arguments.value());
    else if (arg == "--window") options.window = std::stoul(arguments.value());
    else arguments.positional(options.model);
  }
  if (options.model.empty() || options.text.empty() || options.recall.empty() || options.out.empty())
    throw std::runtime_error(
        "usage: kvmgr-compare MODEL --text FILE --recall FILE --out DIR [--spec SPEC]... "
        "[--windows N] [--prompts N] [--window TOKENS]");
  // The first spec is the one that the others are compared with.
  if (options.specs.empty()) options.specs.assign(std::begin(kSpecs), std::end(kSpecs));
  else if (options.specs[0] != "full") options.specs.insert(options.specs.begin(), "full");
  return options;
}

}  // namespace

int main(int argc, char **argv) try {
  const Options options = parse(argc, argv);
  if (mkdir(options.out.c_str(), 0777) != 0 && errno != EEXIST)
    throw std::runtime_error(options.out + ": cannot be made");
  const auto weights = engine::Weights::load(options.model);
  std::vector<Row> rows;
  std::vector<float> full;
  for (const std::string &spec : options.specs) {
    progress(rows.size(), options.specs.size(), spec);
    rows.push_back(run_in_child(options, spec, weights, full));
  }
  progress(rows.size(), options.specs.size(), "");
  std::printf("full cache: %.4f nats/byte\n%s", rows[0].loss, engine::table(rows).c_str());
  engine::write_report(options.out, rows);
  std::printf("written: %s/table.md, kv_bytes.csv, kv_bytes.svg\n", options.out.c_str());
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "kvmgr-compare: %s\n", error.what());
  return 1;
}
