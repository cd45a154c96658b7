"""Work items as src/attention/cuda plans them: the rows of all heads end to end, cut into equal
shares, one for each CTA."""

import numpy as np

NEXT = 12  # place of `next` in an item
UNIT = 64  # rows; what the warps of a CTA do at a time
OVERHEAD = 2  # what an item costs beside its rows, in units; shorter parts are not cut off


def cuts_of(units, start, limits):
    """Where a head of `units` units that starts at the cost `start` is cut by the `limits`."""
    cuts = []
    for limit in limits:
        cut = round(limit - start - OVERHEAD)
        cut = 0 if cut < OVERHEAD and units > OVERHEAD else min(cut, units)
        cuts.append(units if 0 < units - cut < OVERHEAD < units else max(cut, 0))
    return cuts


def chunks(units, grid):
    """The smallest chunk, in units, such that chunks of all heads have a CTA each; None if even whole
    heads are too many."""
    if len(units) > grid:
        return None
    low, high = 1, max(units)
    while low < high:
        middle = (low + high) // 2
        if sum(max(1, -(-n // middle)) for n in units) <= grid:
            high = middle
        else:
            low = middle + 1
    return max(low, 1)


def deal(ctas, grid):
    """Lists of items as linked items, the first of each CTA in front."""
    items = [(list_[0] if list_ else [0] * 16) for list_ in ctas] + [[0] * 16] * (grid - len(ctas))
    items = [list(item) for item in items[:grid]]
    for cta, list_ in enumerate(ctas):
        at = cta
        for item in list_[1:]:
            items[at][NEXT] = len(items)
            at = len(items)
            items.append(list(item))
    return np.array(items, np.uint32)


def plan(lens, num_kv_heads, group, grid, block_size, sealed_block=0):
    """Items for one query of each sequence, whose heads all have lens[i] rows.

    Answers items [n, 16] u32 (KvmItem) and the number of slots.
    """
    units = [-(-n // UNIT) for n in lens]
    heads = [(s, h) for s in range(len(lens)) for h in range(num_kv_heads)]
    total = sum(units[s] + OVERHEAD for s, _ in heads)
    chunk = chunks([units[s] for s, _ in heads], grid)
    # One part for each CTA, or shares of equal cost: whichever lets the busiest CTA do less.
    by_chunk = chunk is not None and chunk <= total / grid + 1
    pages = np.cumsum([0] + [-(-n // block_size) for n in lens])
    ctas, start, cta, slot = [[]], 0, 0, 0
    for ticket, (s, h) in enumerate(heads):
        end = start + units[s] + OVERHEAD
        last = cta
        while last + 1 < grid and (last + 1) * total / grid < end:
            last += 1
        if by_chunk:
            num = max(1, -(-units[s] // chunk))
            cuts = [units[s] * i // num for i in range(1, num)]
        else:
            cuts = cuts_of(units[s], start, [(i + 1) * total / grid for i in range(cta, last)])
        edges = [0] + cuts + [units[s]]
        sealed = lens[s] // sealed_block * sealed_block if sealed_block else 0
        parts = [i for i in range(len(edges) - 1) if edges[i] < edges[i + 1]] or [0]
        for i in range(len(edges) - 1):
            if i in parts:
                begin, stop = edges[i] * UNIT, min(edges[i + 1] * UNIT, lens[s])
                ctas[-1].append([s, 1, h, pages[s], lens[s], begin, stop, sealed, slot,
                                 parts.index(i), len(parts), ticket, 0, 0, 0, 0])
            if by_chunk or i < len(cuts):
                ctas.append([])
        slot += len(parts)
        start, cta = end, last
    return deal(ctas, grid), slot
