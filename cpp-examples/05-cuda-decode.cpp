// 05-cuda-decode.cpp: decode steps over a cache in the memory of a CUDA device. The engine brings its
// stream and its tensors; the launches of a step are captured once and then serve every step. A cache
// in host memory is fed the same and must answer the same.
//
//   05-cuda-decode [sequences] [tokens of the prompts] [steps]
#include <dlfcn.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kvmgr.hpp"

namespace {

constexpr uint32_t kLayers = 2, kQHeads = 32, kKvHeads = 8, kDim = 128, kBlock = 16;
constexpr size_t kChunk = 128;  // tokens of a prompt that are fed at a time

/// What an engine has at hand anyway: the driver, a stream, device memory.
class Device {
 public:
  Device() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library_) library_ = dlopen("libcuda.so", RTLD_NOW);
    if (!library_) throw std::runtime_error(dlerror());
    int device = 0;
    void *context = nullptr;
    call("cuInit", 0u);
    call("cuDeviceGet", &device, 0);
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxPushCurrent_v2", context);
    call("cuStreamCreate", &stream_, 1u);
  }
  void *stream() const { return stream_; }

  /// Any function of the driver; all answer 0 for success.
  template <class... Args>
  void call(const char *name, Args... args) const {
    auto *function = reinterpret_cast<int (*)(Args...)>(dlsym(library_, name));
    const int result = function ? function(args...) : -1;
    if (result != 0)
      throw std::runtime_error(std::string(name) + " answered " + std::to_string(result));
  }
  void *allocate(size_t bytes) const {
    unsigned long long address = 0;
    call("cuMemAlloc_v2", &address, bytes);
    return reinterpret_cast<void *>(address);
  }
  void put(void *to, const void *from, size_t bytes) const {
    call("cuMemcpyHtoDAsync_v2", reinterpret_cast<unsigned long long>(to), from, bytes, stream_);
    wait();  // `from` is not pinned and changes soon
  }
  void get(void *to, const void *from, size_t bytes) const {
    wait();
    call("cuMemcpyDtoHAsync_v2", to, reinterpret_cast<unsigned long long>(from), bytes, stream_);
    wait();
  }
  void wait() const { call("cuStreamSynchronize", stream_); }

 private:
  void *library_ = nullptr, *stream_ = nullptr;
};

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

kvmgr_tensor tensor(void *data, size_t tokens, uint32_t heads, bool is_on_device) {
  kvmgr_tensor view =
      kvmgr::tensor(data, KVMGR_DTYPE_BF16, {int64_t(tokens), int64_t(heads), int64_t(kDim)});
  view.device_type = is_on_device ? KVMGR_DEVICE_CUDA : KVMGR_DEVICE_CPU;
  return view;
}

/// K, V, Q and O of one layer.
struct Tensors {
  kvmgr_tensor key, value, query, output;
};

/// A cache with its sequences, on the host or on the device.
struct Engine {
  kvmgr::cache cache;
  kvmgr::attention attention;
  std::vector<kvmgr::sequence> owned;
  std::vector<kvmgr_sequence *> sequences;

  Engine(bool is_on_device, size_t num_sequences, size_t tokens) {
    kvmgr_cache_config config{};
    config.struct_size = sizeof config;
    config.num_layers = kLayers;
    config.num_q_heads = kQHeads;
    config.num_kv_heads = kKvHeads;
    config.head_dim = kDim;
    config.block_size = kBlock;
    config.dtype = KVMGR_DTYPE_BF16;
    config.num_blocks = num_sequences * (tokens / kBlock + 1);
    config.device_type = is_on_device ? KVMGR_DEVICE_CUDA : KVMGR_DEVICE_CPU;
    cache = kvmgr::make_cache(config);
    attention = kvmgr::make_attention(cache);
    for (size_t i = 0; i < num_sequences; ++i) {
      owned.push_back(kvmgr::make_sequence(cache));
      sequences.push_back(owned.back().get());
    }
  }

  void plan(uint32_t count) {
    for (kvmgr_sequence *sequence : sequences) kvmgr::check(kvmgr_sequence_reserve(sequence, count));
    const std::vector<uint32_t> counts(sequences.size(), count);
    kvmgr::check(
        kvmgr_attention_plan(attention.get(), sequences.data(), counts.data(), counts.size()));
  }
  void layer(uint32_t layer, const Tensors &t) {
    kvmgr::check(kvmgr_attention_append(attention.get(), layer, &t.key, &t.value, 0, 0));
    kvmgr::check(kvmgr_attention_run(attention.get(), layer, &t.query, &t.output, nullptr, nullptr,
                                     0, 0));
  }
  void commit(uint32_t count) {
    for (kvmgr_sequence *sequence : sequences)
      kvmgr::check(kvmgr_sequence_commit(sequence, nullptr, count));
  }
};

/// Stands for the model: the same rows on the host and on the device.
struct Model {
  const Device &device;
  std::vector<uint16_t> rows[4];
  void *on_device[4];

  Model(const Device &device, size_t tokens) : device(device) {
    for (int i = 0; i < 4; ++i) {
      rows[i].resize(tokens * (i < 2 ? kKvHeads : kQHeads) * kDim);
      on_device[i] = device.allocate(rows[i].size() * 2);
    }
  }
  void compute(int step, size_t tokens) {
    for (int i = 0; i < 3; ++i) {
      const size_t count = tokens * (i < 2 ? kKvHeads : kQHeads) * kDim;
      for (size_t j = 0; j < count; ++j)
        rows[i][j] = to_bf16(std::sin(float((j * 31 + size_t(i) * 17 + size_t(step) * 7) % 8191)));
      device.put(on_device[i], rows[i].data(), count * 2);
    }
  }
  Tensors tensors(size_t tokens, bool is_on_device) {
    const auto at = [&](int i) {
      void *data = is_on_device ? on_device[i] : static_cast<void *>(rows[i].data());
      return tensor(data, tokens, i < 2 ? kKvHeads : kQHeads, is_on_device);
    };
    return {at(0), at(1), at(2), at(3)};
  }
  /// Relative difference of O on the device and on the host.
  double difference(size_t tokens) {
    std::vector<uint16_t> found(tokens * kQHeads * kDim);
    device.get(found.data(), on_device[3], found.size() * 2);
    double error = 0, norm = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const double expected = from_bf16(rows[3][i]), x = from_bf16(found[i]);
      error += (x - expected) * (x - expected);
      norm += expected * expected;
    }
    return std::sqrt(error / norm);
  }
};

/// Feeds `count` tokens to every sequence of both and compares; the device as separate launches.
double step(Engine &host, Engine &device, Model &model, int number, uint32_t count) {
  const size_t tokens = count * host.sequences.size();
  model.compute(number, tokens);
  host.plan(count);
  device.plan(count);
  double worst = 0;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    host.layer(layer, model.tensors(tokens, false));
    device.layer(layer, model.tensors(tokens, true));
    worst = std::fmax(worst, model.difference(tokens));
  }
  host.commit(count);
  device.commit(count);
  return worst;
}

/// Decode steps of the device alone: one graph launch each. Answers seconds.
double decode(const Device &driver, Engine &device, Model &model, int steps) {
  const size_t tokens = device.sequences.size();
  void *graph = nullptr, *executable = nullptr;
  uint64_t captured = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < steps; ++i) {
    device.plan(1);
    uint64_t key = 0;
    kvmgr::check(kvmgr_attention_graph_key(device.attention.get(), &key));
    if (!executable || key != captured) {
      captured = key;
      driver.call("cuStreamBeginCapture_v2", driver.stream(), 0);
      for (uint32_t layer = 0; layer < kLayers; ++layer)
        device.layer(layer, model.tensors(tokens, true));
      driver.call("cuStreamEndCapture", driver.stream(), &graph);
      driver.call("cuGraphInstantiateWithFlags", &executable, graph, 0ull);
    } else {
      kvmgr::check(kvmgr_attention_graph_launched(device.attention.get()));
    }
    driver.call("cuGraphLaunch", executable, driver.stream());
    device.commit(1);
  }
  driver.wait();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char **argv) try {
  if (kvmgr_device_count(KVMGR_DEVICE_CUDA) == 0) {
    std::printf("SKIP: %s\n", kvmgr_last_error_message());
    return 0;
  }
  const auto argument = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const size_t sequences = size_t(argument(1, 8)), prompt = size_t(argument(2, 1024));
  const int steps = argument(3, 256);
  if (sequences == 0 || prompt == 0 || steps <= 0) throw std::runtime_error("0 of something");

  const Device driver;
  const size_t most = prompt + size_t(steps) + 8;
  Engine host(false, sequences, most), device(true, sequences, most);
  kvmgr::check(kvmgr_cache_set_stream(device.cache.get(), driver.stream()));
  // Room for all plans at once, so that no graph has to be captured twice.
  kvmgr::check(kvmgr_attention_reserve(device.attention.get(), sequences, sequences * kChunk,
                                       sequences * (most / kBlock + 1)));
  Model model(driver, sequences * kChunk);

  double worst = 0;
  int number = 0;
  for (size_t done = 0; done < prompt; done += kChunk) {
    const uint32_t count = uint32_t(prompt - done < kChunk ? prompt - done : kChunk);
    worst = std::fmax(worst, step(host, device, model, number++, count));
  }
  for (int i = 0; i < 4; ++i) worst = std::fmax(worst, step(host, device, model, number++, 1));
  const double seconds = decode(driver, device, model, steps);
  std::printf("%zu sequences of %zu tokens, %u layers: %.0f tokens/s, %.1f us a step; O differs by %.1e\n",
              sequences, prompt, kLayers, double(sequences) * steps / seconds,
              seconds / steps * 1e6, worst);
  if (!(worst < 4e-3)) throw std::runtime_error("the device and the host disagree");
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "05-cuda-decode: %s\n", error.what());
  return 1;
}
