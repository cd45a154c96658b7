// gguf.hpp: reads a GGUF v3 file: metadata, and tensors in f32 or f16.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace engine {

/// A tensor of a file, converted to f32. GGUF lists the innermost dimension first.
struct Tensor {
  std::vector<uint64_t> shape;
  std::vector<float> data;

  uint64_t columns() const { return shape.empty() ? 0 : shape[0]; }
  uint64_t rows() const { return columns() == 0 ? 0 : data.size() / columns(); }
};

/// The contents of a file. Throws std::runtime_error with the path if it is not a GGUF file that
/// this reader understands.
class Gguf {
 public:
  explicit Gguf(const std::string &path);

  /// A number of the metadata; throws if it is absent.
  double number(const std::string &key) const;
  double number(const std::string &key, double fallback) const;
  std::string text(const std::string &key, const std::string &fallback) const;

  /// Takes a tensor out of the file's hands; throws if it is absent.
  Tensor take(const std::string &name);

 private:
  std::string path_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> texts_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace engine
