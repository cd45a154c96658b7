"""The CUDA driver and the kernels' structs through ctypes; needs no package."""

import ctypes
import gzip
import os

P, I64, U32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float

# KvmItem of kernels/kvm_attn.cuh; three more words are 0.
ITEM = ["token", "num_queries", "kv_head", "first_page", "len", "begin", "end", "sealed_end",
        "slot", "part", "num_parts", "ticket", "next"]


class Decode(ctypes.Structure):
    """KvmDecode of kernels/kvm_attn.cuh."""
    _fields_ = (
        [(name, P) for name in ["q", "o", "lse", "sinks", "pages", "items", "partials", "tickets",
                                "k", "v", "sealed_k", "sealed_v"]]
        + [(name, I64) for name in ["q_token", "q_head", "o_token", "o_head", "lse_token",
                                    "kv_block", "kv_head", "kv_token", "sealed_block",
                                    "sealed_head"]]
        + [("scale", F32), ("softcap", F32), ("window", U32), ("group", U32), ("block_size", U32),
           ("rotates", U32), ("is_bf16", U32)]
    )


def warps_of(dim, is_wide):
    """Warps of a CTA, as kvm_warps of kernels/kvm_attn.cuh."""
    return (2 if dim == 256 else 4) * (2 if is_wide else 1)


def smem_of(dim, columns, warps):
    """kvm_ring_bytes + kvm_meet_bytes + kvm_q_bytes of kernels/kvm_attn.cuh."""
    return warps * (2 * 64 * dim + columns * 68 * 4) + (2 * dim * columns if dim * columns >= 4096 else 0)


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", U32), ("pad", U32), ("value", U32 * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [(name, U32) for name in ["gx", "gy", "gz", "bx", "by", "bz", "smem"]] + [
        ("stream", P), ("attributes", ctypes.POINTER(LaunchAttribute)), ("num_attributes", U32)]


class Driver:
    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)

    def call(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name} answered {result}")

    def make_context(self):
        """The primary context of device 0, current; a framework that is loaded has done so."""
        context = P()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def attribute(self, which):
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, 0)
        return value.value

    def num_sms(self):
        return self.attribute(16)

    def load(self, path):
        """A module from a cubin or compressed PTX, as src/device/cuda/images.rs prepares it."""
        data = open(path, "rb").read()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
            if self.attribute(75) >= 9:  # compute capability
                data = data.replace(b"//sm_90 ", b"").replace(b".target sm_80", b".target sm_90")
        module = P()
        self.call("cuModuleLoadData", ctypes.byref(module), data + b"\0")
        return module

    def function(self, module, name, smem):
        function = P()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        self.call("cuFuncSetAttribute", function, 8, smem)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        return function

    def occupancy(self, function, threads, smem):
        blocks = ctypes.c_int()
        self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(blocks), function,
                  threads, ctypes.c_size_t(smem))
        return blocks.value

    def launch(self, function, grid, threads, smem, stream, params, is_dependent=False):
        """Queues a kernel that takes one struct; `is_dependent`: it waits for the one before itself."""
        attribute = LaunchAttribute(id=6)  # PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value[0] = 1
        config = LaunchConfig(gx=grid, gy=1, gz=1, bx=threads, by=1, bz=1, smem=smem, stream=stream,
                              attributes=ctypes.pointer(attribute), num_attributes=int(is_dependent))
        arguments = (P * 1)(ctypes.addressof(params))
        self.call("cuLaunchKernelEx", ctypes.byref(config), function, arguments, None)

    def allocate(self, num_bytes):
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(num_bytes, 16)))
        return pointer.value

    def upload(self, array):
        """A copy of a numpy array in device memory, in an allocation of its own."""
        pointer = self.allocate(array.nbytes)
        if array.nbytes:
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), P(array.ctypes.data),
                      ctypes.c_size_t(array.nbytes))
        return pointer

    def download(self, pointer, array):
        self.call("cuCtxSynchronize")
        self.call("cuMemcpyDtoH_v2", P(array.ctypes.data), ctypes.c_uint64(pointer),
                  ctypes.c_size_t(array.nbytes))
        return array

    def free(self, pointer):
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))


def image_of(folder, family):
    """What to load for a family of kernels: a cubin of `folder`, else the committed PTX."""
    cubin = os.path.join(folder, family + ".cubin")
    if folder and os.path.exists(cubin):
        return cubin
    gen = os.path.join(os.path.dirname(__file__), "..", "..", "kernels", "gen")
    return os.path.join(gen, family + ".ptx.gz")
