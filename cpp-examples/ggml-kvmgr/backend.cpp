// libggml-kvmgr.so: a ggml backend whose device owns the KV cache of an unmodified llama.cpp.
#include <unistd.h>

#include <string>

#include "buffer.hpp"
#include "ggml-backend-impl.h"
#include "kvmgr.h"
#include "ops.hpp"
#include "options.hpp"
#include "team.hpp"

namespace {
ggml_backend_dev_t device();

// ---- backend: one for each context of the host; the cache itself belongs to the buffers

const char *backend_name(ggml_backend_t) { return "KVMGR"; }
Team &team(ggml_backend_t backend) { return *static_cast<Team *>(backend->context); }
void backend_free(ggml_backend_t backend) {
    delete &team(backend);
    delete backend;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph *graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i)
        if (!compute(ggml_graph_node(graph, i), team(backend))) return GGML_STATUS_FAILED;
    return GGML_STATUS_SUCCESS;
}

ggml_guid_t guid() {
    static ggml_guid id = {0x6b, 0x76, 0x6d, 0x67, 0x72, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x2d, 0x70, 0x6c, 0x75, 0x67, 0x01};
    return &id;
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    auto *backend = new ggml_backend();
    backend->guid = guid();
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = graph_compute;
    backend->device = dev;
    backend->context = new Team;
    return backend;
}

// ---- device: of type GPU, because the host offers its KV cache to nothing else

const char *device_name(ggml_backend_dev_t) { return "KVMGR0"; }
const char *device_description(ggml_backend_dev_t) { return "KV cache of libkvmgr, on the CPU"; }
void device_memory(ggml_backend_dev_t, size_t *free, size_t *total) {
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    *free = size_t(sysconf(_SC_AVPHYS_PAGES)) * page, *total = size_t(sysconf(_SC_PHYS_PAGES)) * page;
}
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props *props) {
    *props = {};
    props->name = device_name(dev), props->description = device_description(dev), props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
}
bool device_supports_op(ggml_backend_dev_t, const ggml_tensor *op) { return supports(op); }
bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    return type == kvmgr_buffer_type(dev) || ggml_backend_buft_is_host(type);
}

// ---- registration

const char *reg_name(ggml_backend_reg_t) { return "KVMGR"; }
size_t reg_device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t) { return device(); }
void set_n_threads(ggml_backend_t backend, int count) { team(backend).threads = count > 0 ? unsigned(count) : 1; }
void *reg_proc(ggml_backend_reg_t, const char *name) {
    const std::string wanted = name;
    return wanted == "ggml_backend_set_n_threads" ? reinterpret_cast<void *>(set_n_threads) : nullptr;
}

ggml_backend_reg *registration() {
    static ggml_backend_reg reg = {};
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = reg_name;
    reg.iface.get_device_count = reg_device_count;
    reg.iface.get_device = reg_device;
    reg.iface.get_proc_address = reg_proc;
    return &reg;
}

ggml_backend_dev_t device() {
    static ggml_backend_device dev = {};
    dev.iface.get_name = device_name;
    dev.iface.get_description = device_description;
    dev.iface.get_memory = device_memory;
    dev.iface.get_type = device_type;
    dev.iface.get_props = device_props;
    dev.iface.init_backend = init_backend;
    dev.iface.get_buffer_type = kvmgr_buffer_type;
    dev.iface.supports_op = device_supports_op;
    dev.iface.supports_buft = device_supports_buft;
    dev.reg = registration();
    return &dev;
}

void log_line(void *, kvmgr_log_level, const char *message) { report("%s", message); }
}  // namespace

// NULL, after a message, makes the host go on without the plugin.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    const uint32_t built = KVMGR_VERSION_MAJOR << 16 | KVMGR_VERSION_MINOR << 8;
    if ((kvmgr_version() & ~uint32_t(0xff)) != built) {
        report("built for libkvmgr %d.%d, found %s: not loaded", KVMGR_VERSION_MAJOR, KVMGR_VERSION_MINOR, kvmgr_version_string());
        return nullptr;
    }
    if (!read_options()) {
        report("not loaded: the KV cache stays as it is without the plugin");
        return nullptr;
    }
    // Errors are reported where they happen; the library's own lines are for the curious.
    if (options().log > 2 && kvmgr_set_log(nullptr, options().log, log_line) != KVMGR_OK) return nullptr;
    return registration();
}
