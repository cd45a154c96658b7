// Runs one CTA of a shipped kernel on the CPU, with real barriers.
//
// Each thread is a fiber. Operations of a warp wait for its 32 lanes, barriers for the CTA, copies
// into shared memory happen when they are waited for and not before. The order of the lanes and
// warps is random, and now and then one warp is starved, so that a missing barrier shows itself.
// Shared memory is full of NaN at the start. What only hardware has is not here: weak memory order,
// bank conflicts, timing.
#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define KVM_KERNEL(threads, ctas, name, Params)                                                   \
    extern "C" void name(const Params p);                                                         \
    static const EmuKernel emu_##name(#name, threads, sizeof(Params),                             \
                                      [](const void* p) { name(*(const Params*)p); });            \
    extern "C" void name(const Params p)
#define KVM_DEVICE inline
#define KVM_DYN_SMEM(name) unsigned char* name = emu().smem.data()

/// A kernel under its name.
struct EmuKernel {
    const char* name;
    u32 threads;
    size_t params_bytes;
    void (*run)(const void* params);

    EmuKernel(const char* name, u32 threads, size_t bytes, void (*run)(const void*))
        : name(name), threads(threads), params_bytes(bytes), run(run) {
        all().push_back(this);
    }
    static std::vector<const EmuKernel*>& all() {
        static std::vector<const EmuKernel*> list;
        return list;
    }
    static const EmuKernel* find(const char* name) {
        for (const EmuKernel* kernel : all())
            if (!strcmp(kernel->name, name)) return kernel;
        return nullptr;
    }
};

struct EmuCopy {
    void* to;
    const void* from;
    bool is_valid;
};

/// Leaves what a function must keep on this stack, notes where, and goes on on another one. Contexts of
/// the C library call the system at each switch.
extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** from, void* to);
asm(R"(
    .text
    .globl emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

struct EmuFiber {
    void* stack_pointer;
    std::vector<char> stack = std::vector<char>(256 << 10);
    std::vector<EmuCopy> open;
    std::deque<std::vector<EmuCopy>> groups;
    bool is_ready = true, is_done = false;

    /// Begins `entry` on the stack, which is used again by the next CTA.
    void start(void (*entry)()) {
        void** top = (void**)((size_t)(stack.data() + stack.size()) & ~(size_t)15) - 2;
        *top = (void*)entry;     // where the first switch returns to
        stack_pointer = top - 6; // below it the registers that are taken off
        open.clear();
        groups.clear();
        is_ready = true, is_done = false;
    }
};

struct EmuWarp {
    const char* operation = nullptr;
    int arrived = 0;
    u64 in[32][12];
    u64 out[32][4];
};

struct Emu {
    std::vector<EmuFiber> fibers;
    std::vector<EmuWarp> warps;
    std::vector<unsigned char> smem;
    void* scheduler;
    std::mt19937 random;
    const char* error = nullptr;
    u32 current = 0, block = 0, grid = 1, at_barrier = 0;
    std::function<void()> kernel;

    void pause() {
        fibers[current].is_ready = false;
        emu_switch(&fibers[current].stack_pointer, scheduler);
    }
    void fail(const char* text) {
        error = error ? error : text;
        pause();
    }
    void step(u32 i) {
        current = i;
        emu_switch(&scheduler, fibers[i].stack_pointer);
    }
    void run_block(u32 threads, size_t smem_bytes);
};

inline Emu& emu() {
    static thread_local Emu instance;
    return instance;
}

inline void emu_entry() {
    Emu& e = emu();
    e.kernel();
    e.fibers[e.current].is_done = true;
    e.pause();
    abort();
}

inline void Emu::run_block(u32 threads, size_t smem_bytes) {
    fibers.resize(threads);
    for (auto& fiber : fibers) fiber.start(emu_entry);
    warps.assign(threads / 32, {});
    smem.assign(smem_bytes, 0xff);
    at_barrier = 0;
    u32 starved = random() % warps.size();
    for (;;) {
        if (random() % 64 == 0) starved = random() % warps.size();
        std::vector<u32> ready, rest;
        bool is_done = true;
        for (u32 i = 0; i < threads; i++) {
            is_done &= fibers[i].is_done;
            if (fibers[i].is_ready) (i / 32 == starved ? rest : ready).push_back(i);
        }
        if (error || is_done) return;
        if (ready.empty()) ready = rest;
        if (ready.empty()) {
            error = "deadlock: threads wait for others that have left or wait elsewhere";
            return;
        }
        // All ready lanes of one warp, from a random one on.
        u32 pick = ready[random() % ready.size()], first = pick / 32 * 32;
        for (u32 i = 0; i < 32 && !error; i++) {
            u32 lane = first + (pick + i) % 32;
            if (fibers[lane].is_ready) step(lane);
        }
    }
}

/// An operation of a whole warp: `act` sees what all lanes brought and fills what they get.
template <class Act> inline const u64* emu_warp(const char* name, const u64* in, int n, Act act) {
    Emu& e = emu();
    u32 me = e.current, lane = me % 32;
    EmuWarp& warp = e.warps[me / 32];
    if (warp.arrived == 0) warp.operation = name;
    if (warp.operation != name) e.fail("lanes of a warp are in different operations");
    memcpy(warp.in[lane], in, n * sizeof *in);
    if (++warp.arrived == 32) {
        act(warp.in, warp.out);
        warp.arrived = 0;
        for (u32 i = me / 32 * 32; i < me / 32 * 32 + 32; i++) e.fibers[i].is_ready = true;
    } else {
        e.pause();
    }
    return warp.out[lane];
}

inline u32 kvm_tid() { return emu().current; }
inline void kvm_settle(u32&) {}
inline u32 kvm_bid() { return emu().block; }
inline u32 kvm_grid() { return emu().grid; }
inline void kvm_fence() {}
inline void kvm_let_next_start() {}
inline void kvm_wait_for_previous() {}
inline u32 kvm_atomic_add(u32* p, u32 x) {
    u32 old = *p;
    *p += x;
    return old;
}
inline void kvm_ld_cg4(float (&x)[4], const float* p) {
    if ((size_t)p % 16) emu().fail("a load of 16 bytes is not aligned");
    memcpy(x, p, 16);
}
inline u32 kvm_log2_of(u32 x) { return 31 - __builtin_clz(x); }

inline void kvm_sync() {
    Emu& e = emu();
    if (++e.at_barrier < e.fibers.size()) return e.pause();
    e.at_barrier = 0;
    for (auto& fiber : e.fibers) fiber.is_ready = true;
}

inline void kvm_syncwarp() {
    static const char* name = "syncwarp";
    emu_warp(name, nullptr, 0, [](auto&, auto&) {});
}

inline u64 emu_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float emu_float(u64 bits) {
    float x;
    u32 low = (u32)bits;
    memcpy(&x, &low, 4);
    return x;
}

inline u32 kvm_bits(float x) { return (u32)emu_bits(x); }
inline float kvm_float(u32 bits) { return emu_float(bits); }
inline float kvm_half_to_float(u32 bits) { return _cvtsh_ss((u16)bits); }

inline float kvm_shfl_xor(float x, int mask) {
    static const char* name = "shfl_xor";
    u64 in[2] = {emu_bits(x), (u64)mask};
    return emu_float(*emu_warp(name, in, 2, [](auto& in, auto& out) {
        for (int i = 0; i < 32; i++) out[i][0] = in[i ^ in[i][1]][0];
    }));
}

inline u32 kvm_shfl(u32 x, u32 from) {
    static const char* name = "shfl";
    u64 in[2] = {x, from};
    return (u32)*emu_warp(name, in, 2, [](auto& in, auto& out) {
        for (int i = 0; i < 32; i++) out[i][0] = in[in[i][1] % 32][0];
    });
}
inline u32 kvm_ballot(bool x) {
    static const char* name = "ballot";
    u64 in[1] = {x};
    return (u32)*emu_warp(name, in, 1, [](auto& in, auto& out) {
        u64 bits = 0;
        for (int i = 0; i < 32; i++) bits |= in[i][0] << i;
        for (int i = 0; i < 32; i++) out[i][0] = bits;
    });
}
inline u32 kvm_popc(u32 x) { return __builtin_popcount(x); }

inline u64 kvm_read_once() { return 1; }
inline void kvm_cp_async16(void* to, const void* from, bool is_valid, u64 = 0) {
    if ((size_t)to % 16 || (is_valid && (size_t)from % 16)) emu().fail("cp.async is not aligned");
    emu().fibers[emu().current].open.push_back({to, from, is_valid});
}
template <int OFFSET> void kvm_cp_async16_at(void* to, const void* from) {
    kvm_cp_async16((char*)to + OFFSET, (const char*)from + OFFSET, true);
}
inline void kvm_cp_commit() {
    EmuFiber& me = emu().fibers[emu().current];
    me.groups.push_back(std::move(me.open));
    me.open.clear();
}
template <int N> inline void kvm_cp_wait() {
    auto& groups = emu().fibers[emu().current].groups;
    for (; groups.size() > N; groups.pop_front())
        for (const EmuCopy& copy : groups.front())
            copy.is_valid ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
}

inline void emu_ldsm(u32 (&r)[4], const void* row, bool is_transposed) {
    static const char* name = "ldmatrix";
    u64 in[2] = {(u64)row, is_transposed};
    const u64* out = emu_warp(name, in, 2, [](auto& in, auto& out) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < 4; m++) {
                u16 pair[2];
                for (int j = 0; j < 2; j++) {
                    int i = lane / 4, k = lane % 4 * 2 + j;
                    pair[j] = in[lane][1] ? ((const u16*)in[m * 8 + k][0])[i]
                                          : ((const u16*)in[m * 8 + i][0])[k];
                }
                out[lane][m] = pair[0] | (u32)pair[1] << 16;
            }
    });
    for (int m = 0; m < 4; m++) r[m] = (u32)out[m];
}
inline void kvm_ldsm4(u32 (&r)[4], const void* row) { emu_ldsm(r, row, false); }
inline void kvm_ldsm4_trans(u32 (&r)[4], const void* row) { emu_ldsm(r, row, true); }

inline u32 kvm_movm(u32 x) {
    static const char* name = "movmatrix";
    u64 in[1] = {x};
    return (u32)*emu_warp(name, in, 1, [](auto& in, auto& out) {
        auto at = [&](int i, int k) { return (u32)(in[i * 4 + k / 2][0] >> (k % 2 * 16)) & 0xffff; };
        for (int lane = 0; lane < 32; lane++) {
            int i = lane / 4, k = lane % 4 * 2;
            out[lane][0] = at(k, i) | at(k + 1, i) << 16;
        }
    });
}

template <bool BF16> inline float emu_half(u32 x) {
    return BF16 ? emu_float((u64)(x & 0xffff) << 16) : _cvtsh_ss((u16)x);
}

/// d + sum of products as Hopper's tensor cores add: what is 2^-25 of the largest term or less is cut off
/// each term, towards 0, and the sum is cut off to f32. Errors of long sums on an H200 are those of this.
inline float emu_sum(const double* terms, int n) {
    double most = 0, total = 0;
    for (int i = 0; i < n; i++) most = std::fmax(most, std::fabs(terms[i]));
    u64 bits;
    memcpy(&bits, &most, 8);
    i64 exponent = (i64)(bits >> 52) - 1023 - 25;
    if (most == 0 || exponent < -900 || exponent > 300) { // all zero, or not all finite
        for (int i = 0; i < n; i++) total += terms[i];
        return (float)total;
    }
    u64 unit_bits = (u64)(exponent + 1023) << 52, inverse_bits = (u64)(1023 - exponent) << 52;
    double unit, inverse;
    memcpy(&unit, &unit_bits, 8), memcpy(&inverse, &inverse_bits, 8);
    for (int i = 0; i < n; i++) {
        if (terms[i] != terms[i]) return (float)terms[i];
        total += (double)(i64)(terms[i] * inverse) * unit;
    }
    float sum = (float)total;
    return std::fabs((double)sum) > std::fabs(total) ? std::nextafter(sum, 0.f) : sum;
}

template <bool BF16> inline void kvm_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    static const char* name = BF16 ? "mma.bf16" : "mma.f16";
    u64 in[10];
    for (int i = 0; i < 4; i++) in[i] = a[i], in[6 + i] = emu_bits(d[i]);
    for (int i = 0; i < 2; i++) in[4 + i] = b[i];
    const u64* out = emu_warp(name, in, 10, [](auto& in, auto& out) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < 2; j++) {
                int g = lane / 4, k = lane % 4 * 2 + j;
                for (int r = 0; r < 4; r++)
                    a[g + r % 2 * 8][k + r / 2 * 8] = emu_half<BF16>((u32)in[lane][r] >> 16 * j);
                for (int r = 0; r < 2; r++)
                    b[k + r * 8][g] = emu_half<BF16>((u32)in[lane][4 + r] >> 16 * j);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                double terms[17];
                terms[16] = emu_float(in[lane][6 + r]);
                for (int k = 0; k < 16; k++)
                    terms[k] = (double)a[lane / 4 + r / 2 * 8][k] * b[k][lane % 4 * 2 + r % 2];
                out[lane][r] = emu_bits(emu_sum(terms, 17));
            }
    });
    for (int r = 0; r < 4; r++) d[r] = emu_float(out[r]);
}

inline u32 emu_bf16(float x) {
    u32 bits = (u32)emu_bits(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool BF16> inline u32 kvm_pack(float low, float high) {
    if (BF16) return emu_bf16(low) | emu_bf16(high) << 16;
    return (u32)_cvtss_sh(low, 0) | (u32)_cvtss_sh(high, 0) << 16;
}
inline float kvm_infinity() { return INFINITY; }
inline float kvm_exp2(float x) { return std::exp2(x); }
inline float kvm_max(float x, float y) { return std::fmax(x, y); }
inline float kvm_reciprocal(float x) { return 1 / x; }
inline float kvm_log2(float x) { return std::log2(x); }
inline u32 kvm_prmt(u32 low, u32 high, u32 which) {
    u64 bytes = low | (u64)high << 32;
    u32 x = 0;
    for (int i = 0; i < 4; i++) x |= (u32)(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return x;
}
inline u32 kvm_rotate_right(u32 x, u32 bits) { return x >> bits | x << (32 - bits) % 32; }
inline float kvm_add(float a, float b) { return a + b; }
inline float kvm_multiply(float a, float b) { return a * b; }
inline float kvm_divide(float a, float b) { return a / b; }
inline u32 kvm_and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
inline u32 kvm_fma2(u32 a, u32 b, u32 c) {
    auto one = [](u32 a, u32 b, u32 c) {
        // A product of two f16 is exact in f32.
        return (u32)_cvtss_sh((float)((double)(_cvtsh_ss(a) * _cvtsh_ss(b)) + _cvtsh_ss(c)), 0);
    };
    return one(a & 0xffff, b & 0xffff, c & 0xffff) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 kvm_mul2(u32 a, u32 b) { return kvm_fma2(a, b, 0x80008000); }
