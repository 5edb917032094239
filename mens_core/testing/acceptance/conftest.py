"""What the rows share: both backends, tiny models with tokenizers of their own, and a corpus with tool traces."""

from __future__ import annotations

import os

# Before anything loads NumPy, whose threads are counted then: tiny matrices gain nothing from a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

from mens_core.backend import Backend
from mens_core.plugins import load_backend
from mens_core.testing.acceptance.materials import write_corpus, write_trainable

NAMES = ("torch", "jax")


def pytest_configure(config: pytest.Config) -> None:
    """Name the mark of what takes more than some seconds; the gate runs it all, ``make test`` leaves it out."""
    config.addinivalue_line("markers", "long: takes half a minute or more")


@pytest.fixture(scope="session")
def backends() -> dict[str, Backend]:
    """Both backends, loaded through the front door."""
    return {name: load_backend(name) for name in NAMES}


@pytest.fixture(scope="session", params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    return load_backend(request.param)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of pairs from source code, mixed with tool traces, with held-out rows."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[[str], Path]:
    """Family → a tiny seeded model folder with a Hugging Face tokenizer trained on the corpus."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_trainable(root / family, family, [corpus / "train.jsonl"])
        return made[family]

    return folder
