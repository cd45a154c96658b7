"""Cuts quant_subset.safetensors out of the full set of quantizer vectors (see README.md).

usage: python3 extract_quant.py path/to/quant.safetensors path/to/states_T512.safetensors
needs: numpy, safetensors
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# Rows kept of each source; formats whose rows are independent are cut to the same rows.
ROWS = {"gauss": 64, "outlier64": 128, "edge": 8, "model_k": 256, "model_v": 256, "outlier": 256}
GGML = [(f, s) for f in ("Q8_0", "Q4_0", "BF16") for s in ("gauss", "outlier64", "edge")]
GGML += [(f, s) for f in ("Q4_1", "Q5_0", "Q5_1", "MXFP4") for s in ("gauss", "outlier64", "edge")]
GGML += [("IQ4_NL", "gauss")]
TQ = [("mse2_nc", "gauss"), ("mse3_nc", "gauss"), ("mse4_nc", "gauss"), ("mse3_nc", "outlier64")]
FLOATS = [(t, s) for t in ("e4m3fn", "e5m2") for s in ("gauss", "edge")]
ROTATED = [(f, s) for f in ("Q8_0", "Q4_0") for s in ("outlier64",)]
KIVI = [
    *(f"k{bits}_{group}/model_k" for bits in (2, 4) for group in ("g32_r128", "g64_r64", "g128_r128")),
    *(f"v{bits}_g32_r128/model_v" for bits in (2, 4)),
    *(f"v{bits}_g32_r32/gauss" for bits in (2, 4)),
]


def main():
    full = load_file(sys.argv[1])
    subset = {f"data/{source}": full[f"data/{source}"][:rows] for source, rows in ROWS.items()}
    for kind, entries in (("ggml", GGML), ("ggml_rot", ROTATED)):
        for fmt, source in entries:
            for field in ("bytes", "deq"):
                name = f"{kind}/{fmt}/{source}/{field}"
                subset[name] = full[name][: ROWS[source]]
    for entry in KIVI:
        for field in ("codes", "scale", "min"):
            subset[f"kivi/{entry}/{field}"] = full[f"kivi/{entry}/{field}"]
    for fmt, source in TQ:
        name = f"turboquant/{fmt}/{source}/deq"
        subset[name] = full[name][: ROWS[source]]
    for fmt, source in FLOATS:
        for field in ("bytes", "scale"):
            name = f"fp8/{fmt}/per_token/{source}/{field}"
            subset[name] = full[name]
    for name in ("sym8_per_token/gauss/q", "sym8_per_token/gauss/scale", "asym4_per_token/gauss/q",
                 "asym4_per_token/gauss/scale", "asym4_per_token/gauss/min"):
        subset[f"int/{name}"] = full[f"int/{name}"]
    for field in ("codes", "scales_e4m3"):
        subset[f"nvfp4/noglobal/gauss/{field}"] = full[f"nvfp4/noglobal/gauss/{field}"]
    subset["data/model_k_pre"] = full["kvquant/nuq2_1pct/model_k_pre/x"]
    # Queries of tokens after those of model_k, by the four heads that share its KV head.
    queries = load_file(sys.argv[2])["l0.q"][:4, 300::14]
    subset["data/model_q"] = queries.reshape(-1, queries.shape[-1])
    subset["hadamard/64"] = full["hadamard/64"]
    subset = {name: np.ascontiguousarray(tensor) for name, tensor in subset.items()}
    save_file(subset, Path(__file__).with_name("quant_subset.safetensors"))


main()
