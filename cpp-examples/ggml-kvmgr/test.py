"""Runs the plugin inside the unmodified binaries of llama.cpp: make test-plugin.

Usage: test.py LLAMA_BUILD PLUGIN MODEL TEXT [TEST...]
"""

import os
import re
import sys
import tempfile
import time

import model
from llama import MODEL, TEXT, post, run, server, text


def perplexity(path=MODEL, cache=(), **options):
    """The perplexity of 6 chunks; the program loses its last lines now and then, hence 8 and retries."""
    args = ["-m", path, "-f", TEXT, "-c", "256", "-b", "256", "-ub", "64", "-t", "1", "--chunks", "8",
            "-fa", "on", *cache]
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
    cache = ("-ctk", "q8_0", "-ctv", "q8_0")
    ours, quantized = perplexity(cache=cache)[0], perplexity(cache=cache, plugin=False)[0]
    assert abs(ours / quantized - 1) < 1e-3, f"-ctk q8_0: {ours}, stock {quantized}"
    ours, output = perplexity(spec="quant(k=had+q4_0, v=q4_0)", KVMGR_STATS="1")
    assert stock * 0.98 < ours < stock * 1.03, f"had+q4_0: {ours}, stock {stock}"
    share = float(re.search(r"\(([0-9.]+) of the same rows in f16\)", output).group(1))
    assert share <= 0.30, f"had+q4_0 holds {share} of f16"
    for policy in ("snapkv(w=16)", "snapkv(w=16) | adakv(0.2)", "stream(sink=4)"):
        ours, output = perplexity(spec=f"{policy} | keep(0.5)", KVMGR_COMPRESS="piece", KVMGR_STATS="1")
        assert ours < stock * 1.2, f"{policy}: {ours}, stock {stock}"
        assert int(re.search(r"(\d+) evicted", output).group(1)) > 0, output[-300:]


def test_operations():
    """llama.cpp's own test. All of FLASH_ATTN_EXT takes half an hour: here a slice of each feature."""
    for operation, pattern, least in (("SET_ROWS", "", 200), ("FLASH_ATTN_EXT", "hsk=(64|128),.*kv=(113|512),nb=(1|3|32),", 400)):
        output = run("test-backend-ops", "test", "-b", "KVMGR0", "-o", operation, "-p", pattern, timeout=1000)
        assert "FAIL" not in output and output.count("OK") > least, f"{output.count('OK')} {output[-500:]}"


def test_refusals():
    args = ["-m", MODEL, "-p", "a", "-n", "2", "-no-cnv", "-t", "1"]
    for options, word in (
        ({"spec": "h2o | keep(0.5)"}, "COLUMN_SUM"),
        ({"spec": "nonsense"}, "nonsense"),
        ({"spec": "full", "KVMGR_MODE": "transparent"}, "KVMGR_MODE=opaque"),
        ({"KVMGR_COMPRESS": "never"}, "KVMGR_COMPRESS"),
    ):
        # A build with backends linked in was asked for the device by name and stops; others go on.
        output = run("llama-completion", *args, expect=None, **options)
        assert word in output and "not loaded" in output, output[-500:]
    for cache in (["-ctk", "q8_0"], ["-ctv", "q4_0"]):
        output = run("llama-completion", *args, "-fa", "on", *cache, spec="full", expect=1)
        assert "leave -ctk and -ctv alone" in output, output[-500:]


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


def random_model(kind, folder):
    path = os.path.join(folder, f"{kind}.gguf")
    model.KINDS[kind](MODEL, path)
    return path


def test_architectures():
    """A sliding window, a recurrent state, keys and values in one row: right, or refused at load."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, refusal in (("window", None), ("hybrid", "recurrent state"), ("mla", "no values of its own")):
            path = random_model(kind, folder)
            stock, _ = perplexity(path, plugin=False)
            ours, _ = perplexity(path)
            assert abs(ours / stock - 1) < 1e-4, f"{kind}: {ours}, stock {stock}"
            if refusal:
                output = run("llama-completion", "-m", path, "-p", "a", "-n", "2", "-no-cnv", "-t", "1",
                             "-fa", "on", spec="full", expect=1)
                assert refusal in output, output[-2000:]
                continue
            ours, _ = perplexity(path, spec="full")
            assert abs(ours / stock - 1) < 1e-4, f"{kind}: {ours}, stock {stock}"
            ours, _ = perplexity(path, spec="quant(k=had+q4_0, v=q4_0)")
            assert abs(ours / stock - 1) < 0.05, f"{kind}: {ours}, stock {stock}"


def test_prompt_cache():
    """A prompt that is saved in a file and loaded from it in another process is answered as before."""
    prompt = text()[:300]
    for options in ({"plugin": False}, {}, {"spec": "full"}, {"spec": "snapkv(w=16) | keep(0.5)"}):
        with tempfile.TemporaryDirectory() as folder:
            args = ["-m", MODEL, "-p", prompt, "-n", "60", "-no-cnv", "-t", "1", "-fa", "on", "--temp", "0",
                    "--no-display-prompt", "-lv", "1"]
            cache = ["--prompt-cache", os.path.join(folder, "cache")]
            # The program loses its last words now and then.
            answers = [run("llama-completion", *args, *more, **options)[:30] for more in ([], cache, cache)]
            assert os.path.getsize(cache[1]) > 300 * 4 * 2 * 128 * 2
            assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 30, answers


def test_policy_state():
    """A state saved between a prompt and its answer holds what the answer would have attended to."""
    with tempfile.TemporaryDirectory() as folder:
        args = ("-c", "1024", "-np", "2", "--slot-save-path", folder)
        with server(True, "snapkv(w=16) | keep(0.5)", *args):
            body = {"temperature": 0, "cache_prompt": True, "ignore_eos": True, "id_slot": 0}
            prompt = {**body, "prompt": text()[:400]}
            direct = post("/completion", {**prompt, "n_predict": 32})["content"]
            post("/slots/0?action=erase", {})
            post("/completion", {**prompt, "n_predict": 0})
            post("/slots/0?action=save", {"filename": "state"})
            post("/slots/1?action=restore", {"filename": "state"})
            restored = post("/completion", {**prompt, "id_slot": 1, "n_predict": 32})
            assert restored["timings"]["cache_n"] > 300, restored["timings"]
            assert restored["content"] == direct, (restored["content"], direct)


def test_speculative():
    """Drafts of the model itself, and of n-grams, change no answer; a policy bears them."""
    draft = ("-c", "1024", "-np", "1", "--spec-type", "draft-simple", "-md", MODEL, "--spec-draft-n-max", "6")
    body = {"n_predict": 64, "temperature": 0, "prompt": text()[:300], "ignore_eos": True}
    def answer(plugin, spec, *args):
        with server(plugin, spec, *args):
            return post("/completion", body)
    stock = answer(False, None, "-c", "1024", "-np", "1")["content"]
    for plugin, spec in ((False, None), (True, None), (True, "full")):
        drafted = answer(plugin, spec, *draft)
        assert drafted["timings"]["draft_n"] > 20, drafted["timings"]
        assert drafted["content"] == stock, f"{spec}: {drafted['content']!r}, stock {stock!r}"
    spec = "snapkv(w=16) | keep(0.5)"
    plain, drafted = answer(True, spec, "-c", "1024", "-np", "1"), answer(True, spec, *draft)
    assert drafted["timings"]["draft_n"] > 20 and len(drafted["content"]) == len(plain["content"])


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


TESTS = (test_perplexity, test_operations, test_refusals, test_architectures, test_states, test_prompt_cache,
         test_policy_state, test_speculative, test_server, test_context_shift)

if __name__ == "__main__":
    for test in TESTS:
        if sys.argv[5:] and test.__name__ not in sys.argv[5:]:
            continue
        start = time.time()
        test()
        print(f"{test.__name__}: ok, {time.time() - start:.1f} s", flush=True)
