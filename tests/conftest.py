"""What the tests share: both backends, tiny models of every family, a small corpus of real code."""

import argparse
import ast
import atexit
import gc
import inspect
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import textwrap
from pathlib import Path

# Before anything loads NumPy, whose threads are counted then: tiny matrices gain nothing from a second one, and waiting
# for one that shares its core costs a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from mens_core import write_random_model
from mens_core.hf.layout import GRAPHS
from mens_core.plugins import load_backend

# What was measured on this machine is its user's and not the tests'; child processes inherit this.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mens-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# What JAX compiles once serves the whole run: xdist's workers, child processes, and every test that starts anew.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mens-tests-jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# LLVM's passes are two fifths of what tiny programs take to compile. With them run the gate, which does not come by
# here, and the example of both backends.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Shared machines stall now and then; a slow draw says nothing about the property.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.load_profile("shared")


# Linux gives a process 65,530 pieces of memory, and LLVM ends it when it gets no more. What JAX has compiled takes four
# each or more, the largest module's tests 11,000.
MANY_PIECES = 20_000


@pytest.fixture(scope="module", autouse=True)
def _room_for_what_jax_compiles():
    yield
    if "jax" in sys.modules and _pieces_of_memory() > MANY_PIECES:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _pieces_of_memory():
    told = Path("/proc/self/maps")
    return told.read_bytes().count(b"\n") if told.exists() else 0


# A run on JAX compiles for half a minute. Every method and family is met without these, and all pairs by the gate.
LONG_RUNS = {("jax", "lora", "llama"), ("jax", "lora", "qwen2"), ("jax", "qlora", "gpt2"), ("jax", "qlora", "qwen3")}
# Two steps that JAX compiles for each.
LONG_COMPILATIONS = {("jax", "gpt2"), ("jax", "qwen3")}


def pytest_collection_modifyitems(items):
    """Mark what takes long."""
    for item in items:
        asked = item.callspec.params if hasattr(item, "callspec") else {}
        kernel = tuple(map(asked.get, ("backend", "method", "family")))
        runs = item.path.name == "test_training.py" and kernel in LONG_RUNS
        compiles = item.path.name == "test_checkpointing.py" and (kernel[0], kernel[2]) in LONG_COMPILATIONS
        if runs or compiles:
            item.add_marker(pytest.mark.long)


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
    for family in GRAPHS:
        write_random_model(folder / family, arch=family, text=[text], seed=7)
    return {family: folder / family for family in GRAPHS}


def _text_of(node, lines):
    # What ast.get_source_segment gives, which splits the whole source anew for every node.
    *before, last = lines[node.lineno - 1 : node.end_lineno]
    return "".join([*before, last[: node.end_col_offset]])[node.col_offset :]


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """train.jsonl and eval.jsonl from the functions of one standard module."""
    folder = tmp_path_factory.mktemp("corpus")
    source = "".join(map(inspect.getsource, (argparse, random, shutil, statistics, textwrap)))
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines = source.splitlines(keepends=True)
    rows = [
        {"prompt": f"Write {node.name}.", "response": code}
        for node in functions
        # Rows of like length, so that a backend that compiles for shapes does so once.
        if 230 < len(code := _text_of(node, lines)) < 350
    ]
    written = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(written[4:]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(written[:4]), encoding="utf-8")
    return folder
