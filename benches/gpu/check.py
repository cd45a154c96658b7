#!/usr/bin/env python3
"""Decoding on the GPU against attention in float64, on small ragged shapes. Needs numpy only, so
that it runs quickly under compute-sanitizer:

    compute-sanitizer --tool memcheck benches/gpu/check.py
"""

import argparse
import sys

import numpy as np

import layout
from driver import Decode, Driver, image_of, smem_of, warps_of
from plan import plan

NAN = 0x7fff
LENS = [0, 1, 15, 16, 17, 65, 100, 193, 700]


def to_bits(x, dtype):
    if dtype == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float(bits, dtype):
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def reference(q, k, v, window, softcap, sinks):
    """q [group, D], k and v [n, D]: outputs and log-sum-exp."""
    if window:
        k, v = k[-window:], v[-window:]
    x = q @ k.T / np.sqrt(q.shape[1])
    if softcap:
        x = softcap * np.tanh(x / softcap)
    top = np.max(np.concatenate([x, sinks[:, None]], 1), 1, keepdims=True) if len(k) else sinks[:, None]
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(x - top)
    total = weights.sum(1, keepdims=True) + np.exp(sinks[:, None] - top)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(weights @ v / total), (top + np.log(total))[:, 0]


def run_case(driver, function, random, dtype, dim, group, block, window, softcap, has_sinks, is_wide,
             grid):
    heads = 2
    warps = warps_of(dim, is_wide)
    columns = 16 if group > 8 else 8
    items, slots = plan(LENS, heads, group, grid, block, 16 * warps)
    num_pages = [-(-n // block) for n in LENS]
    order = random.permutation(sum(num_pages) + 3)
    pool = np.full((2, len(order), heads, block, dim), NAN, np.uint16)
    first, dense = 0, []
    for n, pages in zip(LENS, num_pages):
        data = to_bits(random.standard_normal((2, heads, n, dim)), dtype)
        for t in range(n):
            pool[:, order[first + t // block], :, t % block] = data[:, :, t]
        dense.append(to_float(data, dtype))
        first += pages
    q = to_bits(random.standard_normal((len(LENS), heads * group, dim)), dtype)
    sinks = random.standard_normal(heads * group).astype(np.float32)
    o, lse = np.full_like(q, NAN), np.full(q.shape[:2], np.nan, np.float32)
    device = {name: driver.upload(array) for name, array in {
        "q": q, "o": o, "lse": lse, "pages": order.astype(np.uint32), "items": items,
        "tickets": np.zeros(len(LENS) * heads, np.uint32),
        "partials": np.full(slots * columns * (dim + 4), np.nan, np.float32),
        "k": pool[0], "v": pool[1], "sinks": sinks}.items()}
    params = Decode(**device, q_token=heads * group * dim, q_head=dim,
                    o_token=heads * group * dim, o_head=dim, lse_token=heads * group,
                    kv_block=heads * block * dim, kv_head=block * dim, kv_token=dim,
                    scale=1 / np.sqrt(dim), softcap=softcap, window=window, group=group,
                    block_size=block)
    if not has_sinks:
        params.sinks = None
    for _ in range(2):  # the second finds the tickets as the first has left them
        driver.launch(function, grid, warps * 32, smem_of(dim, columns, warps), 0, params, True)
    driver.download(device["o"], o)
    driver.download(device["lse"], lse)
    for pointer in device.values():
        driver.free(pointer)
    error, norm, worst = 0.0, 0.0, 0.0
    for s, (k, v) in enumerate(dense):
        for h in range(heads):
            rows = slice(h * group, (h + 1) * group)
            sink = sinks[rows].astype(np.float64) if has_sinks else np.full(group, -np.inf)
            out, log = reference(to_float(q[s, rows], dtype), k[h], v[h], window, softcap, sink)
            error += np.sum((to_float(o[s, rows], dtype) - out) ** 2)
            norm += np.sum(out ** 2)
            same = np.isneginf(log) & np.isneginf(lse[s, rows])
            worst = max(worst, np.max(np.where(same, 0, np.abs(log - np.where(same, 0, lse[s, rows])))))
    return np.sqrt(error / norm), worst


def run_quant_case(driver, function, random, name, dtype, dim, group, queries, window, softcap, grid,
                   lens=LENS, gain=1.0):
    """As run_case, for sealed blocks of 64 tokens with open rows behind them; `gain` multiplies Q."""
    heads, columns, block = 2, 16 if group * queries > 8 else 8, 64
    warps = warps_of(dim, False)
    items, slots = plan(lens, heads, group, grid, block, 64 * warps, 64)
    items[:, 0] *= queries
    items[items[:, 1] > 0, 1] = queries
    num_pages = [-(-n // block) for n in lens]
    order = random.permutation(sum(num_pages) + 3)
    pool = np.full((2, len(order), heads, block, dim), NAN, np.uint16)
    sizes = [layout.side_bytes(name, dim, is_key) for is_key in (True, False)]
    sealed = np.full((len(order), heads, sum(sizes)), 0xff, np.uint8)
    first, dense = 0, []
    for n, pages in zip(lens, num_pages):
        data = to_float(to_bits(random.standard_normal((2, heads, n, dim)), dtype), dtype)
        for start in range(0, n - n % block, block):
            page = order[first + start // block]
            for h in range(heads):
                for i in range(2):
                    part = slice(sizes[0] * i, sizes[0] * i + sizes[i])
                    sealed[page, h, part], data[i, h, start:start + block] = layout.side(
                        name, data[i, h, start:start + block], i == 0)
        for t in range(n - n % block, n):
            pool[:, order[first + t // block], :, t % block] = to_bits(data[:, :, t], dtype)
        dense.append(data)
        first += pages
    q = to_bits(gain * random.standard_normal((len(lens) * queries, heads * group, dim)), dtype)
    o = np.full_like(q, NAN)
    device = {name: driver.upload(array) for name, array in {
        "q": q, "o": o, "pages": order.astype(np.uint32), "items": items,
        "tickets": np.zeros(len(lens) * heads, np.uint32),
        "partials": np.full(slots * columns * (dim + 4), np.nan, np.float32),
        "k": pool[0], "v": pool[1], "sealed_k": sealed}.items()}
    params = Decode(**device, q_token=heads * group * dim, q_head=dim, o_token=heads * group * dim,
                    o_head=dim, kv_block=heads * block * dim, kv_head=block * dim, kv_token=dim,
                    sealed_block=heads * sum(sizes), sealed_head=sum(sizes), scale=1 / np.sqrt(dim),
                    softcap=softcap, window=window, group=group, block_size=block,
                    is_bf16=dtype == "bf16")
    params.sealed_v = params.sealed_k + sizes[0]
    for _ in range(2):
        driver.launch(function, grid, 32 * warps, layout.smem_of(name, dim, columns, warps), 0, params, True)
    driver.download(device["o"], o)
    for pointer in device.values():
        driver.free(pointer)
    error, norm = 0.0, 0.0
    for s, (k, v) in enumerate(dense):
        for i in range(queries):
            seen = max(0, len(k[0]) - (queries - 1 - i))
            for h in range(heads):
                at = (s * queries + i, slice(h * group, (h + 1) * group))
                out, _ = reference(to_float(q[at], dtype), k[h][:seen], v[h][:seen], window, softcap,
                                   np.full(group, -np.inf))
                error += np.sum((to_float(o[at], dtype) - out) ** 2)
                norm += np.sum(out ** 2)
    return np.sqrt(error / norm)


def check_quantized(driver, random, folder, is_quick):
    module, bad = driver.load(image_of(folder, "decode_q")), 0
    for i, name in enumerate(layout.FORMATS):
        cases = [(4, 1, 128), (8, 1, 256), (5, 3, 64), (16, 1, 256), (8, 1, 128), (16, 1, 64), (5, 3, 256)]
        for j, (group, queries, dim) in enumerate(cases[:2 if is_quick else None]):
            dtype = ("f16", "bf16")[(i + j) % 2]
            columns = 16 if group * queries > 8 else 8
            kernel = f"kvm_decode_{name}_d{dim}_g{columns}"
            smem = layout.smem_of(name, dim, columns, warps_of(dim, False))
            function = driver.function(module, kernel, smem)
            for window, softcap, grid in [(0, 0.0, 3), (90, 0.0, 64), (0, 2.0, 3)]:
                error = run_quant_case(driver, function, random, name, dtype, dim, group, queries,
                                       window, softcap, grid)
                ok = error < (4e-3 if dtype == "bf16" else 1e-3)
                bad += not ok
                print(f"{'ok ' if ok else 'BAD'} {kernel} {dtype} group {group} queries {queries} window "
                      f"{window} softcap {softcap} grid {grid}: O {error:.1e}")
        # Weights are nearly equal, so that values of mean 0 nearly cancel.
        for dim, group in [(128, 8), (256, 8), (256, 16)] if not is_quick else []:
            kernel = f"kvm_decode_{name}_d{dim}_g{group}"
            smem = layout.smem_of(name, dim, group, warps_of(dim, False))
            function = driver.function(module, kernel, smem)
            error = run_quant_case(driver, function, random, name, "f16", dim, group, 1, 0, 0.0, 2,
                                   [16384], 0.1)
            ok = error < 1e-3
            bad += not ok
            print(f"{'ok ' if ok else 'BAD'} {kernel} 16384 rows of nearly equal weights: O {error:.1e}")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cubins", default="", help="folder of cubins; default: committed PTX")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    arguments = parser.parse_args()
    driver = Driver()
    driver.make_context()
    random = np.random.default_rng()
    module = driver.load(image_of(arguments.cubins, "decode_f16"))
    bad = 0
    cases = [(("f16", "bf16")[g % 2], (64, 128, 256)[g % 3], g, (16, 32, 64)[g // 3 % 3], 0, 0.0, False, g % 4 == 1)
             for g in (1, 2, 4, 5, 7, 8, 16)]
    cases += [("bf16", 128, 4, 16, 20, 0.0, False, True), ("f16", 128, 8, 16, 0, 2.0, False, False),
              ("bf16", 256, 16, 32, 7, 0.0, True, True)]
    for case in cases[:: 3 if arguments.quick else 1]:
        dtype, dim, group = case[:3]
        columns, is_wide = 16 if group > 8 else 8, case[-1]
        smem = smem_of(dim, columns, warps_of(dim, is_wide))
        name = f"kvm_decode_{dtype}_d{dim}_g{columns}{'_wide' if is_wide else ''}"
        function = driver.function(module, name, smem)
        for grid in (3, 64):
            error, lse = run_case(driver, function, random, *case, grid)
            ok = error < (4e-3 if dtype == "bf16" else 1e-3) and lse < 1e-3
            bad += not ok
            print(f"{'ok ' if ok else 'BAD'} {name} group {group} block {case[3]} window {case[4]} "
                  f"softcap {case[5]} sinks {case[6]} grid {grid}: O {error:.1e} LSE {lse:.1e}")
    bad += check_quantized(driver, random, arguments.cubins, arguments.quick)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
