"""Work items as src/attention/cuda plans them: the rows of all heads end to end, cut into equal
shares, one for each CTA."""

import numpy as np

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


def plan(lens, num_kv_heads, group, grid, block_size, sealed_block=0):
    """Items for one query of each sequence, whose heads all have lens[i] rows.

    Answers items [n, 12] u32, starts [grid + 1] u32, number of slots.
    """
    units = [-(-n // UNIT) for n in lens]
    heads = [(s, h) for s in range(len(lens)) for h in range(num_kv_heads)]
    total = sum(units[s] + OVERHEAD for s, _ in heads)
    chunk = chunks([units[s] for s, _ in heads], grid)
    # One part for each CTA, or shares of equal cost: whichever lets the busiest CTA do less.
    by_chunk = chunk is not None and chunk <= total / grid + 1
    pages = np.cumsum([0] + [-(-n // block_size) for n in lens])
    items, starts, start, cta, slot = [], [0], 0, 0, 0
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
        parts = []
        for i, (a, b) in enumerate(zip(edges, edges[1:])):
            if b > a or (units[s] == 0 and i == 0):
                parts.append([s, 1, h, pages[s], lens[s], a * UNIT, min(b * UNIT, lens[s]), sealed])
            if by_chunk or i < len(cuts):
                starts.append(len(items) + len(parts))
        items += [part + [slot, i, len(parts), ticket] for i, part in enumerate(parts)]
        slot += len(parts)
        start, cta = end, last
    starts += [len(items)] * (grid + 1 - len(starts))
    return np.array(items, np.uint32).reshape(-1, 12), np.array(starts, np.uint32), slot
