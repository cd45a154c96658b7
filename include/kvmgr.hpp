// kvmgr.hpp: small C++17 wrappers over kvmgr.h. Handles that end by themselves, statuses that
// become exceptions. Header only; every call is still the C function of the same name.
//
//   kvmgr::cache cache = kvmgr::make_cache(config);
//   kvmgr::sequence sequence = kvmgr::make_sequence(cache);
//   kvmgr::check(kvmgr_sequence_reserve(sequence.get(), 1));
#ifndef KVMGR_HPP
#define KVMGR_HPP

#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

#include "kvmgr.h"

namespace kvmgr {

/// A failed call: its status and the library's message.
class error : public std::runtime_error {
 public:
  explicit error(kvmgr_status status)
      : std::runtime_error(std::string(kvmgr_status_name(status)) + ": " +
                           kvmgr_last_error_message()),
        status_(status) {}
  kvmgr_status status() const noexcept { return status_; }

 private:
  kvmgr_status status_;
};

/// Throws unless the call succeeded.
inline void check(kvmgr_status status) {
  if (status != KVMGR_OK) throw error(status);
}

/// True if the call succeeded, false if it ran out of blocks; throws otherwise. For schedulers.
inline bool check_blocks(kvmgr_status status) {
  if (status == KVMGR_OUT_OF_BLOCKS) return false;
  check(status);
  return true;
}

/// A contiguous tensor in host memory, [tokens, heads, dim] or [tokens, heads].
inline kvmgr_tensor tensor(void *data, kvmgr_dtype dtype, std::initializer_list<int64_t> shape) {
  kvmgr_tensor view{};
  view.data = data;
  view.dtype = dtype;
  view.ndim = static_cast<uint32_t>(shape.size());
  uint32_t i = 0;
  for (int64_t size : shape) view.shape[i++] = size;
  return view;
}
inline kvmgr_tensor tensor(float *data, std::initializer_list<int64_t> shape) {
  return tensor(static_cast<void *>(data), KVMGR_DTYPE_F32, shape);
}

namespace detail {
struct releaser {
  void operator()(kvmgr_pool *p) const noexcept { kvmgr_pool_release(p); }
  void operator()(kvmgr_cache *p) const noexcept { kvmgr_cache_release(p); }
  void operator()(kvmgr_policy *p) const noexcept { kvmgr_policy_release(p); }
  void operator()(kvmgr_quantizer *p) const noexcept { kvmgr_quantizer_release(p); }
  void operator()(kvmgr_lease *p) const noexcept { kvmgr_lease_destroy(p); }
  void operator()(kvmgr_store *p) const noexcept { kvmgr_store_release(p); }
  void operator()(kvmgr_sequence *p) const noexcept { kvmgr_sequence_destroy(p); }
  void operator()(kvmgr_attention *p) const noexcept { kvmgr_attention_destroy(p); }
};
template <class T>
using handle = std::unique_ptr<T, releaser>;
}  // namespace detail

using pool = detail::handle<kvmgr_pool>;
using lease = detail::handle<kvmgr_lease>;
using policy = detail::handle<kvmgr_policy>;
using quantizer = detail::handle<kvmgr_quantizer>;
using store = detail::handle<kvmgr_store>;
using sequence = detail::handle<kvmgr_sequence>;
using attention = detail::handle<kvmgr_attention>;
using cache = detail::handle<kvmgr_cache>;

inline cache make_cache(const kvmgr_cache_config &config) {
  kvmgr_cache *out = nullptr;
  check(kvmgr_cache_create(&config, &out));
  return cache(out);
}

inline pool make_pool(const kvmgr_pool_config &config) {
  kvmgr_pool *out = nullptr;
  check(kvmgr_pool_create(&config, &out));
  return pool(out);
}

inline policy make_policy(const char *spec) {
  kvmgr_policy *out = nullptr;
  check(kvmgr_policy_create(spec, &out));
  return policy(out);
}

inline quantizer make_quantizer(const char *spec, kvmgr_side side) {
  kvmgr_quantizer *out = nullptr;
  check(kvmgr_quantizer_create(spec, side, &out));
  return quantizer(out);
}

inline store make_store(const char *spec) {
  kvmgr_store *out = nullptr;
  check(kvmgr_store_create(spec, &out));
  return store(out);
}

inline sequence make_sequence(const cache &parent, const kvmgr_policy *own = nullptr) {
  kvmgr_sequence *out = nullptr;
  check(kvmgr_cache_sequence_create(parent.get(), own, &out));
  return sequence(out);
}

inline sequence fork(const sequence &parent) {
  kvmgr_sequence *out = nullptr;
  check(kvmgr_sequence_fork(parent.get(), &out));
  return sequence(out);
}

inline attention make_attention(const cache &parent) {
  kvmgr_attention *out = nullptr;
  check(kvmgr_attention_create(parent.get(), &out));
  return attention(out);
}

inline kvmgr_cache_stats stats(const cache &of) {
  kvmgr_cache_stats out{};
  out.struct_size = sizeof out;
  check(kvmgr_cache_get_stats(of.get(), &out));
  return out;
}

}  // namespace kvmgr

#endif  // KVMGR_HPP
