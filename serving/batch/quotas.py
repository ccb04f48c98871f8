"""Shares -> whole counts -> a seeded order. Numbers are exact: nothing here is left to a draw.

Four thousand independent draws of a share of 0.2 give 800, give or take 25; a plan means 800.

    >>> counts([Fraction("0.7"), Fraction("0.3")], 5)
    [4, 1]
    >>> [("melanoma", "nevus")[i] for i in laid([Fraction(1), Fraction(1)], 4, "7/0/diagnosis")]
    ['nevus', 'nevus', 'melanoma', 'melanoma']
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def counts(weights: Sequence[Fraction], total: int) -> list[int]:
    """`total` divided by weights, by largest remainder (Hamilton): each within 1 of its share.

    Of equal remainders the earlier goes first. Weights are 0 or more, and not all 0.
    """
    whole = sum(weights)
    shares = [total * weight / whole for weight in weights]
    found = [math.floor(share) for share in shares]
    largest = sorted(range(len(shares)), key=lambda i: (found[i] - shares[i], i))
    for place in largest[: total - sum(found)]:
        found[place] += 1
    return found


def laid(weights: Sequence[Fraction], total: int, seed: str) -> NDArray[np.int64]:
    """Places of `weights`, each as often as `counts` says, in a seeded order: [total]."""
    places = np.repeat(np.arange(len(weights)), counts(weights, total))
    return places[order(total, seed)]


def spread(size: int, total: int, seed: str) -> NDArray[np.int64]:
    """`total` places of 0 to `size` - 1, ascending, each equally often to within 1: [total].

    Systematic sampling: steps of size / total from a seeded start. Any stretch of neighbouring
    places has its share to within 1, so what is sorted by a property keeps that property's shares.
    """
    # The start in `total`ths of a place; integers, so that no machine rounds otherwise.
    start = int(words(1, seed)[0] % np.uint64(size))
    return (start + np.arange(total, dtype=np.int64) * size) // total


def order(total: int, seed: str) -> NDArray[np.int64]:
    """The numbers 0 to `total` - 1 in an order that the seed alone decides: [total]."""
    return np.argsort(words(total, seed), kind="stable")


def interleaved(sizes: Sequence[int], seed: str) -> NDArray[np.int64]:
    """Which group each place goes to, so that every stretch has a share of all groups: [sum].

    Member j of a group of n is put at (j + u) / n, u seeded and even in 0 to 1. The u keeps shards
    alike: strictly alternating, one of two shards would get one of two groups.
    """
    groups = np.repeat(np.arange(len(sizes)), sizes)
    members = np.concatenate([np.arange(size) for size in sizes])
    # 53 bits of the word: a division of numbers that a double holds is the same everywhere.
    jitter = (words(len(groups), seed) >> np.uint64(11)) / 2.0**53
    return groups[np.argsort((members + jitter) / np.repeat(sizes, sizes), kind="stable")]


def words(count: int, seed: str) -> NDArray[np.uint64]:
    """Random 64-bit words, of Philox (whose raw stream numpy promises to keep) keyed by a text."""
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big")
    return np.random.Philox(key=key).random_raw(count)
