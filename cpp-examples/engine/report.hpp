// report.hpp: what the comparison of cache specs found, as text, CSV and a plot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace engine {

/// What was measured of one cache spec.
struct Measures {
  double bits = 0;          ///< KV bits for each element of every token seen
  double kept = 0;          ///< KV bytes right after a prompt, a fraction of those of 16 bits
  double peak_kib = 0;      ///< largest KV bytes held by the library
  double rss_kib = 0;       ///< growth of the resident set of the process
  double tokens_per_s = 0;  ///< committed tokens of both tasks
  double loss = 0;          ///< nats for each byte of held-out text
  double kl = 0;            ///< mean KL divergence from the full cache
  double recall_aware = 0;  ///< exact values, policy run after the question
  double recall_blind = 0;  ///< exact values, policy run before the question
};

/// One cache spec.
struct Row : Measures {
  std::string spec;
  std::vector<double> bytes;  ///< KV bytes held after each generated token
};

/// A number of so many decimals.
std::string number(double value, int decimals);

/// A part of 1 as "12.5 %".
std::string percent(double part);

/// Text that may stand in a cell of a table.
std::string escape_pipes(std::string text);

/// A Markdown table with aligned columns; the first line is its head.
std::string aligned(const std::vector<std::vector<std::string>> &cells);

/// What was measured; the first row is the one the others are compared with.
std::string table(const std::vector<Row> &rows);

/// Writes table.md, kv_bytes.csv and kv_bytes.svg into a directory.
void write_report(const std::string &directory, const std::vector<Row> &rows);

}  // namespace engine
