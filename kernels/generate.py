#!/usr/bin/env python3
"""Makes kernels/gen/*.ptx.gz, the PTX that the library embeds, from kernels/*.cu.

    pip install -r kernels/requirements.txt
    kernels/generate.py            writes what is stale
    kernels/generate.py --check    fails if the committed files differ from what the sources give
    kernels/generate.py --spills   assembles the committed PTX for every architecture and fails if
                                   a kernel spills registers or has instructions that no device runs

Needs no GPU and no CUDA toolkit: only libnvrtc, and ptxas and nvdisasm for --spills, from the wheels in
kernels/requirements.txt. NVRTC 12.1 writes PTX ISA 8.1, which every driver since CUDA 12.1 reads.
"""

import argparse
import ctypes
import glob
import gzip
import os
import re
import subprocess
import sys
import tempfile

FOLDER = os.path.dirname(os.path.abspath(__file__))
GEN = os.path.join(FOLDER, "gen")
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17", "-default-device"]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


def wheel_file(*path):
    """A file of an NVIDIA wheel, next to this Python's packages."""
    for folder in sys.path:
        for found in glob.glob(os.path.join(folder, "nvidia", *path)):
            return found
    return None


class Nvrtc:
    def __init__(self):
        name = os.environ.get("KVMGR_NVRTC") or wheel_file("cuda_nvrtc", "lib", "libnvrtc.so.12")
        if not name:
            raise SystemExit("SKIP: no libnvrtc.so.12; pip install -r kernels/requirements.txt")
        self.library = ctypes.CDLL(name)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) != (12, 1):
            raise SystemExit(f"NVRTC is {major.value}.{minor.value}, must be 12.1")

    def call(self, function, *arguments):
        result = getattr(self.library, function)(*arguments)
        if result != 0:
            raise RuntimeError(f"{function} answered {result}")

    def compile(self, name, source, headers):
        """PTX of a source whose includes are `headers` ({name: text}); no include path is used."""
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
        names = (ctypes.c_char_p * len(headers))(*[key.encode() for key in headers])
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(),
                  len(headers), texts, names)
        options = (ctypes.c_char_p * len(OPTIONS))(*[option.encode() for option in OPTIONS])
        result = self.library.nvrtcCompileProgram(program, len(OPTIONS), options)
        if result != 0:
            raise SystemExit(self.text(program, "nvrtcGetProgramLog"))
        return self.text(program, "nvrtcGetPTX")

    def text(self, program, function):
        size = ctypes.c_size_t()
        self.call(function + "Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(function, program, buffer)
        return buffer.value.decode()


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def committed(path):
    return gzip.decompress(open(path, "rb").read()).decode() if os.path.exists(path) else None


def for_architecture(ptx, architecture):
    """PTX as the library hands it to the driver of a device (src/device/cuda/images.rs)."""
    if int(architecture[3:]) < 90:
        return ptx
    return ptx.replace("//sm_90 ", "").replace(".target sm_80", ".target sm_90")


def generate(check):
    nvrtc = Nvrtc()
    headers = {os.path.basename(path): read(path) for path in glob.glob(FOLDER + "/*.cuh")}
    stale = set(glob.glob(GEN + "/*.ptx.gz"))
    bad = []
    for source in sorted(glob.glob(FOLDER + "/*.cu")):
        name = os.path.basename(source)
        target = os.path.join(GEN, name[:-3] + ".ptx.gz")
        stale.discard(target)
        ptx = nvrtc.compile(name, read(source), headers)
        if committed(target) == ptx:
            continue
        if check:
            bad.append(target)
            continue
        os.makedirs(GEN, exist_ok=True)
        with open(target, "wb") as file:
            file.write(gzip.compress(ptx.encode(), 9, mtime=0))
        print(f"{target}: {len(ptx)} bytes, {os.path.getsize(target)} compressed")
    for path in sorted(stale):
        bad.append(path) if check else os.remove(path)
    for path in bad:
        print(f"{path} is not what kernels/*.cu give; run kernels/generate.py")
    return not bad


def is_illegal(cubin):
    """Whether ptxas has put a 64-bit descriptor into an odd uniform register, as 13.0 and the driver
    of the same age do with some cp.async that have a cache hint: an illegal instruction on a device."""
    nvdisasm = os.environ.get("KVMGR_NVDISASM") or wheel_file("cu13", "bin", "nvdisasm")
    if not nvdisasm:
        return False
    listing = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    return re.search(r"desc\[UR\d*[13579]\]", listing.stdout) is not None


def spills():
    ptxas = os.environ.get("KVMGR_PTXAS") or wheel_file("cu13", "bin", "ptxas")
    if not ptxas:
        raise SystemExit("SKIP: no ptxas; pip install -r kernels/requirements.txt")
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(glob.glob(GEN + "/*.ptx.gz")):
            for architecture in ARCHITECTURES:
                name = os.path.basename(path)[:-len(".ptx.gz")]
                ptx = os.path.join(folder, f"{name}.{architecture}.ptx")
                with open(ptx, "w", encoding="utf-8") as file:
                    file.write(for_architecture(committed(path), architecture))
                jobs.append((ptx, architecture))
        ok = True
        for ptx, architecture in jobs:
            # Two processes at a time would be quicker; the order of the output matters more.
            cubin = ptx[:-len("ptx")] + "cubin"
            result = subprocess.run([ptxas, "-arch=" + architecture, "-v", "-o", cubin, ptx],
                                    capture_output=True, text=True)
            report = result.stderr + result.stdout
            if result.returncode != 0:
                raise SystemExit(report)
            kernel = "?"
            most = 0
            for line in report.splitlines():
                kernel = (re.findall(r"Compiling entry function '(\w+)'", line) or [kernel])[0]
                for count in re.findall(r"Used (\d+) registers", line):
                    most = max(most, int(count))
                for stored in re.findall(r"(\d+) bytes spill stores", line):
                    if int(stored) > 0:
                        ok = False
                        print(f"{kernel} on {architecture} spills {stored} bytes")
            if architecture == "sm_90" and is_illegal(cubin):
                ok = False
                print(f"{os.path.basename(ptx)}: a descriptor in an odd register; cp.async with a cache hint?")
            print(f"{os.path.basename(ptx)}: at most {most} registers")
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--spills", action="store_true")
    arguments = parser.parse_args()
    sys.exit(0 if (spills() if arguments.spills else generate(arguments.check)) else 1)


if __name__ == "__main__":
    main()
