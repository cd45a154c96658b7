#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "plot.hpp"

namespace engine {
namespace {

std::string csv(const std::vector<Row> &rows) {
  std::ostringstream out;
  out << "spec,token,kv_bytes\n";
  for (const Row &row : rows)
    for (size_t i = 0; i < row.bytes.size(); ++i)
      out << '"' << row.spec << "\"," << i << ',' << number(row.bytes[i], 0) << '\n';
  return out.str();
}

std::string plot(const std::vector<Row> &rows) {
  Panel panel{"KiB of KV blocks held for each sequence", "generated token", "", false, false, {}};
  for (const Row &row : rows) {
    Series series{row.spec, {}};
    for (size_t i = 0; i < row.bytes.size(); ++i)
      series.points.emplace_back(double(i), row.bytes[i] / 1024);
    panel.series.push_back(std::move(series));
  }
  return svg({panel});
}

}  // namespace

std::string number(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string percent(double part) { return number(100 * part, 1) + " %"; }

std::string table(const std::vector<Row> &rows) {
  std::vector<std::vector<std::string>> cells{{"spec", "bits", "peak KiB", "RSS KiB", "tokens/s",
                                               "loss diff", "KL", "recall", "recall blind"}};
  for (const Row &row : rows)
    cells.push_back({'`' + row.spec + '`', number(row.bits, 2), number(row.peak_kib, 0),
                     number(row.rss_kib, 0), number(row.tokens_per_s, 0),
                     number(row.loss - rows[0].loss, 4), number(row.kl, 4),
                     percent(row.recall_aware), percent(row.recall_blind)});
  return aligned(cells);
}

std::string aligned(const std::vector<std::vector<std::string>> &cells) {
  std::vector<size_t> widths(cells[0].size(), 0);
  for (const auto &line : cells)
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  std::ostringstream out;
  for (size_t l = 0; l < cells.size(); ++l) {
    for (size_t i = 0; i < cells[l].size(); ++i) {
      std::string text = cells[l][i];
      const std::string pad(widths[i] - text.size(), ' ');
      out << (i == 0 ? "| " : " | ") << (i == 0 ? text + pad : pad + text);
    }
    out << " |\n";
    if (l > 0) continue;
    for (size_t i = 0; i < widths.size(); ++i)
      out << (i == 0 ? "| " : " | ") << std::string(widths[i] - (i > 0), '-') << (i > 0 ? ":" : "");
    out << " |\n";
  }
  return out.str();
}

std::string escape_pipes(std::string text) {
  for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2)
    text.replace(at, 1, "\\|");
  return text;
}

void write_report(const std::string &directory, const std::vector<Row> &rows) {
  std::vector<Row> escaped = rows;
  for (Row &row : escaped) row.spec = escape_pipes(row.spec);
  write_file(directory + "/table.md", table(escaped));
  write_file(directory + "/kv_bytes.csv", csv(rows));
  write_file(directory + "/kv_bytes.svg", plot(rows));
}

}  // namespace engine
