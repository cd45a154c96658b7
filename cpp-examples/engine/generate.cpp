// kvmgr-generate MODEL --prompt TEXT [--spec SPEC] [--n N] [--temperature T] [--seed S]
// Generates text with a model whose KV cache follows a spec.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <thread>

#include "arguments.hpp"
#include "scheduler.hpp"

namespace {

struct Options {
  std::string model, prompt, spec = "full";
  size_t n = 200;
  float temperature = 0;
  uint64_t seed = 1;
};

Options parse(int argc, char **argv) {
  Options options;
  engine::Arguments arguments(argc, argv);
  while (arguments.next()) {
    const std::string arg = arguments.current();
    if (arg == "--prompt") options.prompt = arguments.value();
    else if (arg == "--spec") options.spec = arguments.value();
    else if (arg == "--n") options.n = std::stoul(arguments.value());
    else if (arg == "--temperature") options.temperature = std::stof(arguments.value());
    else if (arg == "--seed") options.seed = std::stoull(arguments.value());
    else arguments.positional(options.model);
  }
  if (options.model.empty() || options.prompt.empty())
    throw std::runtime_error(
        "usage: kvmgr-generate MODEL --prompt TEXT [--spec SPEC] [--n N] [--temperature T] [--seed S]");
  return options;
}

}  // namespace

int main(int argc, char **argv) try {
  const Options options = parse(argc, argv);
  const auto weights = engine::Weights::load(options.model);
  engine::Workers workers(std::max(1u, std::thread::hardware_concurrency()));
  const kvmgr::cache cache =
      kvmgr::make_cache(engine::cache_config(weights->shape, options.spec.c_str(), 1 << 16));
  engine::Scheduler scheduler(weights, cache, workers);
  engine::Request request;
  request.prompt = engine::tokenize(weights->shape, options.prompt);
  request.max_new_tokens = options.n;
  request.temperature = options.temperature;
  request.seed = options.seed;
  request.on_token = [](int32_t token) {
    std::fputs(engine::detokenize(token).c_str(), stdout);
    std::fflush(stdout);
  };
  std::fputs(options.prompt.c_str(), stdout);
  scheduler.run({request});
  const kvmgr_cache_stats stats = kvmgr::stats(cache);
  std::printf("\n[%s: %llu tokens, peak KV %.1f KiB]\n", options.spec.c_str(),
              (unsigned long long)stats.tokens_appended, double(stats.bytes_peak) / 1024);
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "kvmgr-generate: %s\n", error.what());
  return 1;
}
