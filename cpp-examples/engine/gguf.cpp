#include "gguf.hpp"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace engine {
namespace {

enum class Type : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, text, array, u64, i64, f64 };

/// Reads numbers and strings one after the other, never past the end.
class Reader {
 public:
  Reader(const std::vector<char> &bytes, const std::string &path) : bytes_(bytes), path_(path) {}

  [[noreturn]] void fail(const std::string &what) const {
    throw std::runtime_error(path_ + ": " + what);
  }

  const char *take(size_t size) {
    if (size > bytes_.size() - at_) fail("the file is cut off");
    const char *data = bytes_.data() + at_;
    at_ += size;
    return data;
  }

  template <class T>
  T read() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }

  std::string text() {
    const uint64_t size = read<uint64_t>();
    return std::string(take(size), size);
  }

  double number(Type type) {
    switch (type) {
      case Type::u8: return read<uint8_t>();
      case Type::i8: return read<int8_t>();
      case Type::u16: return read<uint16_t>();
      case Type::i16: return read<int16_t>();
      case Type::u32: return read<uint32_t>();
      case Type::i32: return read<int32_t>();
      case Type::f32: return read<float>();
      case Type::boolean: return read<uint8_t>();
      case Type::u64: return static_cast<double>(read<uint64_t>());
      case Type::i64: return static_cast<double>(read<int64_t>());
      case Type::f64: return read<double>();
      default: fail("a metadata value has an unknown type");
    }
  }

  void skip(Type type) {
    if (type == Type::text) {
      text();
    } else if (type == Type::array) {
      const Type inner = static_cast<Type>(read<uint32_t>());
      const uint64_t count = read<uint64_t>();
      for (uint64_t i = 0; i < count; ++i) skip(inner);
    } else {
      number(type);
    }
  }

  size_t at() const { return at_; }

 private:
  const std::vector<char> &bytes_;
  const std::string &path_;
  size_t at_ = 0;
};

float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct TensorInfo {
  std::string name;
  std::vector<uint64_t> shape;
  uint32_t type;
  uint64_t offset;
};

Tensor load(Reader &reader, const std::vector<char> &bytes, size_t base, const TensorInfo &info) {
  Tensor tensor{info.shape, {}};
  uint64_t count = 1;
  for (uint64_t size : info.shape) count *= size;
  const size_t element = info.type == 0 ? 4 : 2;
  if (info.type > 1) reader.fail(info.name + " is neither f32 nor f16");
  const size_t start = base + info.offset;
  if (start > bytes.size() || count > (bytes.size() - start) / element)
    reader.fail(info.name + " lies outside the file");
  tensor.data.resize(count);
  for (uint64_t i = 0; i < count; ++i) {
    const char *source = bytes.data() + start + i * element;
    if (info.type == 0) {
      std::memcpy(&tensor.data[i], source, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, source, 2);
      tensor.data[i] = half_to_float(half);
    }
  }
  return tensor;
}

}  // namespace

Gguf::Gguf(const std::string &path) : path_(path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  Reader reader(bytes, path_);
  if (std::memcmp(reader.take(4), "GGUF", 4) != 0) reader.fail("not a GGUF file");
  if (reader.read<uint32_t>() != 3) reader.fail("not GGUF version 3");
  const uint64_t num_tensors = reader.read<uint64_t>(), num_values = reader.read<uint64_t>();
  for (uint64_t i = 0; i < num_values; ++i) {
    const std::string key = reader.text();
    const Type type = static_cast<Type>(reader.read<uint32_t>());
    if (type == Type::text) {
      texts_[key] = reader.text();
    } else if (type == Type::array) {
      reader.skip(type);
    } else {
      numbers_[key] = reader.number(type);
    }
  }
  std::vector<TensorInfo> infos;
  for (uint64_t i = 0; i < num_tensors; ++i) {
    TensorInfo info{reader.text(), {}, 0, 0};
    const uint32_t dims = reader.read<uint32_t>();
    if (dims > 4) reader.fail(info.name + " has more than 4 dimensions");
    for (uint32_t d = 0; d < dims; ++d) info.shape.push_back(reader.read<uint64_t>());
    info.type = reader.read<uint32_t>();
    info.offset = reader.read<uint64_t>();
    infos.push_back(info);
  }
  const size_t align = static_cast<size_t>(number("general.alignment", 32));
  const size_t base = (reader.at() + align - 1) / align * align;
  for (const TensorInfo &info : infos) tensors_[info.name] = load(reader, bytes, base, info);
}

double Gguf::number(const std::string &key) const {
  const auto found = numbers_.find(key);
  if (found == numbers_.end()) throw std::runtime_error(path_ + ": no " + key);
  return found->second;
}

double Gguf::number(const std::string &key, double fallback) const {
  const auto found = numbers_.find(key);
  return found == numbers_.end() ? fallback : found->second;
}

std::string Gguf::text(const std::string &key, const std::string &fallback) const {
  const auto found = texts_.find(key);
  return found == texts_.end() ? fallback : found->second;
}

Tensor Gguf::take(const std::string &name) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error(path_ + ": no tensor " + name);
  Tensor tensor = std::move(found->second);
  tensors_.erase(found);
  return tensor;
}

}  // namespace engine
