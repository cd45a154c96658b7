// The kernels of one shipped source as a shared library; compiled by tests/common/emulator.rs.
#define KVM_EMU
#define KVM_TEXT(x) #x
#define KVM_QUOTED(x) KVM_TEXT(x)
#include "kvm_intrin.cuh"
#include KVM_QUOTED(KVM_SOURCE)

/// The kernel before the next launch writes what is at `at`.
extern "C" void emu_written_before(void* at, size_t bytes) {
    emu().written.push_back({at, std::vector<unsigned char>((char*)at, (char*)at + bytes)});
}

/// Runs one launch, CTAs in a random order; answers NULL or what went wrong.
extern "C" const char* emu_launch(const char* name, const void* params, size_t params_bytes,
                                  u32 grid, u32 threads, u32 smem, u32 seed) {
    const EmuKernel* kernel = EmuKernel::find(name);
    if (!kernel) return "there is no kernel of this name";
    if (kernel->threads != threads) return "the kernel wants another number of threads";
    if (kernel->params_bytes != params_bytes) return "the parameters of the kernel are another struct";
    Emu& e = emu();
    e.random.seed(seed);
    e.error = nullptr;
    e.grid = grid;
    e.kernel = [=] { kernel->run(params); };
    std::vector<u32> order(grid);
    for (u32 i = 0; i < grid; i++) order[i] = i;
    for (u32 i = grid; i > 1; i--) std::swap(order[i - 1], order[e.random() % i]);
    for (u32 block : order) {
        e.block = block;
        if (!e.error) e.run_block(threads, smem);
    }
    e.show_written();
    e.written.clear();
    return e.error;
}
