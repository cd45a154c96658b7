"""Train the tiny test model.  Resumable: run again with the same --run.

    python train.py --data DIR --run DIR --minutes N

The schedule follows the training time spent so far (kept in the checkpoint),
so a run that was stopped goes on where it was.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import BOS, RecallMaker, eval_prompt
from model import Config, Model, initialise

TOKENS_PER_STEP = 8192
# Recall curriculum: (length, share of running text); next when 95% are right.
# It is short because the structured start already answers most questions.
STAGES = [(512, 0.0), (512, 0.5), (1024, 0.6)]
# Then the mix: (probability, kind, length).
MIX = [(0.50, "text", 512), (0.10, "text", 1024), (0.10, "recall", 512),
       (0.16, "recall", 1024), (0.09, "recall", 2048), (0.05, "recall", 4096)]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Newton-Schulz).

    Used for the matrices inside the blocks: it is known to need fewer tokens than
    AdamW to reach the same loss, and tokens are what a small CPU is short of.
    """

    def __init__(self, params, lr, momentum=0.95, decay=0.02):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @staticmethod
    def orthogonalise(g, steps=5):
        x = g / (g.norm() + 1e-7)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.T if tall else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalise(p.grad.lerp(buf, group["momentum"]))
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - lr * group["decay"]).add_(update, alpha=-lr * scale)


class Batches:
    """Makes training batches: (input ids, target ids, weights)."""

    def __init__(self, text, seed):
        self.text, self.raw = text, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.rng = random.Random(seed)
        self.maker = RecallMaker(text)

    def _pack(self, rows, weights):
        ids = torch.tensor(rows)
        start = torch.full((len(rows), 1), BOS)
        return torch.cat((start, ids[:, :-1]), 1), ids, torch.tensor(weights)

    def plain(self, length):
        starts = [self.rng.randrange(len(self.raw) - length)
                  for _ in range(TOKENS_PER_STEP // length)]
        ids = torch.stack([self.raw[s:s + length] for s in starts]).long()
        start = torch.full((len(starts), 1), BOS)
        return torch.cat((start, ids[:, :-1]), 1), ids, torch.ones(ids.shape)

    def recall(self, length, share):
        rows = [self.maker.sequence(self.rng, length, share)
                for _ in range(TOKENS_PER_STEP // length)]
        return self._pack([list(r) for r, _ in rows], [w for _, w in rows])

    def mixed(self):
        pick = self.rng.random()
        for chance, kind, length in MIX:
            pick -= chance
            if pick < 0:
                break
        if kind == "text":
            return self.plain(length)
        return self.recall(length, self.rng.choice((0.5, 0.7, 0.8)))


@torch.no_grad()
def evaluate(model, held, prompts, windows=16, length=1024):
    """(nats per byte, share of prompts answered exactly) on held-out data."""
    raw = torch.frombuffer(bytearray(held.encode()), dtype=torch.uint8).long()
    step = (len(raw) - length) // windows
    ids = torch.stack([raw[i * step:i * step + length] for i in range(windows)])
    start = torch.full((windows, 1), BOS)
    logits = model(torch.cat((start, ids[:, :-1]), 1))
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
    right = 0
    for prompt, answer in prompts:
        # Greedy decoding is exact if and only if every answer byte is the
        # most likely one given the true bytes before it: one pass suffices.
        want = (answer + ";").encode()
        seq = [BOS, *prompt.encode(), *want[:-1]]
        best = model(torch.tensor([seq]))[0, -len(want):].argmax(-1).tolist()
        right += best == list(want)
    return loss, right / len(prompts)


def answer_accuracy(logits, targets, weights):
    """Share of answer bytes predicted right in a training batch."""
    mask = weights > 1.5
    return (logits.argmax(-1) == targets)[mask].float().mean().item() if mask.any() else None


class Run:
    """Model, optimisers, averaged weights and progress, as one checkpoint."""

    def __init__(self, folder):
        self.path = folder / "checkpoint.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.model = initialise(Model(Config()))
        inner = [p for n, p in self.model.named_parameters() if "blk" in n and p.ndim == 2]
        outer = [p for n, p in self.model.named_parameters() if "blk" not in n or p.ndim < 2]
        self.optimisers = [Muon(inner, lr=0.02),
                           torch.optim.AdamW(outer, lr=0.004, betas=(0.9, 0.98), weight_decay=0.0)]
        self.base_lr = [0.02, 0.004]
        self.average = Model(Config())
        self.average.load_state_dict(self.model.state_dict())
        self.state = dict(step=0, seconds=0.0, stage=0, recent=[])
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.state = saved["state"]
            for optimiser, values in zip(self.optimisers, saved["optimisers"]):
                optimiser.load_state_dict(values)

    def save(self):
        partial = self.path.with_suffix(".tmp")
        torch.save(dict(model=self.model.state_dict(), average=self.average.state_dict(),
                        state=self.state,
                        optimisers=[o.state_dict() for o in self.optimisers]), partial)
        partial.replace(self.path)

    def set_rate(self, progress):
        """Short warm-up, flat, then linear decay over the last 55%."""
        factor = min(1.0, (self.state["step"] + 1) / 40, max(0.02, (1.0 - progress) / 0.55))
        for optimiser, base in zip(self.optimisers, self.base_lr):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    @torch.no_grad()
    def update_average(self):
        decay = min(0.99, self.state["step"] / (self.state["step"] + 10))
        for slow, fast in zip(self.average.parameters(), self.model.parameters()):
            slow.lerp_(fast, 1 - decay)

    def next_batch(self, batches):
        stage = self.state["stage"]
        return batches.recall(*STAGES[stage]) if stage < len(STAGES) else batches.mixed()

    def train_step(self, batches, forward):
        inputs, targets, weights = self.next_batch(batches)
        logits = forward(inputs)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.update_average()
        accuracy = answer_accuracy(logits.detach(), targets, weights)
        state = self.state
        state["step"] += 1
        if state["stage"] < len(STAGES):
            state["recent"] = (state["recent"] + [accuracy])[-8:]
            if len(state["recent"]) == 8 and sum(state["recent"]) / 8 > 0.95:
                state["stage"], state["recent"] = state["stage"] + 1, []
        return loss.item(), accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="holds train.txt, heldout.txt")
    parser.add_argument("--run", required=True, type=Path, help="checkpoints")
    parser.add_argument("--minutes", required=True, type=float, help="total training time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = (args.data / "train.txt").read_text(encoding="ascii")
    held = (args.data / "heldout.txt").read_text(encoding="ascii")
    rng = random.Random(7)
    prompts = [eval_prompt(rng, held, rng.randint(1000, 2000), rng.randint(8, 24))
               for _ in range(40)]
    run = Run(args.run)
    batches = Batches(text, seed=run.state["step"] + 1)
    forward = torch.compile(run.model, dynamic=False) if args.compile else run.model
    budget, last_report, tokens, begun = args.minutes * 60, 0.0, 0, time.time()
    while run.state["seconds"] < budget:
        started = time.time()
        run.set_rate(run.state["seconds"] / budget)
        loss, accuracy = run.train_step(batches, forward)
        run.state["seconds"] += time.time() - started
        tokens += TOKENS_PER_STEP
        if run.state["step"] % 20 == 0:
            print(f"step {run.state['step']} min {run.state['seconds'] / 60:.1f} "
                  f"stage {run.state['stage']} loss {loss:.3f} answers {accuracy} "
                  f"tok/s {tokens / (time.time() - begun):.0f}", flush=True)
        if time.time() - last_report > 240 or run.state["seconds"] >= budget:
            run.save()
            text_loss, recall = evaluate(run.average, held, prompts)
            last_report = time.time()
            print(f"== step {run.state['step']} min {run.state['seconds'] / 60:.1f} "
                  f"held-out {text_loss:.4f} recall {recall:.3f}", flush=True)


if __name__ == "__main__":
    main()
