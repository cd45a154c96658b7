"""Runs the plugin inside the unmodified binaries of llama.cpp: make test-plugin.

Usage: test.py LLAMA_BUILD PLUGIN MODEL TEXT
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

BUILD, PLUGIN, MODEL, TEXT = sys.argv[1:5]
PORT = 18089


def run(program, *args, spec=None, plugin=True, timeout=200, **extra):
    """The output of a program of llama.cpp, with or without the plugin."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVMGR_")}
    if plugin:
        env["GGML_BACKEND_PATH"] = PLUGIN
    if spec:
        env["KVMGR_SPEC"] = spec
    env.update(extra)
    command = [os.path.join(BUILD, "bin", program), *args]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout, check=False)
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{command} with {spec}: exit {done.returncode}\n{output[-2000:]}"
    return output


def perplexity(**options):
    """The perplexity of 6 chunks; the program loses its last lines now and then, hence 8 and retries."""
    args = ["-m", MODEL, "-f", TEXT, "-c", "256", "-b", "256", "-ub", "64", "-t", "1", "--chunks", "8",
            "-fa", "on"]
    for _ in range(6):
        output = run("llama-perplexity", *args, **options)
        found = re.search(r"\[6\]([0-9.]+)", output)
        if found:
            return float(found.group(1)), output
    raise AssertionError("no perplexity in the output")


def test_perplexity():
    stock, _ = perplexity(plugin=False)
    for options in ({}, {"spec": "full"}):
        ours, _ = perplexity(**options)
        assert abs(ours / stock - 1) < 1e-4, f"{options}: {ours}, stock {stock}"
    ours, output = perplexity(spec="quant(k=had+q4_0, v=q4_0)", KVMGR_STATS="1")
    assert stock * 0.98 < ours < stock * 1.03, f"had+q4_0: {ours}, stock {stock}"
    share = float(re.search(r"\(([0-9.]+) of the same rows in f16\)", output).group(1))
    assert share <= 0.30, f"had+q4_0 holds {share} of f16"
    for policy in ("snapkv(w=16)", "snapkv(w=16) | adakv(0.2)", "stream(sink=4)"):
        ours, output = perplexity(spec=f"{policy} | keep(0.5)", KVMGR_COMPRESS="piece", KVMGR_STATS="1")
        assert ours < stock * 1.2, f"{policy}: {ours}, stock {stock}"
        assert int(re.search(r"(\d+) evicted", output).group(1)) > 0, output[-300:]


def test_operations():
    output = run("test-backend-ops", "test", "-b", "KVMGR0", "-o", "SET_ROWS")
    assert "FAIL" not in output and output.count("OK") > 200, output[-500:]


def test_refusals():
    args = ["-m", MODEL, "-p", "a", "-n", "2", "-no-cnv", "-t", "1"]
    for options, word in (
        ({"spec": "h2o | keep(0.5)"}, "COLUMN_SUM"),
        ({"spec": "nonsense"}, "nonsense"),
        ({"spec": "full", "KVMGR_MODE": "transparent"}, "KVMGR_MODE=opaque"),
        ({"KVMGR_COMPRESS": "never"}, "KVMGR_COMPRESS"),
    ):
        output = run("llama-completion", *args, **options)
        assert word in output and "not loaded" in output, output[-500:]


def post(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def server_answers(plugin, spec=None):
    """Greedy answers of a server with parallel slots, of prompts that share a prefix."""
    env = dict(os.environ)
    if plugin:
        env["GGML_BACKEND_PATH"] = PLUGIN
    if spec:
        env["KVMGR_SPEC"] = spec
    command = [os.path.join(BUILD, "bin", "llama-server"), "-m", MODEL, "-c", "1024", "-np", "4", "-t", "1",
               "-fa", "on", "--port", str(PORT), "--no-webui"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.2)
            with open(TEXT, encoding="utf-8") as file:
                text = file.read()
            answers = []
            for i in range(8):
                body = {"prompt": text[:150] + text[400 * i:400 * i + 60], "n_predict": 12,
                        "temperature": 0, "cache_prompt": True}
                answers.append(post("/completion", body)["content"])
            assert all(answers), answers
            return answers
        finally:
            server.terminate()


def test_server():
    stock = server_answers(False)
    assert server_answers(True) == stock
    assert server_answers(True, "full") == stock
    assert len(server_answers(True, "snapkv(w=16) | keep(0.5) | quant(k=q8_0, v=q8_0)")) == len(stock)


if __name__ == "__main__":
    for test in (test_perplexity, test_operations, test_refusals, test_server):
        start = time.time()
        test()
        print(f"{test.__name__}: ok, {time.time() - start:.1f} s", flush=True)
