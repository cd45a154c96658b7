"""Cuts attention_subset.safetensors out of the full set of policy vectors (see README.md).

usage: python3 extract_attention.py path/to/folder
needs: numpy, safetensors
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# First and last tokens, and both sides of the edges of blocks and tiles of 16.
TOKENS = [0, 1, 15, 16, 17, 255, 256, 511]


def main():
    states = load_file(Path(sys.argv[1]) / "states_T512.safetensors")
    subset = {"tokens": np.array(TOKENS, np.int32)}
    for layer in ("l0", "l1"):
        subset[f"{layer}.attn_out"] = np.ascontiguousarray(states[f"{layer}.attn_out"][:, TOKENS])
        subset[f"{layer}.dec_attn_full"] = states[f"{layer}.dec_attn_full"]
    save_file(subset, Path(__file__).with_name("attention_subset.safetensors"))


main()
