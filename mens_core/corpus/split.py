"""Which rows are held out: decided by content, so that the same text is never in both parts.

    rows ─▶ groups (same origin) ─▶ joined where they share a prompt or a response ─▶ hash ─▶ train or eval

Adding a file moves no other group to the other part, unless it joins two of them.
"""

from __future__ import annotations

import hashlib

__all__ = ["Groups", "fingerprint"]


def fingerprint(*texts: str) -> bytes:
    """Sixteen bytes that stand for the texts, whatever their blanks and line breaks (BLAKE2b, RFC 7693)."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(" ".join(text.split()).encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


class Groups:
    """Rows joined into groups by the fingerprints they share (union-find)."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._group_of: dict[bytes, int] = {}
        #: The smallest fingerprint of a group is its name: it does not depend on the order of the rows.
        self._name: list[bytes] = []

    def add(self, marks: list[bytes]) -> int:
        """Add a row with its fingerprints; returns a handle for ``held_out``."""
        row = len(self._parent)
        self._parent.append(row)
        self._name.append(min(marks))
        for mark in marks:
            self._join(row, self._group_of.setdefault(mark, row))
        return row

    def held_out(self, fraction: float, seed: int) -> list[bool]:
        """For each row in the order of adding, whether it is held out.

        Each group is held out with probability ``fraction``, by a hash of its name and the seed. When chance
        would leave one part empty, the group nearest to the line changes sides, if there are two groups.

        Args:
            fraction: from 0, which holds nothing out, to less than 1.
            seed: another seed draws another part.
        """
        roots = [self._root(row) for row in range(len(self._parent))]
        ranked = sorted((self._score(root, seed), root) for root in set(roots))
        count = sum(score < fraction for score, _ in ranked)
        if fraction > 0 and len(ranked) > 1:
            count = min(max(count, 1), len(ranked) - 1)
        chosen = {root for _, root in ranked[:count]}
        return [root in chosen for root in roots]

    def _score(self, root: int, seed: int) -> float:
        digest = hashlib.blake2b(f"{seed}:".encode() + self._name[root], digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    def _root(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self._parent[second] = first
        self._name[first] = min(self._name[first], self._name[second])
