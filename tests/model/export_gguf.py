"""Write a checkpoint as a GGUF file that llama.cpp loads, and reference logits.

    python export_gguf.py --run DIR --tests DIR

writes ``tiny.gguf`` and ``tiny_reference.safetensors`` into the tests folder,
which must already hold ``heldout.txt``.
"""

import argparse
import hashlib
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.numpy import save_file

from data import BOS, EOS, UNK
from model import Config, Model

SPACE_PIECE = "\u2581"          # how SentencePiece vocabularies spell a blank
REFERENCE_TOKENS, REFERENCE_LAST = 300, 8


def add_metadata(writer, cfg):
    """Architecture keys as llama.cpp reads them."""
    writer.add_name("tiny byte-level recall model")
    writer.add_context_length(cfg.context)
    writer.add_embedding_length(cfg.dim)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.ffn)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.eps)
    writer.add_rope_freq_base(cfg.theta)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_vocab_size(cfg.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def add_tokenizer(writer):
    """One token per byte, as a SentencePiece-style vocabulary.

    llama.cpp replaces blanks by SPACE_PIECE before it looks pieces up, so that
    one is an ordinary token; all other bytes go through the byte fallback.
    """
    kinds = gguf.TokenType
    pieces = [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces[0x20] = (SPACE_PIECE, kinds.NORMAL)
    pieces += [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def write_gguf(path, weights, cfg):
    """Matrices as f16, norms as f32.

    The model already uses interleaved rotary pairs, so unlike checkpoints in
    the split-half layout the query and key rows need no reordering.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    add_metadata(writer, cfg)
    add_tokenizer(writer)
    for name, tensor in weights.items():
        array = tensor.numpy()
        writer.add_tensor(name, array.astype(np.float16 if array.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(path):
    """Model with the weights and settings stored in a GGUF file."""
    reader = gguf.GGUFReader(str(path))
    field = lambda key: reader.fields[key].contents()
    cfg = Config(
        vocab=field("llama.vocab_size"), layers=field("llama.block_count"),
        dim=field("llama.embedding_length"), heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.attention.key_length"), ffn=field("llama.feed_forward_length"),
        context=field("llama.context_length"), theta=field("llama.rope.freq_base"),
        eps=field("llama.attention.layer_norm_rms_epsilon"))
    model = Model(cfg)
    model.load_state_dict({t.name: torch.from_numpy(np.array(t.data, dtype=np.float32))
                           for t in reader.tensors})
    return model.eval()


@torch.no_grad()
def write_reference(path, gguf_path, heldout):
    """Logits of a plain float64 forward pass with the exported weights."""
    text = heldout.read_bytes()[: REFERENCE_TOKENS - 1]
    tokens = np.array([BOS, *text], dtype=np.int32)
    model = load_gguf(gguf_path).to_double()
    logits = model(torch.from_numpy(tokens).long()[None])[0, -REFERENCE_LAST:]
    save_file({"tokens": tokens, "logits": logits.float().numpy()}, str(path), metadata={
        "about": f"logits at the last {REFERENCE_LAST} positions, computed in float64",
        "gguf_sha256": hashlib.sha256(gguf_path.read_bytes()).hexdigest()})
    path.chmod(0o644)           # the safetensors package writes it as 0600


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--tests", required=True, type=Path, help="where the files go")
    args = parser.parse_args()
    saved = torch.load(args.run / "checkpoint.pt", weights_only=True, map_location="cpu")
    target = args.tests / "tiny.gguf"
    write_gguf(target, saved["average"], Config())
    write_reference(args.tests / "tiny_reference.safetensors", target,
                    args.tests / "heldout.txt")
    print(f"{target}: {target.stat().st_size} bytes, after step {saved['state']['step']}")


if __name__ == "__main__":
    main()
