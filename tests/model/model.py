"""A small Llama-architecture model and its structured initialisation.

Architecture: RMSNorm, rotary positions on interleaved pairs (2i, 2i+1) as in
llama.cpp's "norm" style, grouped-query attention, SwiGLU, untied output.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    vocab: int = 259
    layers: int = 4
    dim: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 704
    context: int = 4096
    theta: float = 1e6
    eps: float = 1e-5


def rope_frequencies(cfg):
    """Angle per position of each of the head_dim/2 pairs, fastest first."""
    return cfg.theta ** (-torch.arange(0, cfg.head_dim, 2).double() / cfg.head_dim)


def rope_table(cfg, length, dtype=torch.float32):
    """(cos, sin), each [length, head_dim/2]."""
    angles = torch.arange(length).double()[:, None] * rope_frequencies(cfg)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Apply rotary positions to x [batch, heads, time, head_dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.attn_norm = nn.RMSNorm(cfg.dim, eps=cfg.eps)
        self.attn_q = linear(cfg.dim, cfg.heads * cfg.head_dim)
        self.attn_k = linear(cfg.dim, cfg.kv_heads * cfg.head_dim)
        self.attn_v = linear(cfg.dim, cfg.kv_heads * cfg.head_dim)
        self.attn_output = linear(cfg.heads * cfg.head_dim, cfg.dim)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=cfg.eps)
        self.ffn_gate = linear(cfg.dim, cfg.ffn)
        self.ffn_up = linear(cfg.dim, cfg.ffn)
        self.ffn_down = linear(cfg.ffn, cfg.dim)

    def forward(self, x, cos, sin):
        cfg, (batch, time, _) = self.cfg, x.shape
        split = lambda t, n: t.view(batch, time, n, cfg.head_dim).transpose(1, 2)
        h = self.attn_norm(x)
        q = rotate(split(self.attn_q(h), cfg.heads), cos, sin)
        k = rotate(split(self.attn_k(h), cfg.kv_heads), cos, sin)
        v = split(self.attn_v(h), cfg.kv_heads)
        group = cfg.heads // cfg.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(out.transpose(1, 2).reshape(batch, time, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Model(nn.Module):
    """Token ids [batch, time] to logits [batch, time, vocab]."""

    def __init__(self, cfg=Config()):
        super().__init__()
        self.cfg = cfg
        self.token_embd = nn.Embedding(cfg.vocab, cfg.dim)
        self.blk = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.output_norm = nn.RMSNorm(cfg.dim, eps=cfg.eps)
        self.output = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        cos, sin = rope_table(cfg, cfg.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens):
        time = tokens.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output(self.output_norm(x))

    def to_double(self):
        """Switch to float64, with rotary tables that are exact to match."""
        self.double()
        self.cos, self.sin = rope_table(self.cfg, self.cfg.context, torch.float64)
        return self


# --------------------------------------------------------------------------
# Structured initialisation
# --------------------------------------------------------------------------
#
# Looking up "key=value" in the context needs two layers working together: one
# that tells each position which bytes precede it, and one that uses this to
# find an earlier position with the same recent past and copies what followed.
# From random weights this pair appears late and suddenly.  Here both layers
# start close to such a solution, and ordinary training does the rest.
#
# The residual stream is divided at the start (training may blur it freely):
#   CONST  one coordinate that is equal in all token embeddings
#   CUR    a random code of the token itself
#   PREV   four blocks: projected codes of the tokens 1, 2, 3, 4 steps back
#   PRED   projected code of the token an induction head wants to come next
CODE, PREV, PRED = 63, 38, 40
CONST_AT, CUR_AT, PREV_AT = 0, 1, 64
PRED_AT = PREV_AT + 4 * PREV
LOW_PAIR = 18   # rotary pairs from here on turn by under 1 radian in 2000 steps


def _cur():
    return slice(CUR_AT, CUR_AT + CODE)


def _prev(step):
    return slice(PREV_AT + (step - 1) * PREV, PREV_AT + step * PREV)


def _orthonormal_rows(rows, cols, gen):
    return torch.linalg.qr(torch.randn(cols, rows, generator=gen))[0].T


def _previous_token_heads(block, cfg, proj):
    """Head h of this layer attends to the token h+1 steps back.

    All queries and keys come from the constant coordinate.  The query is the
    key vector turned back by the wanted offset, so the rotary scores peak
    exactly at that distance; the fast pairs make the peak narrow.
    """
    unit = 16 / 2 ** 0.5                     # size of CONST and CUR after the norm
    weights = torch.tensor([4.0, 2.0, 1.0, 0.7, 0.5, 0.4, 0.3])
    sharp = 3.0                              # logit gap to the neighbours is about 7
    amount = (weights * sharp * cfg.head_dim ** 0.5).sqrt() / unit
    freq = rope_frequencies(cfg)[: len(weights)].float()
    for head in range(cfg.kv_heads):
        rows = torch.arange(len(weights)) * 2 + head * cfg.head_dim
        block.attn_k.weight[rows, CONST_AT] = amount
        base = head * cfg.head_dim
        block.attn_v.weight[base:base + CODE] = 0
        block.attn_v.weight[base:base + CODE, _cur()] = 0.3 * torch.eye(CODE)
    for head in range(cfg.heads):
        turn, base = -(head + 1) * freq, head * cfg.head_dim
        rows = torch.arange(len(weights)) * 2 + base
        block.attn_q.weight[rows, CONST_AT] = amount * turn.cos()
        block.attn_q.weight[rows + 1, CONST_AT] = amount * turn.sin()
        block.attn_output.weight[_prev(head + 1), base:base + CODE] = proj / (0.3 * unit)


def _induction_heads(block, cfg, proj, pred, gen):
    """One head per key/value head that finds the same recent past and copies.

    Query: the current token and the three before it.  Key: the four tokens
    before that position.  Both are projected the same way, so equal bytes give
    a large product.  The slow rotary pairs carry it, because there the distance
    between question and answer hardly matters.
    """
    low = slice(2 * LOW_PAIR, cfg.head_dim)
    width = cfg.head_dim - 2 * LOW_PAIR
    gain, unit = 1.4 ** 0.5, 7.6
    for kv in range(cfg.kv_heads):
        head = kv * (cfg.heads // cfg.kv_heads)
        q_rows = slice(head * cfg.head_dim + low.start, head * cfg.head_dim + low.stop)
        k_rows = slice(kv * cfg.head_dim + low.start, kv * cfg.head_dim + low.stop)
        for slot in range(4):
            match = gain * torch.randn(width, PREV, generator=gen) / width ** 0.5
            block.attn_k.weight[k_rows, _prev(slot + 1)] = match
            if slot == 0:
                block.attn_q.weight[q_rows, _cur()] = match @ proj
            else:
                block.attn_q.weight[q_rows, _prev(slot)] = match
        v_base, o_base = kv * cfg.head_dim, head * cfg.head_dim
        block.attn_v.weight[v_base:v_base + CODE, _cur()] += 0.3 * torch.eye(CODE)
        block.attn_output.weight[PRED_AT:, o_base:o_base + CODE] = pred / (0.3 * unit)


@torch.no_grad()
def initialise(model, seed=1):
    """Fill ``model`` with the structured start described above."""
    cfg, gen = model.cfg, torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.fill_(1.0)
        elif "output" in name or "down" in name:
            param.zero_()                    # residual branches start silent
        elif "ffn" in name:
            param.normal_(0, 0.7 * cfg.dim ** -0.5, generator=gen)
        else:
            param.normal_(0, 0.02, generator=gen)
    codes = F.normalize(torch.randn(cfg.vocab, CODE, generator=gen), dim=1)
    proj = _orthonormal_rows(PREV, CODE, gen)
    pred = _orthonormal_rows(PRED, CODE, gen)
    model.token_embd.weight[:, CONST_AT] = 1.0
    model.token_embd.weight[:, _cur()] = codes
    model.output.weight[:, PRED_AT:] = codes @ pred.T
    first = model.blk[0]
    first.attn_q.weight.mul_(0.1)
    first.attn_k.weight.mul_(0.1)
    _previous_token_heads(first, cfg, proj)
    _induction_heads(model.blk[1], cfg, proj, pred, gen)
    return model
