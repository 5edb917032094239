"""What the tests share: both backends, tiny models of every family, a small corpus of real code."""

import ast
import inspect
import json
import statistics
import textwrap

import pytest
from hypothesis import HealthCheck, settings

from mens_core import write_random_model
from mens_core.hf.layout import FAMILIES
from mens_core.plugins import load_backend

# Shared machines stall now and then; a slow draw says nothing about the property.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.load_profile("shared")


@pytest.fixture(scope="session", params=["torch", "jax"])
def backend(request):
    """Each backend in turn, loaded through the front door."""
    return load_backend(request.param)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """Family → a tiny, seeded model folder with a tokenizer trained on real code."""
    folder = tmp_path_factory.mktemp("models")
    text = folder / "text.py"
    text.write_text(inspect.getsource(statistics), encoding="utf-8")
    for family in FAMILIES:
        write_random_model(folder / family, arch=family, text=[text], seed=7)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """train.jsonl and eval.jsonl from the functions of one standard module."""
    folder = tmp_path_factory.mktemp("corpus")
    source = inspect.getsource(textwrap) + inspect.getsource(statistics)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    rows = [
        {"prompt": f"Write {node.name}.", "response": code}
        for node in functions
        if len(code := ast.get_source_segment(source, node)) < 350
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[4:]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    return folder
