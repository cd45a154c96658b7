// A libcuda.so whose device is this CPU: the calls that libkvmgr and its tests make, with the
// shipped kernels run by the emulator. It is strict where a real driver is fast:
//
// * what is queued happens when somebody waits for it and not before, so a buffer that is reused too
//   early shows itself;
// * device memory can be reached in calls of the driver alone, so a host that reads it crashes;
// * fresh memory is NaN, freed memory stays out of reach;
// * a wrong context, a dead handle, a kernel that is not in the PTX, too much shared memory, and
//   what a capture forbids are errors, each with a line on stderr.
#define KVM_EMU
#include "append.cu"
#include "blocks.cu"
#include "decode_f16.cu"
#include "decode_q.cu"
#include "note.cu"
#include "obs.cu"
#include "prefill.cu"
#include "score.cu"
#include "seal.cu"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

struct Context {
    bool is_live = true;
};
using Work = std::function<void()>;
struct Graph {
    std::vector<Work> work;
};
struct Stream {
    Context* context;
    Graph* capture = nullptr;
    bool is_live = true;
};
struct Event {
    u64 after = 0; // work that has to be done first
    bool is_live = true;
};
struct Module {
    Context* context;
    std::set<std::string> kernels;
    bool is_live = true;
};
struct Function {
    Module* module;
    const EmuKernel* kernel;
    u32 max_shared = 48 << 10;
};
struct Memory {
    size_t bytes;
    Context* context;
    bool is_live;
};

// Handles are never freed, so that dead ones are recognised.
static std::recursive_mutex lock;
static Context primary;
static int primary_holders = 0;
static thread_local std::vector<Context*> current;
static std::map<u64, Memory> memory;
static std::set<void*> handles;
static std::deque<Work> queue;
static u64 queued = 0, done = 0;
static int captures = 0;
static Stream default_stream{&primary};
static bool has_failed = false;
static std::map<std::string, unsigned> launches; // of kernels, by name
static u32 seed = 1;
static unsigned failures = 0; // calls that were refused
static u64 allocations = 0, first_refused = 0, num_refused = 0; // since mock_refuse_allocations

static int fail(int code, const char* text) {
    fprintf(stderr, "mock driver: %d: %s\n", code, text);
    failures++;
    return code;
}

static void protect(int protection) {
    for (auto& [address, block] : memory)
        if (block.is_live) mprotect((void*)address, block.bytes, protection);
}

static void run_until(u64 count) {
    if (done >= count || queue.empty()) return;
    protect(PROT_READ | PROT_WRITE);
    for (; done < count && !queue.empty(); done++) {
        Work work = std::move(queue.front());
        queue.pop_front();
        if (!has_failed) work();
    }
    protect(PROT_NONE);
}

#define BEGIN                                                                                     \
    std::lock_guard<std::recursive_mutex> guard(lock);                                            \
    if (has_failed) return fail(LAUNCH_FAILED, "a kernel failed before");
#define WITH_CONTEXT                                                                              \
    BEGIN if (current.empty() || !current.back()->is_live)                                        \
        return fail(INVALID_CONTEXT, "no context is current");                                    \
    Context* context = current.back();                                                            \
    (void)context;
/// What may not be called by anybody while a stream is captured in the strictest mode.
#define NOT_IN_CAPTURE                                                                            \
    if (captures) return fail(CAPTURE_UNSUPPORTED, "not while a stream is captured");

static Stream* stream_of(void* stream) {
    if (!stream) return &default_stream;
    return handles.count(stream) && ((Stream*)stream)->is_live ? (Stream*)stream : nullptr;
}

static int enqueue(void* handle, Context* context, Work work) {
    Stream* stream = stream_of(handle);
    if (!stream) return fail(INVALID_HANDLE, "the stream is none");
    if (handle && stream->context != context)
        return fail(INVALID_CONTEXT, "the stream is of another context");
    if (stream->capture) {
        stream->capture->work.push_back(std::move(work));
        return SUCCESS;
    }
    if (captures && !handle) return fail(CAPTURE_INVALIDATED, "the legacy stream in a capture");
    queue.push_back(std::move(work));
    queued++;
    return SUCCESS;
}

/// Runs one launch; answers NULL or what went wrong.
static const char* emulate(const EmuKernel* kernel, const void* params, u32 grid, u32 shared) {
    Emu& e = emu();
    e.random.seed(seed++);
    e.error = nullptr;
    e.grid = grid;
    e.kernel = [=] { kernel->run(params); };
    for (e.block = 0; e.block < grid && !e.error; e.block++) e.run_block(kernel->threads, shared);
    return e.error;
}

/// The live allocation that holds these bytes.
static Memory* holder(u64 address, size_t bytes) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return nullptr;
    auto& [start, block] = *--after;
    return block.is_live && address + bytes <= start + block.bytes ? &block : nullptr;
}

template <class T> static T* keep(T* handle) {
    handles.insert(handle);
    return handle;
}

extern "C" {
int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int* out) { return *out = 12030, SUCCESS; }
int cuDeviceGetCount(int* out) { return *out = 1, SUCCESS; }
int cuDeviceGet(int* out, int ordinal) {
    if (ordinal != 0) return fail(INVALID_DEVICE, "there is one device");
    return *out = 0, SUCCESS;
}
int cuDeviceGetAttribute(int* out, int attribute, int) {
    std::map<int, int> known{{16, 3}, {75, 9}, {76, 0}, {97, 227 << 10}};
    if (!known.count(attribute)) return fail(INVALID_VALUE, "an attribute nobody knows");
    return *out = known[attribute], SUCCESS;
}

int cuDevicePrimaryCtxRetain(Context** out, int) {
    BEGIN primary_holders++;
    primary.is_live = true;
    return *out = &primary, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    BEGIN if (primary_holders == 0) return fail(INVALID_CONTEXT, "released more than retained");
    if (--primary_holders == 0) primary.is_live = false;
    return SUCCESS;
}
int cuCtxCreate_v2(Context** out, unsigned, int) {
    BEGIN current.push_back(*out = keep(new Context));
    return SUCCESS;
}
int cuCtxDestroy_v2(Context* context) {
    BEGIN context->is_live = false;
    if (!current.empty() && current.back() == context) current.pop_back();
    return SUCCESS;
}
int cuCtxGetCurrent(Context** out) {
    return *out = current.empty() ? nullptr : current.back(), SUCCESS;
}
int cuCtxGetDevice(int* out) {
    WITH_CONTEXT return *out = 0, SUCCESS;
}
int cuCtxPushCurrent_v2(Context* context) {
    BEGIN if (!context || !context->is_live) return fail(INVALID_CONTEXT, "a dead context");
    current.push_back(context);
    return SUCCESS;
}
int cuCtxPopCurrent_v2(Context** out) {
    if (current.empty()) return fail(INVALID_CONTEXT, "nothing to pop");
    *out = current.back();
    current.pop_back();
    return SUCCESS;
}

static bool is_refused() { return allocations++ - first_refused < num_refused; }
int cuMemAlloc_v2(u64* out, size_t bytes) {
    WITH_CONTEXT NOT_IN_CAPTURE if (bytes == 0 || bytes > (size_t)1 << 33 || is_refused())
        return OUT_OF_MEMORY;
    bytes = (bytes + 4095) / 4096 * 4096;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(base, 0xff, bytes);
    mprotect(base, bytes, PROT_NONE);
    memory[(u64)base] = {bytes, context, true};
    return *out = (u64)base, SUCCESS;
}
int cuMemFree_v2(u64 address) {
    WITH_CONTEXT NOT_IN_CAPTURE if (!memory.count(address) || !memory[address].is_live)
        return fail(INVALID_VALUE, "freed twice");
    if (memory[address].context != context) return fail(INVALID_CONTEXT, "freed in another context");
    run_until(queued);
    memory[address].is_live = false;
    return SUCCESS;
}
int cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    WITH_CONTEXT NOT_IN_CAPTURE if (is_refused()) return OUT_OF_MEMORY;
    return *out = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), SUCCESS;
}
int cuMemFreeHost(void* address) {
    WITH_CONTEXT NOT_IN_CAPTURE run_until(queued);
    return free(address), SUCCESS;
}
int cuPointerGetAttribute(void* out, int attribute, u64 address) {
    BEGIN if (attribute != 9 || !holder(address, 1)) return INVALID_VALUE;
    return *(int*)out = 0, SUCCESS;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) {
    WITH_CONTEXT if (!holder(to, bytes)) return fail(INVALID_VALUE, "a copy to no device memory");
    return enqueue(stream, context, [=] { memcpy((void*)to, from, bytes); });
}
int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void* stream) {
    WITH_CONTEXT if (!holder(to, bytes) || !holder(from, bytes))
        return fail(INVALID_VALUE, "a copy between no device memories");
    return enqueue(stream, context, [=] { memmove((void*)to, (void*)from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) {
    WITH_CONTEXT if (!holder(from, bytes)) return fail(INVALID_VALUE, "a copy of no device memory");
    return enqueue(stream, context, [=] { memcpy(to, (void*)from, bytes); });
}
int cuMemcpyHtoD_v2(u64 to, const void* from, size_t bytes) {
    WITH_CONTEXT NOT_IN_CAPTURE int code = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
    return run_until(queued), code;
}
int cuMemcpyDtoH_v2(void* to, u64 from, size_t bytes) {
    WITH_CONTEXT NOT_IN_CAPTURE int code = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
    return run_until(queued), code;
}
int cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void* stream) {
    WITH_CONTEXT if (!holder(to, bytes)) return fail(INVALID_VALUE, "a set of no device memory");
    return enqueue(stream, context, [=] { memset((void*)to, value, bytes); });
}

int cuStreamCreate(Stream** out, unsigned) {
    WITH_CONTEXT return *out = keep(new Stream{context}), SUCCESS;
}
int cuStreamDestroy_v2(Stream* stream) {
    BEGIN if (!stream_of(stream)) return fail(INVALID_HANDLE, "the stream is none");
    return stream->is_live = false, SUCCESS;
}
int cuStreamSynchronize(void* stream) {
    WITH_CONTEXT NOT_IN_CAPTURE if (!stream_of(stream)) return fail(INVALID_HANDLE, "no stream");
    return run_until(queued), has_failed ? LAUNCH_FAILED : SUCCESS;
}
int cuCtxSynchronize() { return cuStreamSynchronize(nullptr); }
int cuStreamIsCapturing(void* stream, int* out) {
    WITH_CONTEXT Stream* it = stream_of(stream);
    if (!it) return fail(INVALID_HANDLE, "the stream is none");
    return *out = it->capture != nullptr, SUCCESS;
}
int cuStreamBeginCapture_v2(Stream* stream, int) {
    WITH_CONTEXT if (!stream || !stream_of(stream)) return fail(INVALID_HANDLE, "no stream");
    stream->capture = keep(new Graph);
    return captures++, SUCCESS;
}
int cuStreamEndCapture(Stream* stream, Graph** out) {
    WITH_CONTEXT if (!stream_of(stream) || !stream->capture)
        return fail(INVALID_HANDLE, "the stream is not captured");
    *out = stream->capture;
    stream->capture = nullptr;
    return captures--, SUCCESS;
}
int cuGraphInstantiateWithFlags(Graph** out, Graph* graph, u64) { return *out = graph, SUCCESS; }
int cuGraphLaunch(Graph* graph, void* stream) {
    WITH_CONTEXT for (auto& work : graph->work) if (int code = enqueue(stream, context, work)) return code;
    return SUCCESS;
}
int cuGraphExecDestroy(Graph*) { return SUCCESS; }
int cuGraphDestroy(Graph*) { return SUCCESS; }

int cuEventCreate(Event** out, unsigned) {
    WITH_CONTEXT return *out = keep(new Event), SUCCESS;
}
int cuEventDestroy_v2(Event* event) { return event->is_live = false, SUCCESS; }
int cuEventRecord(Event* event, void* stream) {
    WITH_CONTEXT if (!event->is_live || !stream_of(stream)) return fail(INVALID_HANDLE, "no event");
    return event->after = queued, SUCCESS;
}
int cuEventSynchronize(Event* event) {
    WITH_CONTEXT NOT_IN_CAPTURE if (!event->is_live) return fail(INVALID_HANDLE, "no event");
    return run_until(event->after), SUCCESS;
}

int cuModuleLoadData(Module** out, const char* image) {
    WITH_CONTEXT NOT_IN_CAPTURE const std::string text = image, start = ".entry ";
    if (text.find(".version 8.1") == text.npos) return fail(INVALID_PTX, "no PTX of version 8.1");
    *out = keep(new Module{context, {}});
    for (size_t at = 0; (at = text.find(start, at)) != text.npos;) {
        at += start.size();
        (*out)->kernels.insert(text.substr(at, text.find('(', at) - at));
    }
    return SUCCESS;
}
int cuModuleUnload(Module* module) {
    WITH_CONTEXT if (!module->is_live) return fail(INVALID_HANDLE, "unloaded twice");
    return module->is_live = false, SUCCESS;
}
int cuModuleGetFunction(Function** out, Module* module, const char* name) {
    WITH_CONTEXT const EmuKernel* kernel = EmuKernel::find(name);
    if (!module->kernels.count(name)) return fail(NOT_FOUND, "the PTX lacks the kernel");
    if (!kernel) return fail(NOT_FOUND, "the emulator lacks the kernel");
    return *out = keep(new Function{module, kernel}), SUCCESS;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    WITH_CONTEXT if (attribute != 8 || value < 0 || value > 227 << 10)
        return fail(INVALID_VALUE, "no more than 227 KiB of shared memory");
    return function->max_shared = (u32)value, SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, Function*, int, size_t shared) {
    return *out = (int)std::min<size_t>(2, (227 << 10) / (shared + 1024)), SUCCESS;
}
int cuLaunchKernel(Function* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   unsigned, void*, void**, void**) {
    WITH_CONTEXT if (!handles.count(function)) return fail(INVALID_HANDLE, "the kernel is none");
    return fail(INVALID_VALUE, "only cuLaunchKernelEx is here");
}
struct LaunchConfig {
    unsigned x, y, z, threads, ty, tz, shared;
    void* stream;
    const u32* attributes;
    unsigned num_attributes;
};
int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** params, void**) {
    WITH_CONTEXT if (!handles.count(function) || !function->module->is_live)
        return fail(INVALID_HANDLE, "the kernel is none, or its module is gone");
    if (function->module->context != context)
        return fail(INVALID_CONTEXT, "the kernel is of another context");
    const EmuKernel* kernel = function->kernel;
    const auto& [x, y, z, threads, ty, tz, shared, stream, attributes, num_attributes] = *config;
    if (x == 0 || y != 1 || z != 1 || ty != 1 || tz != 1 || threads != kernel->threads)
        return fail(INVALID_VALUE, "a grid or CTA of a wrong shape");
    if (shared > function->max_shared) return fail(INVALID_VALUE, "too much shared memory");
    // 6: it may start while the kernel before ends, which is up to the device.
    if (num_attributes > 1 || (num_attributes == 1 && attributes[0] != 6))
        return fail(INVALID_VALUE, "an attribute nobody knows");
    auto bytes = std::make_shared<std::vector<char>>(kernel->params_bytes);
    memcpy(bytes->data(), params[0], bytes->size());
    u32 grid = x, dynamic = shared;
    int code = enqueue(stream, context, [=] {
        const char* error = emulate(kernel, bytes->data(), grid, dynamic);
        if (!error) return;
        has_failed = true;
        fail(LAUNCH_FAILED, error);
    });
    launches[kernel->name] += code == SUCCESS;
    if (num_attributes == 1) launches[std::string("early ") + kernel->name] += code == SUCCESS;
    return code;
}

/// Not of a driver: calls that were refused so far.
unsigned mock_num_failures() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return failures;
}

/// Not of a driver: of the allocations from now on there is no memory for `count` from the `first` on. Answers how
/// many there were since the last call.
unsigned mock_refuse_allocations(unsigned first, unsigned count) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    unsigned before = (unsigned)allocations;
    allocations = 0, first_refused = first, num_refused = count;
    return before;
}

/// Not of a driver: launches so far of kernels whose names start with `prefix`, or, after "early ", of those
/// that may start while the kernel before ends.
unsigned mock_num_launches(const char* prefix) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    unsigned count = 0;
    for (auto& [name, n] : launches)
        if (name.compare(0, strlen(prefix), prefix) == 0) count += n;
    return count;
}
}
