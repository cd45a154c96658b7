"""Tables and endurance of the plugin inside the unmodified binaries of llama.cpp.

Usage: measure.py LLAMA_BUILD PLUGIN MODEL TEXT table|depth|soak

table  KL divergence from the f16 cache of llama.cpp, and the KV memory held
depth  tokens/s and memory of a decode at depth 32768, with the model that `model.py deep` makes
soak   500 requests from 4 clients: shared prompts, cancelled streams, context shifts; the greedy
       answers and the resident memory of the server are compared
"""

import concurrent.futures
import json
import os
import random
import re
import sys
import tempfile
import time
import urllib.request

import depth
from depth import resident_mib
from llama import MODEL, PORT, TEXT, held_mib, post, run, server, text

POLICY = ("snapkv(w=16)", "snapkv(w=16) | adakv(0.2)", "stream(sink=4)")
SPECS = ["full", "quant(q8_0)", "quant(k=had+q4_0, v=q4_0)", "quant(tq4)", "quant(tq3)", "quant(kivi4)", "quant(kivi2)",
         *(f"{policy} | keep({keep})" for policy in POLICY for keep in (0.5, 0.25))]
DEEP = ["full", "quant(q8_0)", "quant(k=had+q4_0, v=q4_0)", "quant(tq3)", "quant(kivi2)", "snapkv(w=16) | keep(0.25)"]


def divergence(base, *cache, **options):
    """KLD, same top token %, tokens/s and the report of the plugin."""
    args = ["-m", MODEL, "-f", TEXT, "-c", "512", "-b", "512", "-ub", "64", "-t", "1", "--chunks", "8",
            "-fa", "on", "--kl-divergence-base", base, "--kl-divergence", *cache]
    for _ in range(6):  # the program loses its last lines now and then
        start = time.time()
        output = run("llama-perplexity", *args, **options)
        seconds = time.time() - start
        found = re.search(r"Mean +KLD: +([-0-9.]+)", output), re.search(r"Same top p: +([0-9.]+)", output)
        if all(found):
            return float(found[0].group(1)), float(found[1].group(1)), 8 * 512 / seconds, output
    raise AssertionError(output[-2000:])


def table():
    """Bits are those held for each element of the prompt, evicted ones included. Speed counts the start of
    the program. What a stock type holds is its size against f16."""
    print("| cache | bits | KV MiB held | KLD | same top token % | tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.join(folder, "base")
        run("llama-perplexity", "-m", MODEL, "-f", TEXT, "-c", "512", "-b", "512", "-t", "1", "--chunks", "8",
            "-fa", "on", "--kl-divergence-base", base, plugin=False)
        rows, lossless = [], None
        for spec in SPECS:
            kld, same, speed, output = divergence(base, spec=spec, KVMGR_STATS="1", KVMGR_COMPRESS="piece")
            held = held_mib(output)
            lossless = lossless or held
            name = spec.replace("|", "\\|")
            rows.append(f"| `{name}` | {16 * held / lossless:.2f} | {held:.3f} | {kld:.5f} | {same:.2f} | {speed:.0f} |")
        for kind, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
            kld, same, speed, _ = divergence(base, "-ctk", kind, "-ctv", kind, plugin=False)
            print(f"| stock {kind} | {bits:.2f} | {lossless * bits / 16:.3f} | {kld:.5f} | {same:.2f} | {speed:.0f} |")
        print("\n".join(rows))


def cancelled(body):
    """Reads a little of a stream and goes away."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/completion",
                                     json.dumps({**body, "stream": True}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read(200)


def one_request(number):
    """Nothing of a cancelled request, otherwise its greedy answer: tokens, and their leads over the next."""
    rng = random.Random(number)
    whole = text()
    start = 400 * rng.randrange(20)
    shared = whole[:150] if number % 2 else ""
    body = {"prompt": shared + whole[start:start + rng.randrange(20, 120)], "temperature": 0,
            "n_predict": 480 if number % 25 == 3 else rng.randrange(4, 24), "cache_prompt": True,
            "ignore_eos": True, "n_probs": 2}
    if number % 7 == 5:
        cancelled({**body, "n_predict": 200})
        return [], []
    tokens = post("/completion", body)["completion_probabilities"]
    tops = [[top["logprob"] for top in token["top_logprobs"]] for token in tokens]
    return [token["id"] for token in tokens], [top[0] - top[1] for top in tops]


def soak_once(plugin, spec, count=500):
    # The prompt cache of the server holds some states, and not more and more of them.
    with server(plugin, spec, "-c", "2048", "-np", "4", "--context-shift", "--cache-ram", "4") as process:
        answers, resident = [], []
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            for first in range(0, count, 50):
                answers += clients.map(one_request, range(first, first + 50))
                resident.append(resident_mib(process))
        assert process.poll() is None, "the server died"
    return answers, resident


def soak():
    """Answers of a lossless cache may part from stock's only at ties, and memory stays flat."""
    stock, base = soak_once(False, None)
    for plugin, spec in ((False, None), (True, None), (True, "full"), (True, "quant(k=had+q4_0, v=q4_0)"),
                         (True, "snapkv(w=16) | keep(0.5)")):
        ours, resident = soak_once(plugin, spec)
        leads = [lead_where_they_part(a, b) for a, b in zip(stock, ours) if a[0] != b[0]]
        name = spec or ("plugin, transparent" if plugin else "stock again")
        print(f"{name}: {len(ours) - len(leads)} of {len(ours)} answers as stock; RSS MiB after each 50 requests "
              f"{[round(mib) for mib in resident]}", flush=True)
        if spec in (None, "full"):
            print(f"  others part where the first token leads the second by e^x, x = {leads}", flush=True)
            assert all(lead < 0.02 for lead in leads), "an answer is another one"
        growth = [run[-1] - run[1] for run in (resident, base)]
        assert growth[0] < growth[1] + 4, f"the server grows by {growth[0]} MiB, stock by {growth[1]}"


def lead_where_they_part(stock, ours):
    """How far stock's token led where another answer takes the other one: a tie is nobody's fault."""
    part = next(i for i, (a, b) in enumerate(zip(stock[0], ours[0])) if a != b)
    return stock[1][part]


if __name__ == "__main__":
    {"table": table, "depth": lambda: depth.depth(DEEP), "soak": soak}[sys.argv[5]]()
