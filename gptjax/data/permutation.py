"""A pseudo-random permutation of any size that needs no table, and the mixing of integers that keys it."""

import functools
import math

import numpy as np

ROUNDS = 8

_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31))
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of indices (int64) under a permutation of range(size) that is drawn from (seed, epoch).

    A generalised Feistel network over pairs (left, right), left < a and right < b with a b >= size, walked until
    it lands below size (Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains).
    """
    a, b, keys = _network(size, seed, epoch)
    out = indices.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = np.divmod(out[todo], b)
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right, keys[i]) % a) % a
            right = (right + _mix(left, keys[i + 1]) % b) % b
        out[todo] = left * b + right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def shuffled(first: int, count: int, size: int, seed: int) -> list[int]:
    """Members [first, first + count) of range(size), epoch after epoch, each in an order of its own."""
    epochs, places = np.divmod(np.arange(first, first + count), size)
    return [int(permute(np.array([place]), size, seed, int(epoch))[0]) for epoch, place in zip(epochs, places)]


@functools.lru_cache(maxsize=256)
def mix_integers(*values: int) -> int:
    """64 pseudo-random bits of small integers, mixed one after another by splitmix64 (Steele, Lea & Flood 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


@functools.lru_cache(maxsize=256)
def _network(size: int, seed: int, epoch: int) -> tuple[np.uint64, np.uint64, list[np.uint64]]:
    """a, b and the key of each round of `permute`."""
    b = math.isqrt(size - 1) + 1
    keys = [np.uint64(mix_integers(seed, epoch, i)) for i in range(ROUNDS)]
    return np.uint64(-(-size // b)), np.uint64(b), keys


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Pseudo-random uint64 numbers of values and a key: the finaliser of splitmix64."""
    mixed = values + key
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed
