"""Cuts policy_subset.safetensors out of the full set of policy vectors (see README.md).

usage: python3 extract_policy.py path/to/folder
needs: numpy, safetensors
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

LAYERS = ("l0", "l1")
STATES = ("q", "k", "v", "dec_q", "dec_k", "dec_v")
PRESSES = [
    *(f"{press}@{ratio}" for press in ("streaming_llm", "snapkv", "adakv_snapkv") for ratio in ("0.25", "0.5", "0.75")),
    "snapkv_w32_k7@0.5",
]
# The scores of these do not depend on the ratio: they are stored once, with 0.5.
ONE_SCORE = ("knorm", "keydiff", "tova", "observed_attention", "lagkv", "cur", "pyramidkv")
PRESSES += [f"{press}@{ratio}" for press in ONE_SCORE for ratio in ("0.25", "0.5", "0.75")]
EXPECTED = ("expected_attention", "adakv_expected_attention_e2")
ONE_SCORE += EXPECTED
PRESSES += [f"{press}@{ratio}" for press in EXPECTED for ratio in ("0.25", "0.5", "0.75")]
PRESSES += ["expected_attention_nocov@0.5", "expected_attention_eps1e-2@0.5"]
PRESSES += ["lagkv_cross@0.5", "finch@0.5", "keyrerotation_snapkv@0.5", "simlayerkv"]
# Inputs of megabytes for these are left out; see tests/policy_golden.rs.
MAPPED = ("cap", "noncausal_attn", "leverage", "compactor", "chunkkv_snapkv", "entropy_chunkkv_snapkv",
          "chunk_knorm", "block_keydiff", "qfilter", "lukv")
PRESSES += [f"{press}@{ratio}" for press in MAPPED for ratio in ("0.25", "0.5", "0.75")]
ONE_SCORE += ("cap", "noncausal_attn", "leverage", "qfilter", "chunkkv_snapkv", "entropy_chunkkv_snapkv", "lukv")
PRESSES += ["duo_attention", "merging_snapkv@0.5", "cam_knorm"]
ONE_SCORE += ("merging_snapkv",)
# The reference attends to these with keys at new positions and the query at its old one.
NO_ATTENTION = ("finch", "keyrerotation_snapkv")


def wanted(press, name):
    base, _, ratio = press.partition("@")
    field = name.rsplit(".", 1)[1]
    once = field == "score" and base in ONE_SCORE and ratio != "0.5"
    return field in ("score", "kept", "kept_flat", "kept_cu", "dec_attn") and not (
        once or (field == "dec_attn" and base in NO_ATTENTION)
    )


TRACES = ("h2o_hh96_r32", "h2o_hh32_r96", "tova_c128", "scissorhands", "streaming_s4_r124_orig_pos", "streaming_s4_r124_cache_pos")


def main():
    folder = Path(sys.argv[1])
    states = load_file(folder / "states_T512.safetensors")
    presses = load_file(folder / "press_T512.safetensors")
    traces = load_file(folder / "decode_T512.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())["cases"]["T512"]["presses"]
    margins = {press["key"]: press.get("min_margin") for press in manifest}

    subset = {f"states/{layer}.{name}": states[f"{layer}.{name}"] for layer in LAYERS for name in STATES}
    for layer in LAYERS:
        columns = states[f"{layer}.attn_colsum"]
        subset[f"states/{layer}.column_sums"] = columns.reshape(2, 4, -1).sum(axis=1)
        queries = states[f"{layer}.q_pre"][:, 4:].astype(np.float64)
        mean = queries.mean(axis=1)
        deviations = queries - mean[:, None]
        covariance = deviations.transpose(0, 2, 1) @ deviations / queries.shape[1]
        subset[f"states/{layer}.query_mean"] = mean.astype(np.float32)
        subset[f"states/{layer}.query_covariance"] = covariance.astype(np.float32)
        for head in (0, 1):
            name = f"{layer}.h{head}.kept"
            subset[f"h2o_prefill/{name}"] = traces[f"d2o_like/{name}"]
    for press in PRESSES:
        own = {name: tensor for name, tensor in presses.items() if name.startswith(f"{press}/")}
        subset |= {name: tensor for name, tensor in own.items() if wanted(press, name)}
        if margins[press] is not None:
            subset[f"{press}/min_margin"] = np.array([margins[press]], np.float32)
    for layer in LAYERS:
        for field in ("leverage@0.5/{}.sketch", "qfilter@0.5/{}.filter"):
            subset[field.format(layer)] = presses[field.format(layer)]
        subset[f"cam_knorm/{layer}.merge_prob"] = presses[f"cam_knorm/{layer}.merge_prob"]
    subset |= {name: tensor for name, tensor in traces.items() if name.split("/")[0] in TRACES}
    quest = {name: tensor for name, tensor in traces.items() if name.startswith("quest_p16/")}
    subset |= {name: tensor for name, tensor in quest.items() if ".ub" in name or ".sel_kvmax_" in name}
    subset = {name: np.ascontiguousarray(tensor) for name, tensor in subset.items()}
    save_file(subset, Path(__file__).with_name("policy_subset.safetensors"))
    names = sorted(press["key"] for press in manifest)
    Path(__file__).with_name("policy_manifest.txt").write_text("\n".join(names) + "\n")


main()
