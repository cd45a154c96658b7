#include "plot.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace engine {
namespace {

constexpr double kLeft = 70, kTop = 36, kWidth = 480, kHeight = 340, kGap = 90, kLegend = 16;
const char *kColors[] = {"#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b",
                         "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#444444", "#a05000"};
const char *kDashes[] = {"none", "6 3", "2 3", "8 3 2 3"};

std::string number(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.4g", value);
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

/// Maps values to pixels.
struct Axis {
  bool log;
  double low, high;

  double at(double value) const {
    if (!log) return (value - low) / (high - low);
    return std::log(std::max(value, low) / low) / std::log(high / low);
  }

  double tick(int i) const {
    const double part = i / 4.0;
    return log ? low * std::pow(high / low, part) : low + (high - low) * part;
  }
};

template <class Get>
Axis fit(const Panel &panel, bool log, Get get) {
  double low = 1e300, high = -1e300;
  for (const Series &series : panel.series)
    for (const auto &point : series.points) {
      const double value = get(point);
      if (log && value <= 0) continue;
      low = std::min(low, value);
      high = std::max(high, value);
    }
  if (!log) low = 0;
  if (!(high > low)) high = low + 1;
  return {log, low, high};
}

std::string line(double x1, double y1, double x2, double y2, const std::string &style) {
  return "<line x1=\"" + number(x1) + "\" y1=\"" + number(y1) + "\" x2=\"" + number(x2) +
         "\" y2=\"" + number(y2) + "\" " + style + "/>";
}

std::string text(double x, double y, const char *anchor, const std::string &content) {
  return "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" + anchor + "\">" +
         escape(content) + "</text>\n";
}

std::string style(size_t index) {
  return std::string("stroke=\"") + kColors[index % 12] + "\" stroke-dasharray=\"" +
         kDashes[index / 12 % 4] + "\" stroke-width=\"1.6\"";
}

void draw(std::ostringstream &out, const Panel &panel, double left,
          const std::vector<std::string> &names) {
  const Axis x = fit(panel, panel.x_log, [](const auto &point) { return point.first; });
  const Axis y = fit(panel, panel.y_log, [](const auto &point) { return point.second; });
  for (int i = 0; i <= 4; ++i) {
    const double across = left + kWidth * i / 4.0, down = kTop + kHeight * (1 - i / 4.0);
    out << line(left, down, left + kWidth, down, "stroke=\"#ddd\"")
        << text(left - 6, down + 4, "end", number(y.tick(i)))
        << text(across, kTop + kHeight + 16, "middle", number(x.tick(i)));
  }
  out << text(left + kWidth / 2, kTop + kHeight + 34, "middle", panel.x_label)
      << text(left, 14, "start", panel.title) << text(left, 28, "start", panel.y_label);
  for (const Series &series : panel.series) {
    const size_t index =
        size_t(std::find(names.begin(), names.end(), series.name) - names.begin());
    out << "<polyline fill=\"none\" " << style(index) << " points=\"";
    for (const auto &[px, py] : series.points)
      out << number(left + kWidth * x.at(px)) << ',' << number(kTop + kHeight * (1 - y.at(py)))
          << ' ';
    out << "\"/>\n";
  }
}

}  // namespace

std::string svg(const std::vector<Panel> &panels) {
  std::vector<std::string> names;
  for (const Panel &panel : panels)
    for (const Series &series : panel.series)
      if (std::find(names.begin(), names.end(), series.name) == names.end())
        names.push_back(series.name);
  const double width = kLeft + (kWidth + kGap) * double(panels.size());
  const size_t columns = std::max<size_t>(1, panels.size());
  const size_t rows = (names.size() + columns - 1) / columns;
  std::ostringstream out;
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << width << "\" height=\""
      << kTop + kHeight + 60 + kLegend * double(rows)
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n"
      << "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  for (size_t i = 0; i < panels.size(); ++i)
    draw(out, panels[i], kLeft + (kWidth + kGap) * double(i), names);
  for (size_t i = 0; i < names.size(); ++i) {
    const double x = kLeft + (kWidth + kGap) * double(i / rows);
    const double y = kTop + kHeight + 56 + kLegend * double(i % rows);
    out << line(x, y, x + 28, y, style(i)) << text(x + 34, y + 4, "start", names[i]);
  }
  out << "</svg>\n";
  return out.str();
}

void write_file(const std::string &path, const std::string &text) {
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

}  // namespace engine
