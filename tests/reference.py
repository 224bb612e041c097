"""Algorithm 1 of arXiv 2402.06082 in plain Python: one token, one slot at a time, nothing shared with the package.

It draws from the same counter, so that what the package keeps can be compared bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
MASK = 2**32 - 1


def threefry2x32(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 on Python integers, from the description in the paper."""
    schedule = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = (counter[0] + key[0]) & MASK, (counter[1] + key[1]) & MASK
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    for i in range(20):
        x0 = (x0 + x1) & MASK
        r = rotations[i % 8]
        x1 = ((x1 << r | x1 >> (32 - r)) & MASK) ^ x0
        if i % 4 == 3:
            j = i // 4 + 1
            x0 = (x0 + schedule[j % 3]) & MASK
            x1 = (x1 + schedule[(j + 1) % 3] + j) & MASK
    return x0, x1


def draw(seed: int, purpose: int, head: int, slot: int, number: int) -> int:
    """An odd integer below 2**25."""
    key0, key1 = threefry2x32((seed & MASK, seed >> 32), (head, purpose))
    return ((threefry2x32((key0, key1 ^ number >> 32), (slot, number & MASK))[0] >> 8) << 1) + 1


@dataclass
class Cluster:
    centre: Vector
    samples: list[Vector]
    due: list[int]
    members: list[int]


@dataclass
class Slot:
    key: Vector
    value: Vector
    due: float


@dataclass
class Reference:
    """One stream of the algorithm."""

    delta: float
    t: int
    s: int
    seed: int
    head: int = 0
    clusters: list[Cluster] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    mu: float = 0.0
    n: int = 0

    def update(self, key: Vector, value: Vector) -> None:
        distances = [float(np.linalg.norm(c.centre.astype(np.float64) - key)) for c in self.clusters]
        index = int(np.argmin(distances)) if distances else -1
        if not distances or distances[index] > self.delta:
            index = len(self.clusters)
            self.clusters.append(Cluster(key, [key] * self.t, [1] * self.t, []))
        cluster = self.clusters[index]
        cluster.members.append(self.n)
        count = len(cluster.members)
        for j in range(self.t):
            if cluster.due[j] == count:
                cluster.samples[j] = key
                cluster.due[j] = (count << 25) // draw(self.seed, 1, self.head, index * self.t + j, count) + 1
        if not self.slots:
            nothing = (np.zeros_like(key), np.zeros_like(value))
            self.slots = [Slot(*nothing, 0.0) for _ in range(self.s)]
        weight = float(np.sum(value.astype(np.float64) ** 2))
        self.mu += weight
        for j, slot in enumerate(self.slots):
            if weight > 0 and self.mu >= slot.due:
                slot.key, slot.value = key, value
                slot.due = self.mu / (draw(self.seed, 2, self.head, j, self.n) / 2**25)
        self.n += 1

    def answer(self, query: Vector) -> Vector:
        """``z / tau``, as the paper writes it: no logarithms."""
        z = sum(
            (self.mu / (self.s * float(np.sum(slot.value**2))) * math.exp(float(query @ slot.key)) * slot.value)
            for slot in self.slots
            if np.any(slot.value)
        )
        tau = sum(
            len(c.members) / self.t * sum(math.exp(float(query @ sample)) for sample in c.samples)
            for c in self.clusters
        )
        out: Vector = np.asarray(z) / tau if self.mu else np.zeros_like(self.slots[0].value)
        return out
