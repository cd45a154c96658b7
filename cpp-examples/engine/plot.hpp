// plot.hpp: line plots as SVG.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace engine {

/// One line of a panel. Lines of the same name in several panels have the same colour.
struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;
};

/// One coordinate system; axes start at 0 unless logarithmic.
struct Panel {
  std::string title, x_label, y_label;
  bool x_log = false, y_log = false;
  std::vector<Series> series;
};

/// The panels side by side, one legend below them.
std::string svg(const std::vector<Panel> &panels);

/// Writes a file; throws if that fails.
void write_file(const std::string &path, const std::string &text);

}  // namespace engine
