"""Models with random weights: shapes that the tiny model does not have.

Usage: model.py KIND TINY.gguf OUT.gguf      needs the pip package gguf

deep    32 query and 8 KV heads of 128 in 4 layers, the attention of an 8B model; everything else is small,
        so that a decode step is attention
window  three of four layers see the last 64 tokens only
hybrid  layers with a recurrent state between layers with attention
mla     keys and values are parts of the same rows

The vocabulary is that of the tiny model.
"""

import sys

import gguf
import numpy as np

RANDOM = np.random.default_rng(7)


class Model:
    """A file in the making. Shapes are written as llama.cpp has them, innermost first."""

    def __init__(self, arch, tiny, path, **shape):
        self.writer = gguf.GGUFWriter(path, arch)
        self.arch = arch
        for field in gguf.GGUFReader(tiny).fields.values():
            if field.name.startswith("tokenizer."):
                kind, sub = field.types[0], field.types[-1]
                self.writer.add_key_value(field.name, field.contents(), kind,
                                          sub if kind == gguf.GGUFValueType.ARRAY else None)
        self.set(context_length=65536, **shape)
        self.width = shape["embedding_length"]
        self.weight("token_embd", self.width, 259)

    def set(self, **values):
        """Metadata; two underscores are a dot."""
        for name, value in values.items():
            name = f"{self.arch}.{name.replace('__', '.')}"
            if isinstance(value, list):
                self.writer.add_array(name, value)
            elif isinstance(value, float):
                self.writer.add_float32(name, value)
            else:
                self.writer.add_uint32(name, value)

    def weight(self, name, *shape):
        """Random, of a size that keeps activations near 1."""
        values = RANDOM.standard_normal(shape[::-1], dtype=np.float32) / np.sqrt(shape[0])
        self.writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def ones(self, name, size):
        self.writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    def attention(self, block, q, kv):
        self.weight(f"{block}.attn_q", self.width, q)
        self.weight(f"{block}.attn_k", self.width, kv)
        self.weight(f"{block}.attn_v", self.width, kv)
        self.weight(f"{block}.attn_output", q, self.width)

    def ffn(self, block, size):
        self.weight(f"{block}.ffn_gate", self.width, size)
        self.weight(f"{block}.ffn_up", self.width, size)
        self.weight(f"{block}.ffn_down", size, self.width)

    def write(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def deep(tiny, path):
    model = Model("llama", tiny, path, embedding_length=256, block_count=4, feed_forward_length=256,
                  attention__head_count=32, attention__head_count_kv=8, attention__key_length=128,
                  attention__value_length=128, attention__layer_norm_rms_epsilon=1e-5,
                  rope__dimension_count=128, vocab_size=259)
    for i in range(4):
        block = f"blk.{i}"
        model.ones(f"{block}.attn_norm", 256)
        model.attention(block, 32 * 128, 8 * 128)
        model.ones(f"{block}.ffn_norm", 256)
        model.ffn(block, 256)
    model.ones("output_norm", 256)
    model.write()


def window(tiny, path):
    model = Model("cohere2", tiny, path, embedding_length=256, block_count=4, feed_forward_length=256,
                  attention__head_count=4, attention__head_count_kv=2, attention__sliding_window=64,
                  attention__layer_norm_epsilon=1e-5, logit_scale=1.0, vocab_size=259)
    for i in range(4):
        block = f"blk.{i}"
        model.ones(f"{block}.attn_norm", 256)
        model.attention(block, 256, 128)
        model.ffn(block, 256)
    model.ones("output_norm", 256)
    model.write()


def hybrid(tiny, path):
    kv_heads = [0, 2, 0, 2]
    model = Model("lfm2", tiny, path, embedding_length=256, block_count=4, feed_forward_length=256,
                  attention__head_count=4, attention__head_count_kv=kv_heads, shortconv__l_cache=3,
                  attention__layer_norm_rms_epsilon=1e-5, vocab_size=259)
    for i, heads in enumerate(kv_heads):
        block = f"blk.{i}"
        model.ones(f"{block}.attn_norm", 256)
        model.ones(f"{block}.ffn_norm", 256)
        model.ffn(block, 256)
        if heads:
            model.attention(block, 256, 128)
            model.ones(f"{block}.attn_q_norm", 64)
            model.ones(f"{block}.attn_k_norm", 64)
        else:
            taps = RANDOM.standard_normal((256, 3), dtype=np.float32)
            model.writer.add_tensor(f"{block}.shortconv.conv.weight", taps)
            model.weight(f"{block}.shortconv.in_proj", 256, 768)
            model.weight(f"{block}.shortconv.out_proj", 256, 256)
    model.ones("token_embd_norm", 256)
    model.write()


def mla(tiny, path):
    heads, rope, nope, rank, value = 4, 32, 32, 128, 64
    model = Model("deepseek2", tiny, path, embedding_length=256, block_count=2, feed_forward_length=256,
                  leading_dense_block_count=2, attention__head_count=heads, attention__head_count_kv=1,
                  attention__q_lora_rank=64, attention__kv_lora_rank=rank, attention__key_length=rank + rope,
                  attention__value_length=rank, attention__key_length_mla=nope + rope,
                  attention__value_length_mla=value, attention__layer_norm_rms_epsilon=1e-5,
                  rope__dimension_count=rope, expert_feed_forward_length=64, expert_count=2,
                  expert_used_count=1, expert_shared_count=1, expert_weights_scale=1.0, vocab_size=259)
    for i in range(2):
        block = f"blk.{i}"
        model.ones(f"{block}.attn_norm", 256)
        model.ones(f"{block}.attn_q_a_norm", 64)
        model.ones(f"{block}.attn_kv_a_norm", rank)
        model.weight(f"{block}.attn_q_a", 256, 64)
        model.weight(f"{block}.attn_q_b", 64, heads * (nope + rope))
        model.weight(f"{block}.attn_kv_a_mqa", 256, rank + rope)
        model.weight(f"{block}.attn_k_b", nope, rank, heads)
        model.weight(f"{block}.attn_v_b", rank, value, heads)
        model.weight(f"{block}.attn_output", heads * value, 256)
        model.ones(f"{block}.ffn_norm", 256)
        model.ffn(block, 256)
    model.ones("output_norm", 256)
    model.write()


KINDS = {"deep": deep, "window": window, "hybrid": hybrid, "mla": mla}

if __name__ == "__main__":
    KINDS[sys.argv[1]](sys.argv[2], sys.argv[3])
