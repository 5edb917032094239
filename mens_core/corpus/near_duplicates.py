"""Code that is almost the same as code that was kept: MinHash finds candidates, an exact comparison decides.

A text is the set of all its runs of five tokens (shingles: Broder, "On the resemblance and containment of
documents", 1997). Two texts are as similar as the share of shingles they have in common (Jaccard). Candidates come
from MinHash signatures in a locality-sensitive index; since each is compared with the earlier text itself, nothing
is left out on an estimate, and a pair at the threshold goes unnoticed in about one of a hundred cases.
"""

from __future__ import annotations

import re
from typing import IO

import numpy as np
import numpy.typing as npt
from rensa import RMinHash, RMinHashLSH

__all__ = ["NearDuplicates", "similarity"]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_SHINGLE_TOKENS = 5
# Texts that are 0.85 similar share all five values of one of eight bands with probability
# 1 - (1 - 0.85**5)**8 = 0.99. Twice the bands found no more in the standard library, in twice the memory.
_PERMUTATIONS, _BANDS = 40, 8
# Candidates that are compared exactly: those whose signatures are the nearest.
_COMPARED = 8
# So far below the threshold a signature's estimate falls once in ten thousand texts (binomial, 40 values, 0.85).
_SLACK = 0.25
_SEED = 0


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts, from 0 (no shingle in common) to 1 (the same shingles)."""
    return _jaccard(_shingles(one), _shingles(other))


class NearDuplicates:
    """The texts that were kept, on disk, and an index of them, some 900 bytes a text.

    Args:
        file: binary, empty, open for reading and writing; the texts are kept in it.
        threshold: similarity from which a text is too near to an earlier one, above 0, up to 1.
    """

    def __init__(self, file: IO[bytes], threshold: float) -> None:
        self._file, self._threshold = file, threshold
        self._index = RMinHashLSH(threshold, _PERMUTATIONS, _BANDS)
        #: Where each text begins; the last entry is where the next one will.
        self._starts = [0]
        #: The signatures by number; the array doubles when it is full.
        self._values = np.empty((1024, _PERMUTATIONS), np.uint32)

    def admit(self, text: str) -> tuple[int, float] | None:
        """Keep a text, unless it is too near to one that was kept.

        Returns:
            None if it is kept now; otherwise the number of the nearest one, counted from 0 over those kept, and
            its similarity.
        """
        # A docstring may spell half a surrogate pair, which neither the index nor the file can hold.
        data = text.encode("utf-8", "replace")
        shingles = _shingles(data.decode())
        signature = RMinHash(_PERMUTATIONS, _SEED)
        signature.update(list(shingles))
        values = np.array(signature.digest(), np.uint32)
        found = sorted(self._index.query(signature))
        candidates = self._nearest(np.array(found, np.intp), values) if found else []
        nearest = max(((_jaccard(shingles, _shingles(self._text(key))), -key) for key in candidates), default=(0.0, 0))
        if nearest[0] >= self._threshold:
            return -nearest[1], nearest[0]
        self._keep(data, signature, values)
        return None

    def _nearest(self, candidates: npt.NDArray[np.intp], values: npt.NDArray[np.uint32]) -> list[int]:
        """The few candidates with the most values in common, so that a crowd of likes takes no longer."""
        common = np.count_nonzero(self._values[candidates] == values, axis=1)
        order = np.argsort(-common, kind="stable")[:_COMPARED]
        near: list[int] = candidates[order[common[order] >= (self._threshold - _SLACK) * _PERMUTATIONS]].tolist()
        return near

    def _keep(self, data: bytes, signature: RMinHash, values: npt.NDArray[np.uint32]) -> None:
        number = len(self._starts) - 1
        if number == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[number] = values
        self._index.insert(number, signature)
        self._file.seek(self._starts[-1])
        self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))

    def _text(self, number: int) -> str:
        start, end = self._starts[number : number + 2]
        self._file.seek(start)
        return self._file.read(end - start).decode()


def _shingles(text: str) -> set[str]:
    tokens = _TOKEN.findall(text)
    return {" ".join(tokens[at : at + _SHINGLE_TOKENS]) for at in range(max(1, len(tokens) - _SHINGLE_TOKENS + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
