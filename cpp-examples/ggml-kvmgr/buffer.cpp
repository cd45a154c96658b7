#include "buffer.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "ggml-backend-impl.h"
#include "layer.hpp"
#include "options.hpp"

namespace {
struct Buffer {
    void *base = nullptr;
    size_t size = 0;
    bool readable = false;
    std::map<std::string, std::unique_ptr<Layer>> layers;
};

std::mutex mutex;
std::set<Buffer *> buffers;  // all that exist; they and the lists of their layers are under the mutex

Buffer &self(ggml_backend_buffer_t buffer) { return *static_cast<Buffer *>(buffer->context); }

// Splits "cache_k_l3" or "cache_<tag>v_l3"; false for anything else.
bool parse_name(const char *name, std::string &key, bool &is_value, int &layer) {
    const std::string text = name;
    const size_t l = text.rfind("_l");
    if (text.rfind("cache_", 0) != 0 || l == std::string::npos || l < 7) return false;
    const char side = text[l - 1];
    if ((side != 'k' && side != 'v') || std::sscanf(text.c_str() + l, "_l%d", &layer) != 1) return false;
    is_value = side == 'v';
    key = text.substr(0, l - 1) + text.substr(l);
    return true;
}

// llama.cpp puts layers with a sliding window into a cache of their own: caches without a layer in
// common are taken for those of one model.
bool are_of_one_model(const Buffer &a, const Buffer &b) {
    for (const auto &x : a.layers)
        for (const auto &y : b.layers)
            if (&a != &b && x.second->index == y.second->index) return false;
    return true;
}

// The host tells a backend of layers one by one, but policies want to know how many there are. Under the
// mutex.
void count_layers() {
    for (Buffer *b : buffers) {
        int last = 0;
        for (Buffer *other : buffers)
            if (are_of_one_model(*b, *other))
                for (const auto &layer : other->layers) last = std::max(last, layer.second->index);
        for (const auto &layer : b->layers) layer.second->model_layers = last + 1;
    }
}

void print_stats(const Buffer &buffer) {
    uint64_t used = 0, peak = 0, live = 0, evicted = 0, plain = 0;
    for (const auto &entry : buffer.layers) {
        const Layer &layer = *entry.second;
        const kvmgr_slots_stats stats = layer.stats();
        used += stats.bytes_used, peak += stats.bytes_peak, live += stats.rows_live, evicted += stats.rows_evicted;
        if (layer.kv_heads) plain += stats.rows_live * uint64_t(layer.key_dim + layer.value_dim) * 2;
    }
    report("spec %s: %zu layers, %.3f MiB of KV held (%.3f of the same rows in f16), peak %.3f MiB, "
           "%llu rows live, %llu evicted",
           options().spec.empty() ? "f16" : options().spec.c_str(), buffer.layers.size(), double(used) / (1 << 20),
           plain ? double(used) / double(plain) : 0.0, double(peak) / (1 << 20), static_cast<unsigned long long>(live),
           static_cast<unsigned long long>(evicted));
}

void free_buffer(ggml_backend_buffer_t buffer) {
    Buffer &b = self(buffer);
    if (options().stats && !b.layers.empty()) print_stats(b);
    munmap(b.base, b.size);
    {
        std::lock_guard<std::mutex> lock(mutex);
        buffers.erase(&b);
    }
    delete &b;
}

void *get_base(ggml_backend_buffer_t buffer) { return self(buffer).base; }

bool make_readable(Buffer &b) {
    if (!b.readable) b.readable = mprotect(b.base, b.size, PROT_READ | PROT_WRITE) == 0;
    return b.readable;
}

// A cache that is read again and again in full is faster in huge pages. Its start stays in small ones,
// because a short context would fill no more than a bit of each.
void use_huge_pages(const ggml_tensor *tensor) {
    const size_t page = size_t(2) << 20, small = 4 * page;
    const auto start = reinterpret_cast<uintptr_t>(tensor->data), end = start + ggml_nbytes(tensor);
    const uintptr_t first = (start + small + page - 1) / page * page;
    if (first < end) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
}

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor *tensor) {
    Buffer &b = self(buffer);
    std::string key;
    bool is_value = false;
    int index = 0;
    if (tensor->view_src) return GGML_STATUS_SUCCESS;
    const bool is_cache = tensor->op == GGML_OP_NONE && parse_name(tensor->name, key, is_value, index);
    if (!options().opaque) {
        if (is_cache) use_huge_pages(tensor);
        return GGML_STATUS_SUCCESS;
    }
    if (std::strncmp(tensor->name, "cache_", 6) == 0 && !is_cache) {
        report("%s is a recurrent state: only KVMGR_MODE=transparent, without KVMGR_SPEC, serves this model", tensor->name);
        return GGML_STATUS_FAILED;
    }
    if (!is_cache) return make_readable(b) ? GGML_STATUS_SUCCESS : GGML_STATUS_ALLOC_FAILED;
    if (tensor->type != GGML_TYPE_F16 && tensor->type != GGML_TYPE_F32 && tensor->type != GGML_TYPE_BF16) {
        report("%s is %s: the format of the cache is KVMGR_SPEC's to choose, leave -ctk and -ctv alone", tensor->name, ggml_type_name(tensor->type));
        return GGML_STATUS_FAILED;
    }
    std::lock_guard<std::mutex> lock(mutex);
    // Values come after the keys of their layer: without them they are parts of the keys.
    for (const auto &other : b.layers) {
        if (is_value || other.second->value.layer || other.first == key) continue;
        report("layer %d has no values of its own (MLA): only KVMGR_MODE=transparent, without KVMGR_SPEC, serves this model", other.second->index);
        return GGML_STATUS_FAILED;
    }
    std::unique_ptr<Layer> &layer = b.layers[key];
    if (!layer) layer.reset(new Layer);
    layer->index = index, layer->cells = tensor->ne[1], layer->streams = tensor->ne[2];
    Root &root = is_value ? layer->value : layer->key;
    root.layer = layer.get(), root.is_value = is_value, root.type = tensor->type;
    root.width = tensor->ne[0], root.row_bytes = tensor->nb[1];
    tensor->extra = &root;
    count_layers();
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor *tensor, const void *data, size_t offset, size_t size) {
    if (const Root *root = root_of(tensor)) root->layer->set(*root, data, tensor->view_offs + offset, size);
    else std::memcpy(static_cast<char *>(tensor->data) + offset, data, size);
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor *tensor, void *data, size_t offset, size_t size) {
    if (const Root *root = root_of(tensor)) root->layer->get(*root, data, tensor->view_offs + offset, size);
    else std::memcpy(data, static_cast<const char *>(tensor->data) + offset, size);
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor *tensor, uint8_t value, size_t offset, size_t size) {
    if (!root_of(tensor)) return void(std::memset(static_cast<char *>(tensor->data) + offset, value, size));
    const std::string bytes(size, char(value));
    set_tensor(buffer, tensor, bytes.data(), offset, size);
}

// Streams are copied as they are, evicted rows and formats included; the rest goes through get and set.
bool cpy_tensor(ggml_backend_buffer_t, const ggml_tensor *source, ggml_tensor *target) {
    const Root *from = root_of(source), *to = root_of(target);
    if (!from || !to || from->layer != to->layer || from->is_value != to->is_value) return false;
    Layer &layer = *from->layer;
    const size_t stream = size_t(layer.cells) * from->row_bytes;
    if (ggml_nbytes(source) != stream || source->view_offs % stream || target->view_offs % stream) return false;
    // Keys and values are copied together, when the keys are.
    if (from->is_value || layer.is_empty()) return true;
    return succeeded(kvmgr_slots_copy_stream(layer.slots(), uint32_t(source->view_offs / stream),
                                             uint32_t(target->view_offs / stream)), "copying a stream");
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    Buffer &b = self(buffer);
    for (auto &entry : b.layers) entry.second->clear();
    if (!b.readable) return;
    // Fresh pages are zeros, and cost nothing until they are written.
    if (value == 0) madvise(b.base, b.size, MADV_DONTNEED);
    else std::memset(b.base, value, b.size);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    auto b = std::unique_ptr<Buffer>(new Buffer);
    b->size = size ? size : 1;
    b->readable = !options().opaque;
    const int protection = b->readable ? PROT_READ | PROT_WRITE : PROT_NONE;
    b->base = mmap(nullptr, b->size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b->base == MAP_FAILED) return nullptr;
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.init_tensor = init_tensor;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.cpy_tensor = cpy_tensor;
    iface.clear = clear;
    {
        std::lock_guard<std::mutex> lock(mutex);
        buffers.insert(b.get());
    }
    return ggml_backend_buffer_init(type, iface, b.release(), size);
}

const char *type_name(ggml_backend_buffer_type_t) { return "KVMGR"; }
size_t alignment(ggml_backend_buffer_type_t) { return 64; }
bool is_host(ggml_backend_buffer_type_t) { return !options().opaque; }
}  // namespace

ggml_backend_buffer_type_t kvmgr_buffer_type(ggml_backend_dev_t device) {
    static ggml_backend_buffer_type type = {};
    type.iface.get_name = type_name;
    type.iface.alloc_buffer = alloc_buffer;
    type.iface.get_alignment = alignment;
    type.iface.is_host = is_host;
    type.device = device;
    return &type;
}
