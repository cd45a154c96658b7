"""Decode speed and resident KV memory of llama-server far into a context.

The context is not computed, which takes the CPU backend many minutes: a prompt of some hundred tokens is
saved, its rows are repeated in the saved file up to the depth, and the server loads that. What the
tokens are makes no difference to the speed.
"""

import os
import re
import struct
import tempfile

from llama import post, server, text

DEPTH = 32768
ANSWER = 24  # tokens of a measured request
ROUNDS = 3


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


def short_mib():
    """What a stock server with a short context occupies."""
    with server(False, None, "-c", "512", "-np", "1", "-t", "2", "--cache-ram", "0") as process:
        post("/completion", {"prompt": text()[:500], "n_predict": 1})
        return resident_mib(process)


def measure(plugin, spec, *cache):
    """Tokens/s of the best of some answers at the depth, and the MiB resident after them."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["-c", str(DEPTH + 512), "-np", "1", "-t", "2", "--cache-ram", "0", "--slot-save-path", folder]
        body = {"temperature": 0, "ignore_eos": True, "cache_prompt": True}
        with server(plugin, spec, *args, *cache) as process:
            post("/completion", {**body, "prompt": text()[:500], "n_predict": 1})
            post("/slots/0?action=save", {"filename": "state"})
            tokens = deepen(os.path.join(folder, "state"))
            post("/slots/0?action=restore", {"filename": "state"})
            speeds = []
            for i in range(ROUNDS):
                answer = post("/completion", {**body, "prompt": tokens + [65 + i], "n_predict": ANSWER})
                assert answer["timings"]["cache_n"] == DEPTH, answer["timings"]
                speeds.append(answer["timings"]["predicted_per_second"])
            return max(speeds), resident_mib(process)


def depth(specs):
    """The table; the first spec should be lossless f16. KV is what is resident beyond a short context."""
    short = short_mib()
    rows = {f"stock {kind}": measure(False, None, "-ctk", kind, "-ctv", kind) for kind in ("f16", "q8_0", "q4_0")}
    rows["plugin, transparent"] = measure(True, None)
    rows |= {f"`{spec}`": measure(True, spec) for spec in specs}
    print("| cache | tokens/s | against stock f16 | against stock q4_0 | KV MiB resident | share of f16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    f16, q4_0 = rows["stock f16"], rows["stock q4_0"]
    for name, (speed, resident) in rows.items():
        held = resident - short
        print(f"| {name} | {speed:.2f} | {speed / f16[0]:.2f} | {speed / q4_0[0]:.2f} | {held:.0f} | "
              f"{held / (f16[1] - short):.3f} |")
