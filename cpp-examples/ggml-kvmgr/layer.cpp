#include "layer.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "options.hpp"

// An evicted row of a head in a saved state: a NaN that no computation makes.
static const uint16_t EVICTED_16 = 0x7E4B;
static const uint32_t EVICTED_32 = 0x7FC04B4B;
static const int64_t ROWS = 64;  // of a piece of a copy

static void store(ggml_type type, const float *values, uint8_t *out, int64_t n) {
    switch (type) {
        case GGML_TYPE_F16: ggml_fp32_to_fp16_row(values, reinterpret_cast<ggml_fp16_t *>(out), n); break;
        case GGML_TYPE_BF16: ggml_fp32_to_bf16_row(values, reinterpret_cast<ggml_bf16_t *>(out), n); break;
        default: std::memcpy(out, values, size_t(n) * 4);
    }
}

static void load(ggml_type type, const uint8_t *data, float *out, int64_t n) {
    switch (type) {
        case GGML_TYPE_F16: ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t *>(data), out, n); break;
        case GGML_TYPE_BF16: ggml_bf16_to_fp32_row(reinterpret_cast<const ggml_bf16_t *>(data), out, n); break;
        default: std::memcpy(out, data, size_t(n) * 4);
    }
}

static void mark_evicted(ggml_type type, uint8_t *out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (type == GGML_TYPE_F32) std::memcpy(out + 4 * i, &EVICTED_32, 4);
        else std::memcpy(out + 2 * i, &EVICTED_16, 2);
    }
}

static bool is_evicted(ggml_type type, const uint8_t *data, int64_t n) {
    const size_t size = type == GGML_TYPE_F32 ? 4 : 2;
    const void *mark = type == GGML_TYPE_F32 ? static_cast<const void *>(&EVICTED_32) : &EVICTED_16;
    for (int64_t i = 0; i < n; ++i)
        if (std::memcmp(data + size * size_t(i), mark, size) != 0) return false;
    return true;
}

bool succeeded(kvmgr_status status, const char *what) {
    if (status != KVMGR_OK) report("%s: %s", what, kvmgr_last_error_message());
    return status == KVMGR_OK;
}

static std::vector<uint32_t> range(int64_t first, int64_t end) {
    std::vector<uint32_t> all(static_cast<size_t>(end - first));
    std::iota(all.begin(), all.end(), uint32_t(first));
    return all;
}

// What the host cannot be told otherwise: its call has no way to fail.
static void require(kvmgr_status status, const char *what) {
    if (!succeeded(status, what)) GGML_ABORT("ggml-kvmgr: %s failed", what);
}

const Root *root_of(const ggml_tensor *tensor) {
    const ggml_tensor *root = tensor->view_src ? tensor->view_src : tensor;
    return static_cast<const Root *>(root->extra);
}

kvmgr_tensor view(const void *data, ggml_type type, const int64_t shape[3], const int64_t strides[2]) {
    kvmgr_tensor t = {};
    t.data = const_cast<void *>(data);
    t.dtype = type == GGML_TYPE_F32 ? KVMGR_DTYPE_F32 : type == GGML_TYPE_F16 ? KVMGR_DTYPE_F16 : KVMGR_DTYPE_BF16;
    t.ndim = 3;
    for (int i = 0; i < 3; ++i) t.shape[i] = shape[i];
    t.strides[0] = strides[0], t.strides[1] = strides[1], t.strides[2] = 1;
    return t;
}

Layer::~Layer() { kvmgr_slots_destroy(handle); }

bool Layer::shape(const ggml_tensor *attention) {
    const ggml_tensor *q = attention->src[0], *k = attention->src[1], *v = attention->src[2];
    if (key_dim && (q_heads != q->ne[2] || kv_heads != k->ne[2] || key_dim != k->ne[0] || value_dim != v->ne[0]))
        return report("layer %d is used with two shapes", index), false;
    if (k->ne[0] * k->ne[2] != key.width || v->ne[0] * v->ne[2] != value.width || v->ne[2] != k->ne[2])
        return report("layer %d: keys and values do not share rows: only KVMGR_MODE=transparent serves this model", index), false;
    q_heads = q->ne[2], kv_heads = k->ne[2], key_dim = k->ne[0], value_dim = v->ne[0];
    return true;
}

kvmgr_slots *Layer::slots() {
    if (handle) return handle;
    if (!key_dim) return report("layer %d is written before any attention was planned", index), nullptr;
    kvmgr_slots_config config = {};
    config.struct_size = sizeof config;
    config.layer = uint32_t(index);
    config.num_layers = uint32_t(model_layers);
    config.num_q_heads = uint32_t(q_heads), config.num_kv_heads = uint32_t(kv_heads);
    config.key_dim = uint32_t(key_dim), config.value_dim = uint32_t(value_dim);
    config.num_slots = uint32_t(cells), config.num_streams = uint32_t(streams);
    config.flags = options().pieces ? KVMGR_SLOTS_PIECES : 0;
    config.spec = options().spec.empty() ? nullptr : options().spec.c_str();
    succeeded(kvmgr_slots_create(&config, &handle), "KVMGR_SPEC");
    return handle;
}

void Layer::clear() {
    kvmgr_slots_destroy(handle);
    handle = nullptr;
    written.clear();
}

kvmgr_slots_stats Layer::stats() const {
    kvmgr_slots_stats stats = {};
    stats.struct_size = sizeof stats;
    if (handle) succeeded(kvmgr_slots_get_stats(handle, &stats), "statistics");
    return stats;
}

void Layer::get(const Root &root, void *data, size_t offset, size_t size) {
    if (is_empty()) return void(std::memset(data, 0, size));
    settle(int64_t(offset / root.row_bytes), int64_t((offset + size + root.row_bytes - 1) / root.row_bytes));
    auto *out = static_cast<uint8_t *>(data);
    std::vector<uint8_t> rows(size_t(ROWS) * root.row_bytes);
    while (size) {
        const int64_t first = int64_t(offset / root.row_bytes);
        const size_t skip = offset % root.row_bytes;
        const int64_t count = std::min(ROWS, int64_t((skip + size + root.row_bytes - 1) / root.row_bytes));
        get_rows(root, rows.data(), first, count);
        const size_t n = std::min(size, size_t(count) * root.row_bytes - skip);
        std::memcpy(out, rows.data() + skip, n);
        out += n, offset += n, size -= n;
    }
}

void Layer::set(const Root &root, const void *data, size_t offset, size_t size) {
    const auto *in = static_cast<const uint8_t *>(data);
    std::vector<uint8_t> rows(size_t(ROWS) * root.row_bytes);
    while (size) {
        const int64_t first = int64_t(offset / root.row_bytes);
        const size_t skip = offset % root.row_bytes;
        const int64_t count = std::min(ROWS, int64_t((skip + size + root.row_bytes - 1) / root.row_bytes));
        const size_t n = std::min(size, size_t(count) * root.row_bytes - skip);
        // Rows that are set in part keep the rest.
        if (n != size_t(count) * root.row_bytes) get(root, rows.data(), size_t(first) * root.row_bytes, size_t(count) * root.row_bytes);
        std::memcpy(rows.data() + skip, in, n);
        set_rows(root, rows.data(), first, count);
        in += n, offset += n, size -= n;
    }
}

// The host reads a cache to save it. What it saves must be what the answer would have attended to.
void Layer::settle(int64_t first, int64_t end) {
    const std::vector<uint32_t> cells_ = range(first, end);
    require(kvmgr_slots_settle(slots(), cells_.data(), cells_.size()), "policy");
}

void Layer::get_rows(const Root &root, uint8_t *out, int64_t first, int64_t count) {
    std::vector<uint32_t> cells_ = range(first, first + count);
    std::vector<float> values(size_t(count * root.width));
    std::vector<uint8_t> states(size_t(count * kv_heads));
    const kvmgr_side side = root.is_value ? KVMGR_SIDE_VALUE : KVMGR_SIDE_KEY;
    require(kvmgr_slots_read(slots(), side, cells_.data(), cells_.size(), values.data(), states.data()), "reading the cache");
    store(root.type, values.data(), out, count * root.width);
    const int64_t dim = root.width / kv_heads;
    const size_t head_bytes = root.row_bytes / size_t(kv_heads);
    for (int64_t i = 0; i < count * kv_heads; ++i)
        if (states[size_t(i)] == KVMGR_SLOT_EVICTED) mark_evicted(root.type, out + size_t(i) * head_bytes, dim);
}

void Layer::set_rows(const Root &root, const uint8_t *data, int64_t first, int64_t count) {
    kvmgr_slots *to = slots();
    if (!to) GGML_ABORT("ggml-kvmgr: no memory for the cache");
    std::vector<uint32_t> cells_ = range(first, first + count);
    std::vector<float> values(size_t(count * root.width));
    load(root.type, data, values.data(), count * root.width);
    const int64_t dim = root.width / kv_heads;
    const size_t head_bytes = root.row_bytes / size_t(kv_heads);
    std::vector<std::vector<uint32_t>> gone(static_cast<size_t>(kv_heads));
    for (int64_t i = 0; i < count * kv_heads; ++i) {
        if (!is_evicted(root.type, data + size_t(i) * head_bytes, dim)) continue;
        gone[size_t(i % kv_heads)].push_back(uint32_t(first + i / kv_heads));
        // The mark is not a value: a row with one would make its block be read with care ever after.
        std::fill_n(values.begin() + i * dim, dim, 0.0f);
    }
    const int64_t shape[3] = {count, kv_heads, dim}, strides[2] = {root.width, dim};
    const kvmgr_tensor rows = view(values.data(), GGML_TYPE_F32, shape, strides);
    const kvmgr_side side = root.is_value ? KVMGR_SIDE_VALUE : KVMGR_SIDE_KEY;
    require(kvmgr_slots_write(to, side, cells_.data(), cells_.size(), &rows, 0), "writing the cache");
    for (size_t head = 0; head < gone.size(); ++head)
        if (!gone[head].empty()) require(kvmgr_slots_evict(to, uint32_t(head), gone[head].data(), gone[head].size()), "evicting");
}
