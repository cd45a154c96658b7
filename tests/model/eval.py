"""Measure a GGUF file: held-out text loss and in-context recall.

    python eval.py --tests DIR

reads ``tiny.gguf``, ``heldout.txt`` and ``recall.txt`` from the folder.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from data import BOS
from export_gguf import load_gguf

WINDOW = 1024


@torch.no_grad()
def text_loss(model, text):
    """Mean nats per byte over the whole text, in windows that start with BOS."""
    total, count = 0.0, 0
    for start in range(0, len(text), WINDOW):
        piece = torch.tensor(list(text[start:start + WINDOW]))
        logits = model(torch.cat((torch.tensor([BOS]), piece[:-1]))[None])[0]
        total += F.cross_entropy(logits, piece, reduction="sum").item()
        count += len(piece)
    return total / count


@torch.no_grad()
def greedy(model, prompt, length):
    """Greedy continuation of ``prompt``, ``length`` bytes, without a cache."""
    tokens = [BOS, *prompt]
    for _ in range(length):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return bytes(t if t < 256 else 0 for t in tokens[-length:])


def recall(model, path):
    """(right answers, prompts): an answer is right with its closing ';'."""
    right = total = 0
    for line in path.read_text(encoding="ascii").splitlines():
        prompt, answer = line.split("\t")
        want = (answer + ";").encode()
        right += greedy(model, prompt.encode(), len(want)) == want
        total += 1
    return right, total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", required=True, type=Path)
    args = parser.parse_args()
    model = load_gguf(args.tests / "tiny.gguf")
    loss = text_loss(model, (args.tests / "heldout.txt").read_bytes())
    print(f"held-out text: {loss:.4f} nats/byte", flush=True)
    right, total = recall(model, args.tests / "recall.txt")
    print(f"recall: {right} of {total} exact ({100 * right / total:.1f}%)")


if __name__ == "__main__":
    main()
