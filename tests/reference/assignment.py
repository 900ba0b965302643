"""The best matching by trying all of them, and cosines one at a time."""

import itertools
import math


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def best_matching(rows, columns):
    """The largest mean cosine of a one-to-one matching, and its partners: 720 for six."""
    table = [[cosine(a, b) for b in columns] for a in rows]
    return max(
        (math.fsum(table[i][j] for i, j in enumerate(order)) / len(rows), order)
        for order in itertools.permutations(range(len(rows)))
    )
