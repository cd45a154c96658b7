#!/usr/bin/env python3
"""Attention over prompts on a GPU: checks it against float64, then times it beside torch.

    benches/gpu/prefill.py            about a minute

Timed: one layer, bf16, head_dim 128, blocks of 16 tokens in random order, causal. TFLOP/s count
4 * head_dim for each pair of a query and a key that it sees. torch reads dense K and V.
"""

import argparse
import heapq
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench import relative_error, time_graph
from driver import Decode, Driver, image_of
from plan import deal

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def smem_of(dim):
    """kvm_prefill_bytes of kernels/prefill.cu."""
    return (256 if dim == 256 else 512) * dim + 64


def items_of(sequences, kv_heads, group, dim, block, grid):
    """Tiles of the queries of (length, queries) sequences, the longest first, dealt out by their work."""
    tile, tiles, token, page = (64 if dim == 256 else 128) // group, [], 0, 0
    for length, queries in sequences:
        for first in range(0, queries, tile):
            count = min(tile, queries - first)
            seen = length - queries + first + count
            tiles += [[token + first, count, head, page, seen, 0, length] + [0] * 9
                      for head in range(kv_heads)]
        token += queries
        page += -(-length // block)
    tiles.sort(key=lambda item: -item[4])
    ctas, loads = [[] for _ in range(grid)], [(0, i) for i in range(grid)]
    for item in tiles:
        load, i = heapq.heappop(loads)
        ctas[i].append(item)
        heapq.heappush(loads, (load + item[4] + 64, i))
    return deal(ctas)


class Prefill:
    """A batch with its plan."""

    def __init__(self, driver, module, dtype, dim, sequences, kv_heads, group, block, window=0,
                 softcap=0.0):
        self.driver, self.dim, self.sequences, self.smem = driver, dim, sequences, smem_of(dim)
        self.function = driver.function(module, f"kvm_prefill_{dtype}_d{dim}", self.smem)
        self.grid = driver.num_sms() * driver.occupancy(self.function, 128, self.smem)
        q_heads, pages = kv_heads * group, sum(-(-length // block) for length, _ in sequences)
        tokens = sum(queries for _, queries in sequences)
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=DTYPES[dtype])
        self.q = make(tokens, q_heads, dim)
        self.dense = [[make(kv_heads, length, dim) for _ in range(2)] for length, _ in sequences]
        order = torch.randperm(pages + 1, device="cuda")[:pages]
        pools = torch.full((2, pages + 1, kv_heads, block, dim), float("nan"), device="cuda",
                           dtype=DTYPES[dtype])
        first = 0
        for (length, _), sides in zip(sequences, self.dense):
            count = -(-length // block)
            for pool, dense in zip(pools, sides):
                padded = torch.full((kv_heads, count * block, dim), float("nan"), device="cuda",
                                    dtype=dense.dtype)
                padded[:, :length] = dense
                blocks = padded.view(kv_heads, count, block, dim).transpose(0, 1)
                pool[order[first:first + count]] = blocks
            first += count
        items = items_of(sequences, kv_heads, group, dim, block, self.grid)
        self.keep = [pools, order.to(torch.int32), torch.from_numpy(items.view(np.int32)).cuda()]
        self.out = torch.full_like(self.q, float("nan"))
        self.lse = torch.full((tokens, q_heads), float("nan"), device="cuda")
        self.params = Decode(
            q=self.q.data_ptr(), o=self.out.data_ptr(), lse=self.lse.data_ptr(),
            pages=self.keep[1].data_ptr(), items=self.keep[2].data_ptr(),
            k=pools[0].data_ptr(), v=pools[1].data_ptr(), q_token=q_heads * dim, q_head=dim,
            o_token=q_heads * dim, o_head=dim, lse_token=q_heads, kv_block=kv_heads * block * dim,
            kv_head=block * dim, kv_token=dim, scale=1 / math.sqrt(dim), softcap=softcap,
            window=window, group=group, block_size=block)

    def __call__(self, _=0):
        stream = torch.cuda.current_stream().cuda_stream
        self.driver.launch(self.function, self.grid, 128, self.smem, stream, self.params)


def expected(run, group, window, softcap):
    """Outputs and log-sum-exp in float64."""
    outs, logs, token = [], [], 0
    for (length, queries), (k, v) in zip(run.sequences, run.dense):
        q = run.q[token:token + queries].double().transpose(0, 1)
        token += queries
        k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
        x = q @ k.transpose(1, 2) / math.sqrt(run.dim)
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        last = torch.arange(length - queries, length, device="cuda")[:, None]
        t = torch.arange(length, device="cuda")[None]
        hidden = (t > last) | ((t <= last - window) if window else False)
        x = x.masked_fill(hidden, -math.inf)
        outs.append((torch.softmax(x, -1) @ v).transpose(0, 1))
        logs.append(torch.logsumexp(x, -1).transpose(0, 1))
    return torch.cat(outs), torch.cat(logs)


def check(driver, module):
    sequences = [(1, 1), (15, 15), (16, 16), (17, 17), (300, 300), (700, 129), (1000, 3)]
    cases = [(("f16", "bf16")[g % 2], (64, 128, 256)[i % 3], g, (16, 32, 64)[i // 2 % 3], 0, 0.0)
             for i, g in enumerate((1, 2, 3, 4, 5, 7, 8, 16))]
    cases += [("bf16", 128, 4, 16, 50, 0.0), ("f16", 128, 8, 16, 0, 2.0), ("f16", 128, 8, 32, 0, 0.0)]
    bad = 0
    for dtype, dim, group, block, window, softcap in cases:
        run = Prefill(driver, module, dtype, dim, sequences, 2, group, block, window, softcap)
        run()
        torch.cuda.synchronize()
        out, lse = expected(run, group, window, softcap)
        error, worst = relative_error(run.out, out), (run.lse - lse).abs().max().item()
        ok = error < (4e-3 if dtype == "bf16" else 1e-3) and worst < 1e-3
        bad += not ok
        print(f"{'ok ' if ok else 'BAD'} {dtype} d{dim} group {group} block {block} window {window} "
              f"softcap {softcap}: O {error:.1e} LSE {worst:.1e}", flush=True)
    return bad


def sdpa(q, k, v, backend):
    """Queries are the last rows of K and V."""
    def call(_):
        with sdpa_kernel(backend):
            if q.shape[2] == k.shape[2]:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mask = causal_lower_right(q.shape[2], k.shape[2])
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return call


def measure(driver, module, batch, length, queries, q_heads, kv_heads):
    run = Prefill(driver, module, "bf16", 128, [(length, queries)] * batch, kv_heads,
                  q_heads // kv_heads, 16)
    pairs = batch * q_heads * (queries * length - queries * (queries - 1) // 2)
    tera = lambda us: 4 * 128 * pairs / us / 1e6
    text = f"B {batch} S {length:6} queries {queries:6} heads {q_heads}/{kv_heads}: "
    q = run.q.view(batch, queries, q_heads, 128).transpose(1, 2)
    k, v = (torch.stack([dense[side] for dense in run.dense]) for side in range(2))
    for name, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]:
        try:
            us = time_graph(sdpa(q, k, v, backend), 5)
            text += f"{name} {us:9.1f} us {tera(us):4.0f} TFLOP/s, "
        except RuntimeError as error:
            text += f"{name} failed ({str(error)[:60]}), "
    us = time_graph(run, 5)
    print(f"{text}ours {us:9.1f} us {tera(us):4.0f} TFLOP/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", default="", help="folder of cubins; default: the committed PTX")
    arguments = parser.parse_args()
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    driver = Driver()
    module = driver.load(image_of(arguments.cubins, "prefill"))
    if check(driver, module):
        sys.exit(1)
    print(torch.cuda.get_device_name())
    for point in [(4, 2048, 2048, 32, 8), (1, 8192, 8192, 32, 8), (1, 32768, 32768, 32, 8),
                  (1, 8192, 8192, 32, 32), (1, 32768, 2048, 32, 8), (8, 8192, 512, 32, 8)]:
        measure(driver, module, *point)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
