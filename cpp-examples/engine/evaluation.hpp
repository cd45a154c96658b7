// evaluation.hpp: what a cache spec does to a model: quality, bytes and speed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "model.hpp"
#include "report.hpp"

namespace engine {

/// Two tasks:
///   text    windows of held-out text: the prompt is read, then the policy compresses, and the
///           rest of the window is scored token by token through the compressed cache;
///   recall  prompts that ask for a value they contain: once compressed after the question
///           ("recall"), once before it ("recall blind").
struct Task {
  std::string text;      ///< file of held-out text
  std::string recall;    ///< file of lines: prompt TAB value
  size_t windows = 4;    ///< windows of text
  size_t window = 768;   ///< tokens of a window
  size_t scored = 384;   ///< tokens of a window that are scored, the last ones
  size_t prompts = 16;   ///< prompts of the recall task

  static constexpr const char *usage =
      "--text FILE --recall FILE [--windows N] [--window TOKENS] [--scored TOKENS] [--prompts N]";

  /// Takes the current argument if it is one of those above.
  bool take(Arguments &arguments);

  /// Whether both files are named.
  bool complete() const { return !text.empty() && !recall.empty(); }
};

/// Runs a spec in a process of its own, so that its memory can be measured. `full` holds the log
/// probabilities of the full cache; the first spec, which has to be "full", fills it.
Row evaluate(const Task &task, const std::string &spec,
             const std::shared_ptr<const Weights> &weights, std::vector<float> &full);

/// A progress line on stderr: `done` of `total` specs are finished, `next` runs.
void progress(size_t done, size_t total, const std::string &next);

}  // namespace engine
