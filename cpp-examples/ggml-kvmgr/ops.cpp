#include "ops.hpp"

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "layer.hpp"
#include "options.hpp"

namespace {
bool is_plain(ggml_type type) { return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }
int64_t elements(size_t bytes, const ggml_tensor *t) { return int64_t(bytes / ggml_type_size(t->type)); }
int64_t index_at(const ggml_tensor *t, int64_t i, int64_t j = 0, int64_t k = 0) {
    const char *at = static_cast<const char *>(t->data) + size_t(i) * t->nb[0] + size_t(j) * t->nb[1] + size_t(k) * t->nb[2];
    return t->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
}

// ---- SET_ROWS

bool supports_set_rows(const ggml_tensor *op) {
    const ggml_tensor *rows = op->src[0], *indices = op->src[1];
    const bool is_index = indices->type == GGML_TYPE_I64 || indices->type == GGML_TYPE_I32;
    if (rows->type != GGML_TYPE_F32 || !is_index) return false;
    const Root *root = root_of(op);
    if (!root) return op->type == GGML_TYPE_F32 || ggml_get_type_traits(op->type)->from_float_ref;
    if (op->ne[0] == root->width) return true;
    report("the values are stored element by element because flash attention is off: start with -fa on");
    return false;
}

bool set_rows_plain(ggml_tensor *op) {
    const ggml_tensor *rows = op->src[0], *indices = op->src[1];
    const auto convert = ggml_get_type_traits(op->type)->from_float_ref;
    for (int64_t k = 0; k < rows->ne[3]; ++k)
        for (int64_t j = 0; j < rows->ne[2]; ++j)
            for (int64_t i = 0; i < rows->ne[1]; ++i) {
                const int64_t to = index_at(indices, i, j % indices->ne[1], k % indices->ne[2]);
                if (to < 0 || to >= op->ne[1]) return report("SET_ROWS: row %lld of %lld", static_cast<long long>(to), static_cast<long long>(op->ne[1])), false;
                const char *in = static_cast<const char *>(rows->data) + size_t(i) * rows->nb[1] + size_t(j) * rows->nb[2] + size_t(k) * rows->nb[3];
                char *out = static_cast<char *>(op->data) + size_t(to) * op->nb[1] + size_t(j) * op->nb[2] + size_t(k) * op->nb[3];
                if (op->type == GGML_TYPE_F32) std::memcpy(out, in, size_t(op->ne[0]) * 4);
                else convert(reinterpret_cast<const float *>(in), out, op->ne[0]);
            }
    return true;
}

bool set_rows_cached(ggml_tensor *op, const Root &root) {
    const ggml_tensor *rows = op->src[0], *indices = op->src[1];
    Layer &layer = *root.layer;
    kvmgr_slots *slots = layer.slots();
    if (!slots) return false;
    std::vector<uint32_t> cells(static_cast<size_t>(rows->ne[1]));
    for (size_t i = 0; i < cells.size(); ++i) cells[i] = uint32_t(index_at(indices, int64_t(i)));
    const int64_t dim = root.width / layer.kv_heads;
    const int64_t shape[3] = {rows->ne[1], layer.kv_heads, dim}, strides[2] = {elements(rows->nb[1], rows), dim};
    const kvmgr_tensor values = view(rows->data, rows->type, shape, strides);
    const kvmgr_side side = root.is_value ? KVMGR_SIDE_VALUE : KVMGR_SIDE_KEY;
    if (!succeeded(kvmgr_slots_write(slots, side, cells.data(), cells.size(), &values, 0), "SET_ROWS")) return false;
    if (!root.is_value) layer.written.swap(cells);
    return true;
}

// ---- FLASH_ATTN_EXT

bool supports_attention(const ggml_tensor *op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const Root *key = root_of(k), *value = root_of(v);
    if (q->type != GGML_TYPE_F32 || (mask && mask->type != GGML_TYPE_F16)) return false;
    if (k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] || (mask && mask->ne[2] != 1 && mask->ne[2] != q->ne[2])) return false;
    if (key || value) return key && value && key->layer == value->layer && key->layer->shape(op);
    const auto is_rows = [](const ggml_tensor *t) { return is_plain(t->type) && t->nb[0] == ggml_type_size(t->type) && t->ne[0] <= 1024; };
    return is_rows(k) && is_rows(v) && k->ne[1] > 0;
}

std::vector<float> alibi(float max_bias, int64_t heads) {
    if (max_bias <= 0) return {};
    std::vector<float> slopes(static_cast<size_t>(heads));
    const auto n = uint32_t(1) << uint32_t(std::floor(std::log2(double(heads))));
    const float m0 = std::pow(2.0f, -max_bias / float(n)), m1 = std::pow(2.0f, -max_bias / 2.0f / float(n));
    for (uint32_t h = 0; h < uint32_t(heads); ++h)
        slopes[h] = h < n ? std::pow(m0, float(h + 1)) : std::pow(m1, float(2 * (h - n) + 1));
    return slopes;
}

// One stream of an attention: tensors as the library wants them.
struct Stream {
    kvmgr_tensor query, key, value, mask, output;
    Stream(const ggml_tensor *op, int64_t s) {
        const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *m = op->src[3];
        const auto at = [s](const ggml_tensor *t, int dim) { return static_cast<const char *>(t->data) + size_t(s % t->ne[dim]) * t->nb[dim]; };
        const auto tokens_heads = [&](const ggml_tensor *t) {
            const int64_t shape[3] = {t->ne[1], t->ne[2], t->ne[0]}, strides[2] = {elements(t->nb[1], t), elements(t->nb[2], t)};
            return view(at(t, 3), t->type, shape, strides);
        };
        query = tokens_heads(q), key = tokens_heads(k), value = tokens_heads(v);
        const int64_t shape[3] = {op->ne[2], op->ne[1], op->ne[0]}, strides[2] = {elements(op->nb[2], op), elements(op->nb[1], op)};
        output = view(at(op, 3), op->type, shape, strides);
        if (m) {
            const int64_t mask_shape[3] = {q->ne[1], m->ne[2], m->ne[0]}, mask_strides[2] = {elements(m->nb[1], m), elements(m->nb[2], m)};
            mask = view(at(m, 3), m->type, mask_shape, mask_strides);
        }
    }
};

bool observe(Layer &layer, kvmgr_slots *slots, const Stream &stream, uint32_t number, int64_t s, int64_t queries, int64_t streams) {
    // The tokens of the batch, stream by stream, are the rows that were just written.
    if (int64_t(layer.written.size()) != queries * streams) return true;
    const uint32_t *cells = layer.written.data() + s * queries;
    return succeeded(kvmgr_slots_observe(slots, number, &stream.query, &stream.mask, cells, size_t(queries)), "policy");
}

bool attention(ggml_tensor *op, const Team &team) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *mask = op->src[3], *sinks = op->src[4];
    const Root *root = root_of(k);
    float params[3];
    std::memcpy(params, op->op_params, sizeof params);
    const std::vector<float> slopes = alibi(params[1], q->ne[2]);
    kvmgr_mask_options settings = {};
    settings.struct_size = sizeof settings;
    settings.softcap = params[2];
    // The host divides the scale by the cap; the library multiplies after the scale.
    settings.scale = params[0];
    settings.sinks = sinks ? static_cast<const float *>(sinks->data) : nullptr;
    settings.mask_slopes = slopes.empty() ? nullptr : slopes.data();
    settings.meeting = team.meeting;
    for (int64_t s = 0; s < q->ne[3]; ++s) {
        const Stream stream(op, s);
        const kvmgr_tensor *visible = mask ? &stream.mask : nullptr;
        kvmgr_slots *slots = nullptr;
        uint32_t number = 0;
        if (root) {
            Layer &layer = *root->layer;
            number = uint32_t(k->view_offs / (size_t(layer.cells) * root->row_bytes)) + uint32_t(s);
            if (!(slots = layer.slots())) return false;
            if (mask && !observe(layer, slots, stream, number, s, q->ne[1], q->ne[3])) return false;
        }
        std::atomic<bool> ok{true};
        team.run([&](unsigned worker, unsigned workers) {
            const kvmgr_status status = slots
                ? kvmgr_slots_attend(slots, number, &stream.query, visible, &stream.output, &settings, worker, workers)
                : kvmgr_attend_dense(&stream.query, &stream.key, &stream.value, visible, &stream.output, &settings, worker, workers);
            if (!succeeded(status, "FLASH_ATTN_EXT")) ok = false;
        });
        if (!ok) return false;
    }
    return true;
}

// ---- ROPE on cached keys: the host moves tokens to other positions

bool shift_keys(ggml_tensor *op, const Root &root) {
    Layer &layer = *root.layer;
    if (layer.is_empty()) return true;
    std::vector<uint32_t> cells;
    std::vector<int32_t> shifts;
    for (int64_t i = 0; i < op->src[1]->ne[0]; ++i)
        if (const int64_t shift = index_at(op->src[1], i)) cells.push_back(uint32_t(i)), shifts.push_back(int32_t(shift));
    if (cells.empty()) return true;
    const int64_t dim = layer.key_dim, heads = layer.kv_heads, n = int64_t(cells.size());
    const int64_t first = elements(op->view_offs, op) % dim;
    std::vector<float> rows(size_t(n * heads * dim));
    if (!succeeded(kvmgr_slots_read(layer.slots(), KVMGR_SIDE_KEY, cells.data(), cells.size(), rows.data(), nullptr), "context shift")) return false;

    ggml_init_params init = {16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true};
    ggml_context *context = ggml_init(init);
    ggml_tensor *keys = ggml_new_tensor_3d(context, GGML_TYPE_F32, dim, heads, n);
    ggml_tensor *positions = ggml_new_tensor_1d(context, GGML_TYPE_I32, n);
    ggml_tensor *part = ggml_view_3d(context, keys, op->ne[0], heads, n, keys->nb[1], keys->nb[2], size_t(first) * 4);
    ggml_tensor *factors = op->src[2] ? ggml_new_tensor_1d(context, GGML_TYPE_F32, op->src[2]->ne[0]) : nullptr;
    ggml_tensor *turned = ggml_rope_ext_inplace(context, part, positions, factors, int(op->ne[0]), 0, 0, 1, 1, 0, 1, 0, 0);
    std::memcpy(turned->op_params, op->op_params, sizeof op->op_params);
    ggml_cgraph *graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, turned);
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    ggml_backend_buffer_t buffer = cpu ? ggml_backend_alloc_ctx_tensors(context, cpu) : nullptr;
    bool ok = buffer != nullptr;
    if (ok) {
        ggml_backend_tensor_set(keys, rows.data(), 0, ggml_nbytes(keys));
        ggml_backend_tensor_set(positions, shifts.data(), 0, ggml_nbytes(positions));
        if (factors) ggml_backend_tensor_set(factors, op->src[2]->data, 0, ggml_nbytes(factors));
        ok = ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS;
        ggml_backend_tensor_get(keys, rows.data(), 0, ggml_nbytes(keys));
    }
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(cpu);
    ggml_free(context);
    const int64_t shape[3] = {n, heads, dim}, strides[2] = {heads * dim, dim};
    const kvmgr_tensor values = view(rows.data(), GGML_TYPE_F32, shape, strides);
    return ok && succeeded(kvmgr_slots_write(layer.slots(), KVMGR_SIDE_KEY, cells.data(), cells.size(), &values, KVMGR_SLOTS_SAME_TOKENS), "context shift");
}
}  // namespace

bool supports(const ggml_tensor *op) {
    switch (op->op) {
        case GGML_OP_NONE: case GGML_OP_VIEW: case GGML_OP_RESHAPE: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE: return true;
        case GGML_OP_SET_ROWS: return supports_set_rows(op);
        case GGML_OP_FLASH_ATTN_EXT: return supports_attention(op);
        case GGML_OP_ROPE: return op->view_src && root_of(op) && op->src[1]->type == GGML_TYPE_I32;
        default: return false;
    }
}

bool compute(ggml_tensor *op, const Team &team) {
    const Root *root = root_of(op);
    switch (op->op) {
        case GGML_OP_SET_ROWS: return root ? set_rows_cached(op, *root) : set_rows_plain(op);
        case GGML_OP_FLASH_ATTN_EXT: return attention(op, team);
        case GGML_OP_ROPE: return root && shift_keys(op, *root);
        default: return true;
    }
}
