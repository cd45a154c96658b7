#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace engine {
namespace {

std::string number(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string escape(const std::string &text) {
  std::string out;
  for (char c : text) {
    if (c == '<') out += "&lt;";
    else if (c == '&') out += "&amp;";
    else out += c;
  }
  return out;
}

void write_file(const std::string &path, const std::string &text) {
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

std::string csv(const std::vector<Row> &rows) {
  std::ostringstream out;
  out << "spec,token,kv_bytes\n";
  for (const Row &row : rows)
    for (size_t i = 0; i < row.bytes.size(); ++i)
      out << '"' << row.spec << "\"," << i << ',' << number(row.bytes[i], 0) << '\n';
  return out.str();
}

std::string svg(const std::vector<Row> &rows) {
  const double left = 70, top = 20, width = 640, height = 360, legend = 18;
  const char *colors[] = {"#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b",
                          "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#444444", "#a05000"};
  double max_bytes = 1;
  size_t max_tokens = 2;
  for (const Row &row : rows) {
    for (double bytes : row.bytes) max_bytes = std::max(max_bytes, bytes);
    max_tokens = std::max(max_tokens, row.bytes.size());
  }
  const double total = top + height + 50 + legend * double(rows.size());
  std::ostringstream out;
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"" << total
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n"
      << "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  for (int i = 0; i <= 4; ++i) {
    const double y = top + height * (1 - i / 4.0), x = left + width * i / 4.0;
    out << "<line x1=\"" << left << "\" x2=\"" << left + width << "\" y1=\"" << y << "\" y2=\"" << y
        << "\" stroke=\"#ddd\"/><text x=\"" << left - 6 << "\" y=\"" << y + 4
        << "\" text-anchor=\"end\">" << number(max_bytes * i / 4 / 1024, 0) << "</text>"
        << "<text x=\"" << x << "\" y=\"" << top + height + 16 << "\" text-anchor=\"middle\">"
        << number(double(max_tokens - 1) * i / 4, 0) << "</text>\n";
  }
  out << "<text x=\"" << left + width / 2 << "\" y=\"" << top + height + 34
      << "\" text-anchor=\"middle\">generated token</text><text x=\"" << left
      << "\" y=\"14\">KiB of KV blocks held for each sequence</text>\n";
  for (size_t r = 0; r < rows.size(); ++r) {
    const char *color = colors[r % 12];
    out << "<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"" << color << "\" points=\"";
    for (size_t i = 0; i < rows[r].bytes.size(); ++i)
      out << number(left + width * double(i) / double(max_tokens - 1), 1) << ','
          << number(top + height * (1 - rows[r].bytes[i] / max_bytes), 1) << ' ';
    const double y = top + height + 50 + legend * double(r);
    out << "\"/><line x1=\"" << left << "\" x2=\"" << left + 24 << "\" y1=\"" << y << "\" y2=\"" << y
        << "\" stroke=\"" << color << "\" stroke-width=\"3\"/><text x=\"" << left + 30 << "\" y=\""
        << y + 4 << "\">" << escape(rows[r].spec) << "</text>\n";
  }
  out << "</svg>\n";
  return out.str();
}

}  // namespace

std::string table(const std::vector<Row> &rows) {
  std::vector<std::vector<std::string>> cells{{"spec", "bits", "peak KiB", "RSS KiB", "tokens/s",
                                               "loss diff", "KL", "recall", "recall blind"}};
  for (const Row &row : rows)
    cells.push_back({'`' + row.spec + '`', number(row.bits, 2), number(row.peak_kib, 0),
                     number(row.rss_kib, 0), number(row.tokens_per_s, 0),
                     number(row.loss - rows[0].loss, 4), number(row.kl, 4),
                     number(100 * row.recall_aware, 1) + " %",
                     number(100 * row.recall_blind, 1) + " %"});
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

void write_report(const std::string &directory, const std::vector<Row> &rows) {
  std::vector<Row> escaped = rows;
  for (Row &row : escaped)
    for (size_t at = 0; (at = row.spec.find('|', at)) != std::string::npos; at += 2)
      row.spec.replace(at, 1, "\\|");
  write_file(directory + "/table.md", table(escaped));
  write_file(directory + "/kv_bytes.csv", csv(rows));
  write_file(directory + "/kv_bytes.svg", svg(rows));
}

}  // namespace engine
