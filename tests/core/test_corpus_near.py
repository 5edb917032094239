"""Near duplicates: what is left out is as near as the threshold says, and what is nearer is left out."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.collector import NEAR
from mens_core.corpus.near_duplicates import NearDuplicates, similarity
from mens_core.corpus.pairs import write_pairs
from mens_core.corpus.pairs_defaults import SIMILARITY


def texts_with_neighbours(count: int) -> list[str]:
    """Random texts, each followed by copies with a growing number of other words."""
    chance = random.Random(7)  # noqa: S311 (a seeded test)
    texts = []
    for number in range(count):
        words = [f"w{chance.randrange(10_000)}" for _ in range(120)]
        for changes in (0, 0, 1, 2, 4, 8, 24):
            copy = list(words)
            for at in chance.sample(range(120), changes):
                copy[at] = f"v{number}_{at}"
            texts.append(" ".join(copy))
    return texts


def admitted(texts: list[str], threshold: float) -> tuple[list[str], list[tuple[str, int, float]]]:
    kept, near = [], []
    with tempfile.TemporaryFile() as file:
        index = NearDuplicates(file, threshold)
        for text in texts:
            nearest = index.admit(text)
            if nearest is None:
                kept.append(text)
            else:
                near.append((text, *nearest))
    return kept, near


@pytest.mark.parametrize("threshold", [SIMILARITY, 1.0])
def test_what_is_left_out_is_as_near_to_a_kept_text_as_is_said(threshold: float) -> None:
    kept, near = admitted(texts_with_neighbours(25), threshold)
    assert near
    for text, number, told in near:
        assert similarity(text, kept[number]) == told >= threshold


def test_nearly_all_that_is_too_near_is_found_and_nothing_else() -> None:
    texts = texts_with_neighbours(25)
    kept, near = admitted(texts, SIMILARITY)
    missed = sum(similarity(one, other) >= SIMILARITY for one, other in itertools.combinations(kept, 2))
    assert missed <= 0.02 * len(near)
    # The twin: with a threshold of 1 most of these stay.
    kept, near = admitted(texts, 1.0)
    assert sum(similarity(one, other) >= SIMILARITY for one, other in itertools.combinations(kept, 2)) > len(near)


@given(st.text(max_size=80), st.text(max_size=80))
def test_similarity_is_symmetric_and_one_for_equal_tokens(one: str, other: str) -> None:
    assert similarity(one, other) == similarity(other, one)
    assert similarity(one, f"  {one}\n") == 1


def test_a_crowd_of_texts_that_are_alike_but_not_near_is_compared_with_a_few_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = " ".join(f"word{number}" for number in range(40))
    texts = [f"{common} {' '.join(f'own{number}_{at}' for at in range(8))}" for number in range(300)]
    compared = []
    text_of = NearDuplicates._text
    monkeypatch.setattr(NearDuplicates, "_text", lambda self, key: compared.append(key) or text_of(self, key))
    kept, _ = admitted(texts, SIMILARITY)
    assert len(kept) == 300
    assert 300 < len(compared) <= 300 * 8


def test_half_a_surrogate_pair_can_be_compared() -> None:
    kept, near = admitted(["a \ud800 b c d e f", "a \ud800 b c d e f"], SIMILARITY)
    assert (len(kept), len(near)) == (1, 1)


def long_function(name: str, lines: int, last: str) -> str:
    body = "".join(f"    value = step_{number}(value, {number})\n" for number in range(lines))
    return f"def {name}(value):\n{body}    return {last}\n"


def test_a_function_nearly_equal_to_an_earlier_one_gives_no_rows_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(f"{long_function('a', 12, 'value')}\n\n{long_function('b', 12, 'None')}")
    (tmp_path / "n.py").write_text(long_function("c", 20, "[value]"))
    plain = {"negatives": 0, "multi_turn": 0, "eval_fraction": 0}
    report = write_pairs([tmp_path / "m.py", tmp_path / "n.py"], tmp_path / "out", **plain)
    tally = report.duplicates_dropped[NEAR]
    assert (report.rows["train"], tally.count) == (2, 1)
    assert tally.examples[0].startswith("m.py:17, 9")
    assert tally.examples[0].endswith("% like m.py:1")
    assert NEAR in report.text()
    strict = write_pairs([tmp_path / "m.py"], tmp_path / "strict", near_duplicates=1, **plain)
    assert (strict.rows["train"], strict.duplicates_dropped) == (2, {})
