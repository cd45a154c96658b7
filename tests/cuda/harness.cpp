// The shipped kernels as functions of a shared library; compiled by tests/cuda_kernels.rs.
#define KVM_EMU
#include "decode_f16.cu"

using Kernel = void (*)(const KvmDecode);
#define PAIR(type, d) kvm_decode_##type##_d##d##_g8, kvm_decode_##type##_d##d##_g16
static const Kernel KERNELS[] = {PAIR(f16, 64),  PAIR(f16, 128),  PAIR(f16, 256),
                                 PAIR(bf16, 64), PAIR(bf16, 128), PAIR(bf16, 256)};

/// Runs one launch, CTAs in a random order; answers NULL or what went wrong.
extern "C" const char* emu_decode(u32 variant, const KvmDecode* params, u32 grid, u32 threads,
                                  u32 smem, u32 seed) {
    Emu& e = emu();
    e.random.seed(seed);
    e.error = nullptr;
    e.grid = grid;
    e.kernel = [=] { KERNELS[variant](*params); };
    std::vector<u32> order(grid);
    for (u32 i = 0; i < grid; i++) order[i] = i;
    for (u32 i = grid; i > 1; i--) std::swap(order[i - 1], order[e.random() % i]);
    for (u32 block : order) {
        e.block = block;
        if (!e.error) e.run_block(threads, smem);
    }
    return e.error;
}
