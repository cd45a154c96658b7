// report.hpp: what the comparison of cache specs found, as text, CSV and a plot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace engine {

/// One cache spec.
struct Row {
  std::string spec;
  double bits = 0;            ///< KV bits for each element of every token seen
  double peak_kib = 0;        ///< largest KV bytes held by the library
  double rss_kib = 0;         ///< growth of the resident set of the process
  double tokens_per_s = 0;    ///< committed tokens of both tasks
  double loss = 0;            ///< nats for each byte of held-out text
  double kl = 0;              ///< mean KL divergence from the full cache
  double recall_aware = 0;    ///< exact values, policy run after the question
  double recall_blind = 0;    ///< exact values, policy run before the question
  std::vector<double> bytes;  ///< KV bytes held after each generated token
};

/// An aligned table; the first row is the one the others are compared with.
std::string table(const std::vector<Row> &rows);

/// Writes table.md, kv_bytes.csv and kv_bytes.svg into a directory.
void write_report(const std::string &directory, const std::vector<Row> &rows);

}  // namespace engine
