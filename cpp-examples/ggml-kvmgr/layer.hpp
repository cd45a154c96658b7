// The keys and values of one layer behind the two cache tensors of llama.cpp.
//
// The tensors keep their shape and type [n_embd_gqa, cells, streams], so that the host can compute
// offsets, but their addresses hold nothing: rows are in kvmgr_slots, cell = slot.
#pragma once
#include <cstdint>
#include <vector>

#include "ggml.h"
#include "kvmgr.h"

struct Layer;

// One of the two tensors; the host's tensor points here with `extra`.
struct Root {
    Layer *layer = nullptr;
    bool is_value = false;
    ggml_type type = GGML_TYPE_F16;
    int64_t width = 0;  // elements of a row of all heads
    size_t row_bytes = 0;
};

struct Layer {
    int index = 0, model_layers = 1;
    int64_t cells = 0, streams = 1;
    Root key, value;
    // Known from the first FLASH_ATTN_EXT that the scheduler asks about.
    int64_t q_heads = 0, kv_heads = 0, key_dim = 0, value_dim = 0;
    // Where the tokens of this graph went, for the policy.
    std::vector<uint32_t> written;

    ~Layer();
    bool shape(const ggml_tensor *attention);
    // The slots; made when they are first written. NULL with a message on failure.
    kvmgr_slots *slots();
    bool is_empty() const { return handle == nullptr; }
    void clear();

    // Bytes of the tensor as the host sees them.
    void get(const Root &root, void *data, size_t offset, size_t size);
    void set(const Root &root, const void *data, size_t offset, size_t size);
    kvmgr_slots_stats stats() const;

  private:
    void settle(int64_t first, int64_t end);
    void get_rows(const Root &root, uint8_t *out, int64_t first, int64_t count);
    void set_rows(const Root &root, const uint8_t *data, int64_t first, int64_t count);
    kvmgr_slots *handle = nullptr;
};

// The root behind a tensor or a view of it; NULL for plain memory.
const Root *root_of(const ggml_tensor *tensor);
// A tensor [tokens, heads, dim] with strides in elements.
kvmgr_tensor view(const void *data, ggml_type type, const int64_t shape[3], const int64_t strides[2]);
// Reports a failed call; true if it succeeded.
bool succeeded(kvmgr_status status, const char *what);
