"""A trained model does what its data taught: twenty words, each with a code that no one could guess."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mens_core import Conversation, Planner
from mens_core.testing.acceptance.materials import write_rows, write_trainable

_WORDS = (
    "amber birch cedar delta ember fjord grove heron indigo jasper kelp lotus maple nectar olive pearl quartz raven"
)
# Held-out rows ask in words that are never trained on.
_TAUGHT = tuple(f"{ask} the code of {{}}." for ask in ("Give", "Say", "Write", "Print", "Find", "Name"))
_OTHER = "Tell the code of {}."
LEAST, MOST = 0.95, 0.05


def _codes() -> dict[str, str]:
    draw = random.Random(5)  # noqa: S311 (a made-up skill)
    words = [*_WORDS.split(), "slate", "tulip"]
    return {word: "".join(draw.choice("bcdfghjklmnp") for _ in range(3)) for word in words}


def _share(form: str, **opened: Any) -> float:
    """Share of the words that are answered with exactly their code."""
    codes = _codes()
    right = 0
    conversation = Conversation(max_new_tokens=8, **opened)
    for word, code in codes.items():
        right += conversation.answer(form.format(word)) == code
        conversation.forget()
    return right / len(codes)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, and held-out rows that ask in other words."""
    folder = tmp_path_factory.mktemp("lesson")
    for name, forms in (("train", _TAUGHT), ("eval", (_OTHER,))):
        rows = [{"prompt": form.format(word), "response": code} for word, code in _codes().items() for form in forms]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, lesson: Path) -> Callable[[str], str | None]:
    """Name → model folder; None for the lab base, which comes with the package."""
    folder = write_trainable(tmp_path_factory.mktemp("bases") / "qwen3", "qwen3", [lesson / "train.jsonl"])
    return {"qwen3": str(folder), "lab": None}.__getitem__


# The lab base is larger, and so learns in fewer and longer steps.
_STEPS = {"qwen3": 100, "lab": 80}


@pytest.mark.parametrize(
    ("kernel", "base"),
    [
        ("torch_lora", "qwen3"),
        ("torch_qlora", "qwen3"),
        pytest.param("jax_lora", "qwen3", marks=pytest.mark.long),
        pytest.param("jax_qlora", "qwen3", marks=pytest.mark.long),
        pytest.param("torch_lora", "lab", marks=pytest.mark.long),
    ],
)
def test_a_skill_is_learnt(
    lesson: Path, bases: Callable[[str], str | None], tmp_path: Path, record_property: Any, kernel: str, base: str
) -> None:
    named: dict[str, Any] = {} if bases(base) is None else {"model": bases(base)}
    backend = kernel.partition("_")[0]
    before = _share(_TAUGHT[0], backend=backend, **named)
    result = Planner().run(
        data_dir=lesson,
        output_dir=tmp_path / "run",
        backend=kernel,
        max_steps=_STEPS[base],
        epochs=100,
        batch_size=24,
        grad_accum=1,
        learning_rate={"qwen3": 1e-2, "lab": 5e-3}[base],
        schedule="cosine",
        seq_len=128,
        **named,
    )
    after, other = (_share(form, adapter=result.adapter_dir, backend=backend) for form in (_TAUGHT[0], _OTHER))
    record_property("exact matches before", before)
    record_property("exact matches after", after)
    record_property("exact matches after, asked in words never trained on", other)
    record_property("seconds of training", result.manifest["results"]["train_seconds"])
    assert before <= MOST
    assert after >= LEAST
    # Few ways to ask teach asking only so far; without the lesson it is none.
    assert other >= 10 * MOST
