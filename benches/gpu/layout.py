"""Quantized blocks of 64 tokens in the layout of kernels/kvm_quant.cuh, from plain arrays."""

import numpy as np

# name: bits, tokens of a chunk, whether there is a minimum, whether keys are scaled by channel
FORMATS = {
    "int8": (8, 32, False, False),
    "fp8e4m3": (8, 32, False, False),
    "int4": (4, 64, True, False),
    "kivi4": (4, 64, True, True),
    "kivi2": (2, 64, True, True),
}


def e4m3_values():
    codes = np.arange(256)
    sign, exponent, fraction = np.where(codes & 128, -1.0, 1.0), codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, fraction / 8 * 2.0 ** -6, normal)
    values[codes & 127 == 127] = np.nan
    return values


def encode(name, x, is_key):
    """x [tokens, D]: codes u8, s, m and what they decode to. s and m are for each token, or for each
    channel of keys of channel formats."""
    bits, _, has_minimum, per_channel = FORMATS[name]
    axis = 0 if per_channel and is_key else 1
    half = (lambda y: y.astype(np.float16).astype(np.float64)) if per_channel else (
        lambda y: y.astype(np.float32).astype(np.float64))
    if name == "fp8e4m3":
        table = e4m3_values()
        order = np.argsort(np.where(np.isnan(table), np.inf, table))[:254]
        s = half(np.abs(x).max(axis, keepdims=True) / 448)
        middle = (table[order][1:] + table[order][:-1]) / 2
        codes = order[np.searchsorted(middle, x / s)]
        return codes.astype(np.uint8), s, None, table[codes] * s
    if not has_minimum:
        s = half(np.abs(x).max(axis, keepdims=True) / 127)
        codes = np.rint(x / s)
        return (codes.astype(np.int64) + 128).astype(np.uint8), s, None, codes * s
    top = 2**bits - 1
    m = half(x.min(axis, keepdims=True))
    s = half((x.max(axis, keepdims=True) - m) / top)
    codes = np.clip(np.rint((x - m) / s), 0, top)
    return codes.astype(np.uint8), s, m, codes * s + m


def fragments(matrix, bits):
    """matrix [rows, columns] of codes: bytes [tile of 16 rows][piece][lane][W words]."""
    tiles, steps = matrix.shape[0] // 16, matrix.shape[1] // 16
    words = np.zeros((tiles, steps * bits // 4, 32), np.uint32)
    lane = np.arange(32)
    for step in range(steps):
        for e in range(8):
            r, low = e // 2, e % 2
            row, column = lane // 4 + 8 * (r % 2), 16 * step + 2 * (lane % 4) + low + 8 * (r // 2)
            code = matrix.reshape(tiles, 16, -1)[:, row, column].astype(np.uint32)
            if bits == 8:
                word, bit = 2 * step + r // 2, 8 * (r % 2 * 2 + low)
            elif bits == 4:
                word, bit = step, 2 + 16 * low + 4 * (r % 2) + 8 * (r // 2)
            else:
                word, bit = step // 2, 2 + 16 * low + 2 * (r % 2) + 8 * (r // 2) + 4 * (step % 2)
            words[:, word] |= code << bit | code >> (32 - bit if bit else 31)
    width = min(4, words.shape[1])
    return words.reshape(tiles, -1, width, 32).transpose(0, 1, 3, 2).tobytes()


def side(name, x, is_key):
    """One side of a cell, x [64, D]: its bytes and what they decode to."""
    bits, tokens, _, per_channel = FORMATS[name]
    codes, s, m, decoded = encode(name, x, is_key)
    out = b""
    for first in range(0, 64, tokens):
        chunk = codes[first:first + tokens]
        out += fragments(chunk if is_key else chunk.T, bits)
        if per_channel and is_key:
            out += s.astype(np.float16).tobytes() + m.astype(np.float16).tobytes()
        elif per_channel:
            pairs = np.concatenate([s, m], 1)[first:first + tokens]
            out += pairs.astype(np.float16).tobytes()
        else:
            for part in (s, m):
                if part is not None:
                    out += part[first:first + tokens].astype(np.float32).tobytes()
    return np.frombuffer(out, np.uint8), decoded


def side_bytes(name, dim, is_key):
    return len(side(name, np.random.default_rng(0).standard_normal((64, dim)), is_key)[0])


def smem_of(name, dim, columns, warps):
    """Shared memory of a kernel of kernels/decode_q.cu."""
    chunk = FORMATS[name][1]
    both = sum(-(-side_bytes(name, dim, is_key) * chunk // 64 // 512) * 512 for is_key in (True, False))
    q = 2 * dim * columns + 16 * columns + 16 if dim * columns >= 4096 else 0
    return warps * 2 * max(both, 64 * dim) + q
