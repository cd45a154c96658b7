"""Runs the plugin inside the unmodified binaries of llama.cpp: make test-plugin.

Usage: test.py LLAMA_BUILD PLUGIN MODEL TEXT
"""

import re
import time

from llama import MODEL, TEXT, post, run, server, text


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


def test_states():
    """llama.cpp's own test of saving, loading, copying and removing sequences. Its last part starts
    without flash attention, which only the transparent mode can do; parts 2 to 7 come before."""
    args = ["-m", MODEL, "-p", "And the Lord said unto Moses", "-n", "16", "-t", "1", "-fa", "on"]
    assert "All tests passed" in run("test-save-load-state", *args)
    output = run("test-save-load-state", *args, spec="full", expect=None)
    assert output.count("PASS") == 7, output[-3000:]
    # A state holds decoded values; a few of them are other codes when they are encoded again. So the
    # parts that compare bytes or logits closely may fail, but only by little.
    for spec in ("quant(k=q8_0, v=q8_0)", "quant(k=had+q4_0, v=q4_0)"):
        output = run("test-save-load-state", *args, spec=spec, expect=None)
        errors = re.findall(r"NMSE at step|not byte-identical|state changed across a restore", output)
        assert output.count("PASS") + len(errors) >= 7, f"{spec}: {output[-3000:]}"
        assert output.count("error:") + output.count("state changed") == len(errors), output[-3000:]
        for nmse in re.findall(r"NMSE at step \d+ is (\S+)", output):
            assert float(nmse) < 1e-3, f"{spec}: {output[-3000:]}"
        for changed, whole in re.findall(r"(\d+) of (\d+) bytes differ", output):
            assert int(changed) < 0.004 * int(whole), f"{spec}: {output[-3000:]}"
        assert "start with -fa on" in output, output[-3000:]


def server_answers(plugin, spec=None):
    """Greedy answers of a server with parallel slots, of prompts that share a prefix."""
    with server(plugin, spec, "-c", "1024", "-np", "4"):
        prompts = [text()[:150] + text()[400 * i:400 * i + 60] for i in range(8)]
        body = {"n_predict": 12, "temperature": 0, "cache_prompt": True}
        answers = [post("/completion", {**body, "prompt": prompt})["content"] for prompt in prompts]
    assert all(answers), answers
    return answers


def shifted_answer(plugin, spec=None):
    """A greedy answer longer than the context, which is shifted three times."""
    with server(plugin, spec, "-c", "256", "-np", "1", "--context-shift"):
        body = {"prompt": text()[:120], "n_predict": 400, "temperature": 0, "ignore_eos": True}
        answer = post("/completion", body)
    assert answer["truncated"], answer
    return answer["content"]


def test_server():
    stock = server_answers(False)
    assert server_answers(True) == stock
    assert server_answers(True, "full") == stock
    assert len(server_answers(True, "snapkv(w=16) | keep(0.5) | quant(k=q8_0, v=q8_0)")) == len(stock)


def test_context_shift():
    stock = shifted_answer(False)
    assert len(stock) > 300, stock
    assert shifted_answer(True) == stock
    assert shifted_answer(True, "full") == stock
    assert len(shifted_answer(True, "quant(k=had+q4_0, v=q4_0)")) > 300


if __name__ == "__main__":
    for test in (test_perplexity, test_operations, test_refusals, test_states, test_server,
                 test_context_shift):
        start = time.time()
        test()
        print(f"{test.__name__}: ok, {time.time() - start:.1f} s", flush=True)
