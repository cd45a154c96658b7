"""Programs of llama.cpp with and without the plugin. The command line of whoever imports this starts
with LLAMA_BUILD PLUGIN MODEL TEXT.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

BUILD, PLUGIN, MODEL, TEXT = (os.path.abspath(path) for path in sys.argv[1:5])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PORT = free_port()


def environment(plugin, spec, **extra):
    """Of a program with or without the plugin. Builds with backends linked in load it only if asked."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVMGR_")}
    if plugin:
        env |= {"GGML_BACKEND_PATH": PLUGIN, "LLAMA_ARG_DEVICE": "KVMGR0"}
    if spec:
        env["KVMGR_SPEC"] = spec
    return env | extra


def run(program, *args, spec=None, plugin=True, timeout=200, expect=0, **extra):
    """The output of a program of llama.cpp, with or without the plugin; expect=None: any end."""
    env = environment(plugin, spec, **extra)
    command = [os.path.join(BUILD, "bin", program), *args]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              cwd=folder, timeout=timeout, check=False)
    output = done.stdout.decode(errors="replace")
    assert expect is None or done.returncode == expect, f"{command} with {spec}: exit {done.returncode}\n{output[-2000:]}"
    return output


def post(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.read().decode(errors='replace')}") from error


@contextlib.contextmanager
def server(plugin, spec, *args, model=MODEL):
    """A running llama-server. When it has ended, `output` is what it has printed."""
    command = [os.path.join(BUILD, "bin", "llama-server"), "-m", model, "-t", "1", "-fa", "on", "--port",
               str(PORT), "--no-webui", *args]
    with tempfile.TemporaryFile() as log, \
            subprocess.Popen(command, env=environment(plugin, spec, KVMGR_STATS="1"), stdout=log,
                             stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                raise AssertionError("the server does not answer")
            yield process
        finally:
            process.terminate()
            process.wait()
            log.seek(0)
            process.output = log.read().decode(errors="replace")


def held_mib(output):
    """What the plugin says that its cache held at the end."""
    return float(re.search(r"([0-9.]+) MiB of KV held", output).group(1))


def text():
    with open(TEXT, encoding="utf-8") as file:
        return file.read()
