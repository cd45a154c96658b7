#!/usr/bin/env python3
"""Times decoding attention on a GPU beside torch, and prints one table (benches/GPU.md).

    benches/gpu/run.sh            checks, then times the whole grid; under ten minutes

A call is one layer: one query for each of B sequences of S tokens, head_dim 128 (or --head-dim), blocks
of 16 tokens in random order. Calls are replayed from a CUDA graph and go round buffers of at least four times the
L2 cache, so that nothing is read from it. `copy` is a device-to-device copy, bytes read and written.
"""

import argparse
import json
import math
import os
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import layout
from driver import Decode, Driver, image_of, smem_of, warps_of
from plan import plan

D, BLOCK, L2 = 128, 16, 64 << 20
HEADS = [(32, 8), (28, 4), (64, 8)]
BATCHES, LENGTHS = [1, 4, 16, 64, 256], [1024, 4096, 16384, 65536]


def time_graph(call, count, repeats=5):
    """Microseconds of a call: the median of `repeats` replays of a graph of calls 0 to count - 1."""
    torch.cuda.synchronize()  # what calls read was made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(count, 3)):
            call(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            call(i)
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times[1:])


def copy_bandwidth():
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: a copy in a graph would be left to a copy engine.
    us = time_graph(lambda _: torch.mul(source, 1.0, out=target), 5)
    return 2 * source.nbytes / us / 1e6


class Point:
    """Buffers of one point of the grid: dense K and V, and the same in blocks of random order."""

    def __init__(self, batch, length, q_heads, kv_heads):
        self.batch, self.length, self.q_heads, self.kv_heads = batch, length, q_heads, kv_heads
        self.bytes = batch * length * kv_heads * D * 4
        self.buffers = 1 if self.bytes > 2 << 30 else min(32, max(3, -(-4 * L2 // self.bytes)))
        rows = self.buffers * batch
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        self.q = make(rows, q_heads, 1, D)
        self.k, self.v = (make(rows, kv_heads, length, D) for _ in range(2))
        self.blocks = length // BLOCK
        self.order = torch.randperm(rows * self.blocks, device="cuda")
        self.pools = []
        for dense in (self.k, self.v):
            pool = torch.empty(rows * self.blocks, kv_heads, BLOCK, D, device="cuda",
                               dtype=torch.bfloat16)
            for row in range(rows):  # little by little: the copy needs memory too
                blocks = dense[row].view(kv_heads, self.blocks, BLOCK, D).transpose(0, 1)
                pool[self.order[row * self.blocks:(row + 1) * self.blocks]] = blocks
            self.pools.append(pool)
        self.pages = self.order.to(torch.int32)
        self.out = torch.full_like(self.q, float("nan"))

    def part(self, tensor, i):
        i %= self.buffers
        return tensor[i * self.batch:(i + 1) * self.batch]


class Launched:
    """A kernel with the parameters of each of its buffers; call `i` uses buffer `i`."""

    is_dependent, threads = True, 128

    def __call__(self, i):
        stream = torch.cuda.current_stream().cuda_stream
        params = self.params[i % len(self.params)]
        self.driver.launch(self.function, self.grid, self.threads, self.smem, stream, params,
                           self.is_dependent)


class Ours(Launched):
    """A decode kernel with its plan for a point."""

    def __init__(self, driver, module, point, is_wide=None, is_dependent=True):
        group = point.q_heads // point.kv_heads
        if is_wide is None:  # as the library chooses
            is_wide = 2 * point.batch * point.kv_heads < 3 * driver.num_sms()
        columns, warps = 16 if group > 8 else 8, warps_of(D, is_wide)
        self.driver, self.is_dependent = driver, is_dependent
        self.threads, self.smem = 32 * warps, smem_of(D, columns, warps)
        name = f"kvm_decode_bf16_d{D}_g{columns}{'_wide' if is_wide else ''}"
        self.function = driver.function(module, name, self.smem)
        self.grid = driver.num_sms() * driver.occupancy(self.function, self.threads, self.smem)
        items, slots = plan([point.length] * point.batch, point.kv_heads, group, self.grid, BLOCK,
                                   16 * warps)
        self.items = torch.from_numpy(items.view(np.int32)).cuda()
        self.partials = torch.empty(slots * columns * (D + 4), device="cuda")
        self.tickets = torch.zeros(point.batch * point.kv_heads, dtype=torch.int32, device="cuda")
        self.params = []
        for i in range(point.buffers):
            q, o = point.part(point.q, i), point.part(point.out, i)
            pages = point.pages[i * point.batch * point.blocks:]
            self.params.append(Decode(
                q=q.data_ptr(), o=o.data_ptr(), pages=pages.data_ptr(), items=self.items.data_ptr(),
                partials=self.partials.data_ptr(), tickets=self.tickets.data_ptr(),
                k=point.pools[0].data_ptr(), v=point.pools[1].data_ptr(),
                q_token=point.q_heads * D, q_head=D, o_token=point.q_heads * D, o_head=D,
                kv_block=point.kv_heads * BLOCK * D, kv_head=BLOCK * D, kv_token=D,
                scale=1 / math.sqrt(D), group=group, block_size=BLOCK))


class Quantized(Launched):
    """The same over sealed blocks, which repeat a few random ones: their content costs no time."""

    def __init__(self, driver, module, point, name):
        group, heads = point.q_heads // point.kv_heads, point.kv_heads
        columns, warps = 16 if group > 8 else 8, warps_of(D, False)
        self.driver, self.threads, self.smem = driver, 32 * warps, layout.smem_of(name, D, columns, warps)
        self.function = driver.function(module, f"kvm_decode_{name}_d{D}_g{columns}", self.smem)
        self.grid = driver.num_sms() * driver.occupancy(self.function, self.threads, self.smem)
        unit = warps * layout.FORMATS[name][1]
        items, slots = plan([point.length] * point.batch, heads, group, self.grid, 64, unit, 64)
        self.items = torch.from_numpy(items.view(np.int32)).cuda()
        self.partials = torch.empty(slots * columns * (D + 4), device="cuda")
        self.tickets = torch.zeros(point.batch * heads, dtype=torch.int32, device="cuda")
        blocks = point.length // 64
        rows = point.batch * max(point.buffers, 3)  # smaller than dense ones: more of them
        random = np.random.default_rng(0)
        cell = lambda: np.concatenate([layout.side(name, random.standard_normal((64, D)), is_key)[0]
                                       for is_key in (True, False)])
        some = torch.from_numpy(np.stack([np.concatenate([cell() for _ in range(heads)])
                                          for _ in range(4)])).cuda()
        self.pool = some.repeat(rows * blocks // 4 + 1, 1)
        self.pages = torch.randperm(rows * blocks, device="cuda").to(torch.int32)
        self.bytes = point.batch * blocks * some.shape[1]
        k_bytes, v_bytes = (layout.side_bytes(name, D, is_key) for is_key in (True, False))
        self.params = []
        for i in range(rows // point.batch):
            q, o = point.part(point.q, i), point.part(point.out, i)
            self.params.append(Decode(
                q=q.data_ptr(), o=o.data_ptr(), pages=self.pages[i * point.batch * blocks:].data_ptr(),
                items=self.items.data_ptr(), partials=self.partials.data_ptr(),
                tickets=self.tickets.data_ptr(), sealed_k=self.pool.data_ptr(),
                sealed_v=self.pool.data_ptr() + k_bytes, q_token=point.q_heads * D, q_head=D,
                o_token=point.q_heads * D, o_head=D, sealed_block=some.shape[1],
                sealed_head=k_bytes + v_bytes, scale=1 / math.sqrt(D), group=group, block_size=64,
                is_bf16=1))


def sdpa(point, backend):
    def call(i):
        q, k, v = (point.part(tensor, i) for tensor in (point.q, point.k, point.v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return call


def flex(point):
    """flex_attention, which torch compiles for each shape."""
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention)
    def call(i):
        q, k, v = (point.part(tensor, i) for tensor in (point.q, point.k, point.v))
        return compiled(q, k, v, enable_gqa=True)
    return call


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def measure(driver, variants, formats, batch, length, heads, baselines):
    point = Point(batch, length, *heads)
    count = max(20, point.buffers) if point.bytes < 1 << 30 else 10
    row = {"B": batch, "S": length, "heads": "%d/%d" % heads, "KV MB": point.bytes / 1e6}
    expected = None
    for name, backend in baselines:
        try:
            call = flex(point) if backend is None else sdpa(point, backend)
            expected = call(0)
            row[name] = time_graph(call, count)
        except (RuntimeError, ImportError) as error:
            row[name + " failed"] = str(error)[:200]
    for name, (module, options) in variants.items():
        ours = Ours(driver, module, point, **options)
        point.out.fill_(float("nan"))
        ours(0)
        torch.cuda.synchronize()
        if expected is not None:
            row[name + " error"] = relative_error(point.part(point.out, 0), expected)
        row[name] = time_graph(ours, count)
    for name in formats:
        ours = Quantized(driver, formats[name], point, name)
        point.out.fill_(float("nan"))
        row[name] = time_graph(ours, max(count, len(ours.params)))
        row[name + " MB"] = ours.bytes / 1e6
        assert point.part(point.out, 0).isfinite().all(), f"{name} left something out"
        del ours
        torch.cuda.empty_cache()
    return row


def main():
    global D
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", default="", help="folder of cubins; default: the committed PTX")
    parser.add_argument("--variants", action="store_true", help="time what the library would not choose")
    parser.add_argument("--points", default="", help="BxS,..; default: the whole grid")
    parser.add_argument("--formats", default=",".join(layout.FORMATS), help="of sealed blocks")
    parser.add_argument("--flex", action="store_true", help="flex_attention too, which compiles first")
    parser.add_argument("--json", default="")
    parser.add_argument("--heads", type=int, default=3, help="how many of the head counts")
    parser.add_argument("--limit", type=float, default=9e9, help="largest KV in bytes")
    parser.add_argument("--head-dim", type=int, default=D, choices=[64, 128, 256])
    arguments = parser.parse_args()
    D = arguments.head_dim
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    driver = Driver()
    module = driver.load(image_of(arguments.cubins, "decode_f16"))
    variants = {"ours": (module, {})}
    if arguments.variants:
        variants |= {"narrow": (module, {"is_wide": False}), "wide": (module, {"is_wide": True}),
                     "alone": (module, {"is_dependent": False})}
    formats = {}
    if arguments.formats:
        quantized = driver.load(image_of(arguments.cubins, "decode_q"))
        formats = {name: quantized for name in arguments.formats.split(",")}
    copy = copy_bandwidth()
    print(torch.cuda.get_device_name(), "driver", torch.version.cuda, f"copy {copy:.2f} TB/s")
    baselines = [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]
    if arguments.flex:
        baselines.append(("flex", None))
    rows = []
    for heads in HEADS[:arguments.heads]:
        for batch in BATCHES:
            for length in LENGTHS:
                if arguments.points and f"{batch}x{length}" not in arguments.points.split(","):
                    continue
                if batch * length * heads[1] * D * 4 > arguments.limit:
                    continue
                row = measure(driver, variants, formats, batch, length, heads, baselines)
                row["copy"] = copy
                rows.append(row)
                best = min((row[name] for name, _ in baselines if name in row), default=float("nan"))
                text = f"B {batch:3} S {length:5} {row['heads']:>5} KV {row['KV MB']:7.0f} MB "
                text += " ".join(f"{name} {row.get(name, float('nan')):8.1f}" for name, _ in baselines)
                for name in variants:
                    share = row["KV MB"] / row[name] / copy
                    text += (f" | {name} {row[name]:8.1f} us {share:4.0%} of copy, {best / row[name]:.2f}x"
                             f" err {row.get(name + ' error', float('nan')):.0e}")
                for name in formats:
                    share = row[name + " MB"] / row[name] / copy
                    text += f" | {name} {row[name]:.1f} us {share:.0%} {row['ours'] / row[name]:.2f}x"
                print(text, flush=True)
                torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
