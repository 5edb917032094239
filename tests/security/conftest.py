"""Every hostile file is tried on the same bench."""

import pytest
from hostile import Bench


@pytest.fixture
def bench(tmp_path, model_dirs, corpus_dir, monkeypatch):
    """A world of a model, rows, an adapter's place and an output's place, and a watched way to run a verb."""
    return Bench(tmp_path, model_dirs, corpus_dir, monkeypatch)
