// kvmgr-compare MODEL --text FILE --recall FILE --out DIR [--spec SPEC]... [--quantizers]
//               [--windows N] [--prompts N] [--window TOKENS] [--scored TOKENS]
//
// Runs one model under several cache specs side by side (evaluation.hpp says what it measures) and
// writes a table and the KV bytes held at every generated token as CSV and SVG. --quantizers compares
// every kind of quantizer of the library, sorted by bits.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "evaluation.hpp"
#include "kvmgr.h"

namespace {

using engine::Row;

struct Options {
  std::string model, out;
  std::vector<std::string> specs;
  bool quantizers = false;
  engine::Task task;
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

/// Formats of keys and values for --quantizers: at least one of every kind.
const char *kQuantizers[] = {
    "f32", "f16", "bf16", "q8_0", "had+q8_0", "int8", "fp8(e4m3)", "fp8(e5m2)", "q5_1", "q5_0",
    "had+q5_0", "q4_1", "q4_0", "had+q4_0", "iq4_nl", "had+iq4_nl", "nvfp4", "mxfp4", "int4",
    "had+int4", "tq(bits=4)", "tq(bits=3)", "tq(bits=2)", "kivi(bits=4)", "kivi(bits=2)",
    "nuq(bits=4)", "nuq(bits=3)", "nuq(bits=2)", "gear(bits=4)", "gear(bits=2)", "qjl(ratio=2)",
};

std::vector<std::string> quantizer_specs() {
  std::vector<std::string> specs;
  for (const std::string quantizer : kQuantizers) specs.push_back("quant(" + quantizer + ")");
  for (size_t i = 0; i < kvmgr_quantizer_count(); ++i) {
    const std::string name = kvmgr_quantizer_name(i);
    const bool listed = std::any_of(specs.begin(), specs.end(), [&](const std::string &spec) {
      return spec.find(name) != std::string::npos;
    });
    if (!listed) throw std::runtime_error("kQuantizers in compare.cpp lacks " + name);
  }
  return specs;
}

Options parse(int argc, char **argv) {
  Options options;
  engine::Arguments arguments(argc, argv);
  while (arguments.next()) {
    const std::string arg = arguments.current();
    if (arg == "--out") options.out = arguments.value();
    else if (arg == "--spec") options.specs.push_back(arguments.value());
    else if (arg == "--quantizers") options.quantizers = true;
    else if (!options.task.take(arguments)) arguments.positional(options.model);
  }
  if (options.model.empty() || options.out.empty() || !options.task.complete())
    throw std::runtime_error(
        std::string("usage: kvmgr-compare MODEL --out DIR [--spec SPEC]... [--quantizers] ") +
        engine::Task::usage);
  if (options.quantizers) {
    const auto all = quantizer_specs();
    options.specs.insert(options.specs.end(), all.begin(), all.end());
  }
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
    engine::progress(rows.size(), options.specs.size(), spec);
    rows.push_back(engine::evaluate(options.task, spec, weights, full));
  }
  engine::progress(rows.size(), options.specs.size(), "");
  if (options.quantizers)
    std::sort(rows.begin() + 1, rows.end(),
              [](const Row &a, const Row &b) { return a.bits < b.bits; });
  std::printf("full cache: %.4f nats/byte\n%s", rows[0].loss, engine::table(rows).c_str());
  engine::write_report(options.out, rows);
  std::printf("written: %s/table.md, kv_bytes.csv, kv_bytes.svg\n", options.out.c_str());
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "kvmgr-compare: %s\n", error.what());
  return 1;
}
