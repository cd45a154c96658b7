"""Work items as src/attention/cuda plans them. The rows of all heads lie end to end and are cut into
equal shares, one for each CTA; where heads are few, each CTA gets one part."""

import numpy as np

NEXT = 12      # place of `next` in an item
OVERHEAD = 2    # what an item costs beside its rows, in units; shorter parts are not cut off


def cuts_of(units, start, limits):
    """Where a head of `units` units that starts at the cost `start` is cut by the `limits`."""
    cuts = []
    for limit in limits:
        cut = round(limit - start - OVERHEAD)
        cut = 0 if cut < OVERHEAD and units > OVERHEAD else min(cut, units)
        cuts.append(units if 0 < units - cut < OVERHEAD < units else max(cut, 0))
    return cuts


def chunk_of(units, grid):
    """The smallest chunk, in units, such that chunks of all heads have a CTA each; None if even whole
    heads are too many."""
    if len(units) > grid:
        return None
    low, high = 1, max(max(units), 1)
    while low < high:
        middle = (low + high) // 2
        if sum(max(1, -(-n // middle)) for n in units) <= grid:
            high = middle
        else:
            low = middle + 1
    return low


def parts_of(units, grid):
    """For each head the edges of its parts, [0, .., units], and the CTA of each part."""
    total = sum(n + OVERHEAD for n in units)
    chunk = chunk_of(units, grid)
    if chunk is not None and chunk <= total / grid + 1:
        cta = iter(range(grid))
        for n in units:
            num = max(1, -(-n // chunk))
            yield [n * i // num for i in range(num + 1)], [next(cta) for _ in range(num)]
        return
    start, cta = 0, 0
    for n in units:
        end, last = start + n + OVERHEAD, cta
        while last + 1 < grid and (last + 1) * total / grid < end:
            last += 1
        cuts = cuts_of(n, start, [(i + 1) * total / grid for i in range(cta, last)])
        yield [0] + cuts + [n], list(range(cta, last + 1))
        start, cta = end, last


def plan(lens, num_kv_heads, group, grid, block_size, unit, sealed_block=0):
    """Items for one query of each sequence, whose heads all have lens[i] rows; a CTA does `unit` rows at
    a time. Answers items [n, 16] u32 (KvmItem) and the number of slots."""
    heads = [(s, h) for s in range(len(lens)) for h in range(num_kv_heads)]
    units = [-(-lens[s] // unit) for s, _ in heads]
    pages = np.cumsum([0] + [-(-n // block_size) for n in lens])
    ctas, slot = [[] for _ in range(grid)], 0
    for ticket, ((s, h), (edges, owners)) in enumerate(zip(heads, parts_of(units, grid))):
        parts = [i for i in range(len(owners)) if edges[i] < edges[i + 1]] or [0]
        sealed = lens[s] // sealed_block * sealed_block if sealed_block else 0
        for part, i in enumerate(parts):
            begin, end = edges[i] * unit, min(edges[i + 1] * unit, lens[s])
            ctas[owners[i]].append([s, 1, h, pages[s], lens[s], begin, end, sealed, slot, part,
                                    len(parts), ticket, 0, 0, max(lens[s], 1) - 1, 0])
        slot += len(parts)
    return deal(ctas), slot


def deal(ctas):
    """Lists of items as linked items, the first of each CTA in front."""
    items = [list(cta[0]) if cta else [0] * 16 for cta in ctas]
    for i, cta in enumerate(ctas):
        at = i
        for item in cta[1:]:
            items[at][NEXT] = len(items)
            at = len(items)
            items.append(list(item))
    return np.array(items, np.uint32)
