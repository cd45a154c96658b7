"""Decode speed and resident KV memory of llama-server far into a context.

The context is not computed, which takes the CPU backend many minutes: a prompt of some hundred tokens is
saved, its rows are repeated in the saved file up to the depth, and the server loads that. What the
tokens are makes no difference to the speed.
"""

import os
import re
import struct
import tempfile

from llama import held_mib, post, server, text

DEPTH = 32768
CELLS = DEPTH + 256
KV_BYTES = 4 * 2 * 8 * 128 * 2  # of a token in f16, with the model of `model.py deep`
ANSWER = 16  # tokens of a measured request
ROUNDS = 2


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        self.at += count
        return self.data[self.at - count:self.at]

    def numbers(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))


def repeat(data, count):
    """`data`, rows of one size, repeated and cut to `count` bytes."""
    return (data * (count // len(data) + 1))[:count]


def deepen(path):
    """Rewrites a saved sequence with rows up to DEPTH; answers its tokens."""
    with open(path, "rb") as file:
        state = Reader(file.read())
    magic, version, count = state.numbers("<3I")
    state.take(4 * count)  # the tokens, as the server packs them; a plain list will do
    streams, cells = state.numbers("<2I")
    assert streams == 1, f"{streams} streams"
    meta = [state.numbers("<iIi") for _ in range(cells)]
    assert all(number == 1 for _, number, _ in meta), "a cell of several sequences"
    transposed, layers = state.numbers("<2I")
    assert not transposed, "needs flash attention"
    tokens = [65 + i % 26 for i in range(DEPTH)]
    with open(path, "wb") as file:
        file.write(struct.pack(f"<3I{DEPTH}i2I", magic, version, DEPTH, *tokens, 1, DEPTH))
        for position in range(DEPTH):
            file.write(struct.pack("<iIi", position, 1, meta[0][2]))
        file.write(struct.pack("<2I", 0, layers))
        for _ in range(2 * layers):
            kind, row = state.numbers("<iQ")
            file.write(struct.pack("<iQ", kind, row) + repeat(state.take(cells * row), DEPTH * row))
    return tokens


def resident_mib(process):
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024


def measure(plugin, spec, *cache):
    """Of a server at the depth: tokens/s of the best answer, how many MiB more are resident than in one
    with a prompt of 500 tokens, and what the plugin says that it held at the end, or None."""
    options = ["-np", "1", "-t", "2", "--cache-ram", "0", *cache]
    body = {"temperature": 0, "ignore_eos": True, "cache_prompt": True}
    prompt = {**body, "prompt": text()[:500], "n_predict": 1}
    with server(plugin, spec, "-c", "512", *options) as process:
        post("/completion", prompt)
        short = resident_mib(process)
    with tempfile.TemporaryDirectory() as folder, \
            server(plugin, spec, "-c", str(CELLS), "--slot-save-path", folder, *options) as process:
        post("/completion", prompt)
        post("/slots/0?action=save", {"filename": "state"})
        tokens = deepen(os.path.join(folder, "state"))
        post("/slots/0?action=restore", {"filename": "state"})
        speeds = []
        for i in range(ROUNDS):
            answer = post("/completion", {**body, "prompt": tokens + [65 + i], "n_predict": ANSWER})
            assert answer["timings"]["cache_n"] == DEPTH, answer["timings"]
            speeds.append(answer["timings"]["predicted_per_second"])
        grown = resident_mib(process) - short
    return max(speeds), grown, held_mib(process.output) if spec else None


def depth(specs):
    """The table. What stock caches hold is what they allocate, for all cells at the start."""
    f16 = CELLS * KV_BYTES / 2**20
    rows = {}
    for kind, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
        speed, grown, _ = measure(False, None, "-ctk", kind, "-ctv", kind)
        rows[f"stock {kind}"] = speed, grown, f16 * bits / 16
    speed, grown, _ = measure(True, None)
    rows["plugin, transparent"] = speed, grown, f16
    rows |= {"`" + spec.replace("|", "\\|") + "`": measure(True, spec) for spec in specs}
    print("| cache | tokens/s | against stock f16 | against stock q4_0 | KV MiB held | share of f16 | RSS grown, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (speed, grown, held) in rows.items():
        print(f"| {name} | {speed:.2f} | {speed / rows['stock f16'][0]:.2f} | {speed / rows['stock q4_0'][0]:.2f} "
              f"| {held:.0f} | {held / f16:.3f} | {grown:.0f} |")
