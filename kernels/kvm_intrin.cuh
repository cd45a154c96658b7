// Everything that is PTX, one small function each; no NVIDIA header, so NVRTC needs no include path.
// Under KVM_EMU the same names come from tests/cuda/emu.hpp, which runs a kernel on the CPU.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(16) u32x4 {
    u32 x[4];
};
struct alignas(16) f32x4 {
    float x, y, z, w;
};

#ifdef KVM_EMU
#include "emu.hpp"
#else

/// Every kernel takes one struct by value, so that anybody who launches kernels by name can.
#define KVM_KERNEL(threads, ctas, name, Params)                                                   \
    extern "C" __global__ void __launch_bounds__(threads, ctas) name(const Params p)
#define KVM_DEVICE __device__ __forceinline__
#define KVM_DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]

KVM_DEVICE u32 kvm_tid() { return threadIdx.x; }
/// Keeps compilers from putting off what makes `x`, which may take more registers than `x` does.
KVM_DEVICE void kvm_settle(u32& x) { asm volatile("" : "+r"(x)); }
KVM_DEVICE u32 kvm_bid() { return blockIdx.x; }
KVM_DEVICE u32 kvm_grid() { return gridDim.x; }
KVM_DEVICE void kvm_sync() { __syncthreads(); }
KVM_DEVICE void kvm_syncwarp() { __syncwarp(); }
/// What this thread has seen and written before is seen by who sees what it writes after. Acquire and
/// release only: __threadfence is sequentially consistent, which takes longer and nobody needs.
KVM_DEVICE void kvm_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
KVM_DEVICE u32 kvm_atomic_add(u32* p, u32 x) { return atomicAdd(p, x); }

/// What lane `from` has.
KVM_DEVICE u32 kvm_shfl(u32 x, u32 from) { return __shfl_sync(0xffffffffu, x, from); }
KVM_DEVICE u32 kvm_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
KVM_DEVICE u32 kvm_popc(u32 x) { return __popc(x); }
/// Programmatic dependent launch: lets the next kernel start, and waits for the results of the one
/// before. PTX for older devices cannot have these instructions; whoever loads it for sm_90 or newer
/// takes away the mark of a comment (src/device/cuda/images.rs).
KVM_DEVICE void kvm_let_next_start() {
    asm volatile("//sm_90 griddepcontrol.launch_dependents;" ::: "memory");
}
KVM_DEVICE void kvm_wait_for_previous() {
    asm volatile("//sm_90 griddepcontrol.wait;" ::: "memory");
}

KVM_DEVICE float kvm_shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

/// Reads past L1: what other CTAs wrote before a fence is seen.
KVM_DEVICE void kvm_ld_cg4(float (&x)[4], const float* p) {
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "l"(p)
                 : "memory");
}

/// The logarithm of a power of two.
KVM_DEVICE u32 kvm_log2_of(u32 x) { return 31 - __clz(x); }

KVM_DEVICE u32 kvm_smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }

/// 16 bytes from global to shared memory, or 16 zero bytes; visible after commit and wait.
KVM_DEVICE void kvm_cp_async16(void* to, const void* from, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(kvm_smem_addr(to)),
                 "l"(from), "r"(is_valid ? 16 : 0)
                 : "memory");
}
/// The same with both addresses OFFSET bytes further, which costs no instruction.
template <int OFFSET> KVM_DEVICE void kvm_cp_async16_at(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0+%2], [%1+%2], 16;" ::"r"(kvm_smem_addr(to)), "l"(from),
                 "n"(OFFSET)
                 : "memory");
}
/// Marks memory that is read once: it leaves the second-level cache first.
KVM_DEVICE u64 kvm_read_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
KVM_DEVICE void kvm_cp_async16(void* to, const void* from, bool is_valid, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                     kvm_smem_addr(to)),
                 "l"(from), "r"(is_valid ? 16 : 0), "l"(policy)
                 : "memory");
}
KVM_DEVICE void kvm_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> KVM_DEVICE void kvm_cp_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
KVM_DEVICE void kvm_ldsm4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(kvm_smem_addr(row))
                 : "memory");
}
KVM_DEVICE void kvm_ldsm4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(kvm_smem_addr(row))
                 : "memory");
}
/// Transposes an 8x8 matrix of 16-bit elements held by a warp.
KVM_DEVICE u32 kvm_movm(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#define KVM_MMA(type)                                                                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                           \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

/// d += a b, a [16, 16] by rows, b [16, 8] by columns.
template <bool BF16> KVM_DEVICE void kvm_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (BF16) {
        KVM_MMA("bf16");
    } else {
        KVM_MMA("f16");
    }
}

/// Two floats as 16-bit elements, `low` in the lower half.
template <bool BF16> KVM_DEVICE u32 kvm_pack(float low, float high) {
    u32 x;
    if constexpr (BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    }
    return x;
}

KVM_DEVICE u32 kvm_bits(float x) { return __float_as_uint(x); }
KVM_DEVICE float kvm_float(u32 bits) { return __uint_as_float(bits); }
KVM_DEVICE float kvm_half_to_float(u32 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
}
/// Four of the bytes of `low` (0 to 3) and `high` (4 to 7), one for each nibble of `which`.
KVM_DEVICE u32 kvm_prmt(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }
KVM_DEVICE u32 kvm_rotate_right(u32 x, u32 bits) { return __funnelshift_r(x, x, bits); }
/// Each rounded by itself, so that nothing is fused.
KVM_DEVICE float kvm_add(float a, float b) { return __fadd_rn(a, b); }
KVM_DEVICE float kvm_multiply(float a, float b) { return __fmul_rn(a, b); }
KVM_DEVICE float kvm_divide(float a, float b) { return __fdiv_rn(a, b); }
/// (a & b) | c, which compilers make two instructions of where b and c are constants.
KVM_DEVICE u32 kvm_and_or(u32 a, u32 b, u32 c) {
    u32 x;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}
/// Products of two pairs of f16.
KVM_DEVICE u32 kvm_mul2(u32 a, u32 b) {
    u32 x;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
/// a b + c for two pairs of f16.
KVM_DEVICE u32 kvm_fma2(u32 a, u32 b, u32 c) {
    u32 x;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}
KVM_DEVICE float kvm_infinity() { return __int_as_float(0x7f800000); }
KVM_DEVICE float kvm_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/// The larger one; passes over NaN.
KVM_DEVICE float kvm_max(float x, float y) {
    float z;
    asm("max.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
/// 1 / x to the last bit or so; 0 if x is infinite.
KVM_DEVICE float kvm_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KVM_DEVICE float kvm_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

/// The maximum over lanes whose numbers differ in the bits FROM to END / 2.
template <int FROM, int END> KVM_DEVICE float kvm_max_over(float x) {
#pragma unroll
    for (int mask = FROM; mask < END; mask *= 2) {
        float other = kvm_shfl_xor(x, mask);
        x = other > x ? other : x;
    }
    return x;
}

/// The sum and the maximum over the 8 lanes that hold the same columns of a result.
KVM_DEVICE float kvm_sum_rows(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) x += kvm_shfl_xor(x, mask);
    return x;
}
KVM_DEVICE float kvm_max_rows(float x) { return kvm_max_over<4, 32>(x); }
/// The maximum over the lanes of a warp.
KVM_DEVICE float kvm_max_lanes(float x) { return kvm_max_rows(kvm_max_over<1, 4>(x)); }

/// What makes a rotation of D elements orthonormal.
template <int D> KVM_DEVICE constexpr float kvm_rotation_factor() {
    return D == 64 ? 0.125f : D == 128 ? 0.0883883461f : 0.0625f;
}
