// kvmgr-pareto MODEL --text FILE --recall FILE --out DIR [--list] [--only TEXT] [task options]
//
// Quality against KV bytes for every policy, every quantizer and combinations of both
// (evaluation.hpp says what is measured). Writes pareto.md, pareto.csv and pareto.svg and prints
// the Pareto fronts: the specs that no other spec beats in both bytes and quality.
// --list prints the specs and stops; --only leaves those that contain TEXT.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "arguments.hpp"
#include "evaluation.hpp"
#include "plot.hpp"

namespace {

using engine::Row;

struct Options {
  std::string model, out, only;
  bool list = false;
  engine::Task task;
};

/// What is varied along one line of the plot; % stands for the part of the tokens that stays.
const char *kPolicies[] = {
    "stream(sink=4) | keep(%)",
    "kvzip | global | keep(%)",
    "snapkv(w=32) | adakv(0.2) | keep(%)",
    "expected | adakv(0.2) | keep(%)",
    "keydiff | keep(%)",
    "cake(w=32) | preferences(w=32) | keep(%)",
    "h2o(recent=32) | keep(%)",
    "snapkv(w=32) | keep(%)",
    "snapkv(w=32) | pyramid(w=32) | keep(%)",
    "finch(w=32) | keep(%)",
    "prefill_end | tova | keep(%)",
    "prefill_end | scissorhands(recent=16) | keep(%)",
    "observed | keep(%)",
    "knorm | keep(%)",
    "expected | keep(%)",
    "lagkv | keep(%)",
    "cur | keep(%)",
    "snapkv(w=32) | chunk(10) | keep(%)",
    "capkv | keep(%)",
    "nacl(w=32) | keep(%)",
    "keyformer(w=32) | keep(%)",
    "pyramidinfer(w=32) | pyramid(w=32) | keep(%)",
    "h2o(recent=32) | buzz | keep(%)",
    "simlayer(threshold=%, recent=64)",
    "fastgen(mass=%)",
    "leverage | keep(%)",
    "noncausal | keep(%)",
    "compactor | keep(%)",
    "random(seed=1) | keep(%)",
    "snapkv(w=32) | squeeze | keep(%)",
    "kvzip | compose | keep(%)",
    "snapkv(w=32) | keep(%) | merge",
    "snapkv(w=32) | keep(%) | d2o",
    "snapkv(w=32) | keep(%) | cam",
    "snapkv(w=32) | keep(%) | kvmerger",
    "snapkv(w=32) | keep(%) | demote(kivi2)",
};

const char *kQuantizers[] = {"q8_0", "q4_0", "k=had+q4_0, v=q4_0", "kivi4", "kivi2"};

/// Combinations: the policies worth it, with each of these formats.
const char *kCombined[] = {"stream(sink=4)", "snapkv(w=32) | adakv(0.2)", "kvzip | global"};
const char *kCombinedFormats[] = {"q8_0", "k=had+q4_0, v=q4_0"};

const char *kShares[] = {"0.5", "0.25", "0.1"};

struct Spec {
  std::string line, text;
};

std::string fill(std::string text, const std::string &share) {
  return text.replace(text.find('%'), 1, share);
}

std::vector<Spec> specs(const std::string &only) {
  std::vector<Spec> all{{"full", "full"}};
  for (const std::string quantizer : kQuantizers)
    all.push_back({"quantizers", "quant(" + quantizer + ")"});
  for (const std::string policy : kCombined)
    for (const std::string format : kCombinedFormats) {
      const std::string line = policy + " | keep(%) | quant(" + format + ")";
      for (const char *share : {"0.5", "0.35", "0.25"})
        all.push_back({line, fill(line, share)});
    }
  for (const std::string policy : kPolicies)
    for (const char *share : kShares) all.push_back({policy, fill(policy, share)});
  // The full cache, which the others are compared with, stays.
  all.erase(std::remove_if(all.begin() + 1, all.end(),
                           [&](const Spec &spec) {
                             return spec.text.find(only) == std::string::npos;
                           }),
            all.end());
  return all;
}

struct Result {
  std::string line;
  Row row;
};

/// A measure of quality, higher is better.
struct Quality {
  const char *name;
  double (*of)(const Row &row);
};

const Quality kQualities[] = {
    {"recall", [](const Row &row) { return row.recall_aware; }},
    {"recall blind", [](const Row &row) { return row.recall_blind; }},
    {"KL", [](const Row &row) { return -row.kl; }},
};

/// Those that no other one beats, from few bytes to many.
std::vector<const Row *> front(const std::vector<Result> &results, const Quality &quality) {
  std::vector<const Row *> sorted, best;
  for (const Result &result : results) sorted.push_back(&result.row);
  std::sort(sorted.begin(), sorted.end(), [&](const Row *a, const Row *b) {
    return a->kept != b->kept ? a->kept < b->kept : quality.of(*a) > quality.of(*b);
  });
  for (const Row *row : sorted)
    if (best.empty() || quality.of(*row) > quality.of(*best.back())) best.push_back(row);
  return best;
}

std::string table(std::vector<const Row *> rows, bool escape) {
  std::vector<std::vector<std::string>> cells{
      {"spec", "KV bytes", "KL", "loss diff", "recall", "recall blind"}};
  for (const Row *row : rows)
    cells.push_back({'`' + (escape ? engine::escape_pipes(row->spec) : row->spec) + '`',
                     engine::percent(row->kept), engine::number(row->kl, 4),
                     engine::number(row->loss - rows[0]->loss, 4),
                     engine::percent(row->recall_aware), engine::percent(row->recall_blind)});
  return engine::aligned(cells);
}

std::string report(const std::vector<Result> &results, bool escape) {
  std::vector<const Row *> all;
  for (const Result &result : results) all.push_back(&result.row);
  std::string text = table(all, escape);
  for (const Quality &quality : kQualities) {
    std::vector<const Row *> best = front(results, quality);
    best.insert(best.begin(), all[0]);
    text += std::string("\nPareto front of ") + quality.name + ", after the full cache:\n\n" +
            table(best, escape);
  }
  return text;
}

std::string plot(const std::vector<Result> &results) {
  const auto panel = [](const char *title) {
    return engine::Panel{title, "KV bytes right after the prompt, part of a 16-bit cache",
                         "", true, false, {}};
  };
  std::vector<engine::Panel> panels{panel("recall, policy after the question"),
                                    panel("recall, policy before the question"),
                                    panel("KL divergence from the full cache (lower is better)")};
  for (const Result &result : results) {
    if (result.line == "full") continue;
    const double values[] = {result.row.recall_aware, result.row.recall_blind, result.row.kl};
    for (size_t i = 0; i < panels.size(); ++i) {
      auto &series = panels[i].series;
      if (series.empty() || series.back().name != result.line) series.push_back({result.line, {}});
      series.back().points.emplace_back(result.row.kept, values[i]);
    }
  }
  for (engine::Panel &shown : panels)
    for (engine::Series &series : shown.series)
      std::sort(series.points.begin(), series.points.end());
  return engine::svg(panels);
}

std::string csv(const std::vector<Result> &results) {
  std::string text = "line,spec,kept,kl,loss,recall,recall_blind\n";
  for (const Result &result : results) {
    const Row &row = result.row;
    text += '"' + result.line + "\",\"" + row.spec + '"';
    for (double value : {row.kept, row.kl, row.loss, row.recall_aware, row.recall_blind})
      text += ',' + engine::number(value, 5);
    text += '\n';
  }
  return text;
}

/// The files, after each spec: what has been measured is there if the run is stopped.
void write(const std::string &folder, const std::vector<Result> &results) {
  engine::write_file(folder + "/pareto.csv", csv(results));
  engine::write_file(folder + "/pareto.md", report(results, true));
  engine::write_file(folder + "/pareto.svg", plot(results));
}

Options parse(int argc, char **argv) {
  Options options;
  options.task.window = 768;
  options.task.scored = 96;
  options.task.prompts = 20;
  engine::Arguments arguments(argc, argv);
  while (arguments.next()) {
    const std::string arg = arguments.current();
    if (arg == "--out") options.out = arguments.value();
    else if (arg == "--only") options.only = arguments.value();
    else if (arg == "--list") options.list = true;
    else if (!options.task.take(arguments)) arguments.positional(options.model);
  }
  if (!options.list &&
      (options.model.empty() || options.out.empty() || !options.task.complete()))
    throw std::runtime_error(std::string("usage: kvmgr-pareto MODEL --out DIR [--list] [--only TEXT] ") +
                             engine::Task::usage);
  return options;
}

}  // namespace

int main(int argc, char **argv) try {
  const Options options = parse(argc, argv);
  const std::vector<Spec> all = specs(options.only);
  if (options.list) {
    for (const Spec &spec : all) std::printf("%s\n", spec.text.c_str());
    return 0;
  }
  if (mkdir(options.out.c_str(), 0777) != 0 && errno != EEXIST)
    throw std::runtime_error(options.out + ": cannot be made");
  const auto weights = engine::Weights::load(options.model);
  std::vector<Result> results;
  std::vector<float> full;
  for (const Spec &spec : all) {
    engine::progress(results.size(), all.size(), spec.text);
    results.push_back({spec.line, engine::evaluate(options.task, spec.text, weights, full)});
    write(options.out, results);
  }
  engine::progress(results.size(), all.size(), "");
  std::printf("%s", report(results, false).c_str());
  std::printf("\nwritten: %s/pareto.md, pareto.csv, pareto.svg\n", options.out.c_str());
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "kvmgr-pareto: %s\n", error.what());
  return 1;
}
