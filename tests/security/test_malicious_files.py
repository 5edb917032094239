"""Hostile rows, mixes, settings, adapters and run folders through the public verbs."""

import gzip
import json
import os
import resource
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import zstandard
from hostile import pickle_bomb, steering

from mens_core.artifacts.tensors import write_tensors

ROW = {"prompt": "Say so.", "response": "So."}
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\u202e"


def _line(value):
    return (json.dumps(value) + "\n").encode()


def _rows(raw, name="train.jsonl"):
    def spoil(bench):
        for found in bench.data.iterdir():
            found.unlink()
        (bench.data / name).write_bytes(raw() if callable(raw) else raw)

    return spoil


def _linked(target):
    def spoil(bench):
        (bench.data / "train.jsonl").unlink()
        (bench.data / "train.jsonl").symlink_to(target)

    return spoil


def _piped(bench):
    (bench.data / "train.jsonl").unlink()
    os.mkfifo(bench.data / "train.jsonl")


def _sparse(bench):
    with (bench.data / "train.jsonl").open("ab") as file:
        file.truncate(1 << 28)


def _contract(text):
    return lambda bench: (bench.data / "training_contract.yaml").write_text(text)


DEEP = b"[" * 1_000_000
ROWS = {
    "rows that nest": _rows(b'{"prompt": ' + DEEP + b"\n"),
    "rows that nest and close": _rows(b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
    "rows with a key twice": _rows(b'{"prompt": "a", "prompt": "b", "response": "c"}\n'),
    "rows with NaN": _rows(b'{"prompt": "a", "response": "b", "rating": NaN}\n'),
    "rows with an endless number": _rows(b'{"prompt": "a", "response": "b", "rating": 1' + b"0" * 100_000 + b"}\n"),
    "rows with half a surrogate": _rows(b'{"prompt": "\\ud800", "response": "b"}\n'),
    "rows of bytes that are no text": _rows(b"\xff\xfe\x00\x01" * 1000),
    "rows of NULs": _rows(b"\0" * 100_000 + b"\n"),
    "rows of lists": _rows(_line([ROW])),
    "rows of objects in place of texts": _rows(_line({"prompt": {"$ref": "#"}, "response": ["b"]})),
    "rows of a role nobody has": _rows(_line({"messages": [{"role": "root\x1b[31m", "content": "x"}]})),
    "a row without end": _sparse,
    "a gzip bomb": _rows(lambda: gzip.compress(b" " * (1 << 28)), "train.jsonl.gz"),
    "a Zstandard bomb": _rows(lambda: zstandard.compress(b" " * (1 << 30)), "train.jsonl.zst"),
    "a gzip bomb of lists": _rows(lambda: gzip.compress(b"[" + b"[]," * (1 << 25) + b"[]]"), "train.jsonl.gz"),
    "a gzip file cut short": _rows(lambda: gzip.compress(_line(ROW) * 1000)[:-20], "train.jsonl.gz"),
    "rows that are a device": _linked("/dev/zero"),
    "rows that link in a circle": _linked("train.jsonl"),
    "rows that are a pipe": _piped,
    "a contract that makes objects": _contract("train_path: !!python/object/apply:os.system ['touch $CANARY']"),
    "a contract that names another file of the system": _contract("train_path: ../../../../../../etc/passwd"),
    "a contract with a NUL": _contract('train_path: "a\\0b"'),
    "a contract that nests": _contract("[" * 5000),
}

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi")
)
YAML = {
    "an object": "!!python/object/apply:os.system ['touch \"$CANARY\"']",
    "an object as a value": "sources: !!python/object/new:os.system ['touch \"$CANARY\"']",
    "a name": "sources: !!python/name:os.system",
    "a module": "sources: !!python/module:os",
    "a tuple": "sources: !!python/tuple [1, 2]",
    "a tag of its own": "sources: !include /etc/passwd",
    "a billion laughs": LAUGHS,
    "an anchor that holds itself": "sources: &a [*a]",
    "a merge": "x: &x {path: a}\nsources: [{<<: *x}]",
    "a merge without anchor": "sources: [{<<: {path: train.jsonl}}]",
    "a key twice": "sources: []\nsources: []",
    "a key that is a list": "? [a, b]\n: c",
    "a key that is a mapping": "? {a: b}\n: c",
    "depth": "[" * 3000,
    "depth of mappings": "{a: " * 3000,
    "two documents": "a: 1\n---\nb: 2",
    "a number without end": "sources: 1" + "0" * 100_000,
    "a date that is none": "sources: 2024-99-99",
    "binary that is none": "sources: !!binary '***'",
    "an integer in base sixty": "sources: 999999:99:99",
    "controls": 'sources: "\x1b[31m"',
    "escapes": 'sour\\x1bces: 1\n"so\\e[31mrces": [1]',
    "a set": "sources: !!set {a, b}",
    "bytes": b"\xff\xfe\x00",
    "length": "#" * 2_000_000,
}


def _adapter(bench, config=None, tensors=None):
    bench.adapter.mkdir(exist_ok=True)
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    content = base | (config or {})
    (bench.adapter / "adapter_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if tensors is None:
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{name}.lora_A.weight": np.ones((2, 64), np.float32),
            f"{name}.lora_B.weight": np.ones((64, 2), np.float32),
        }
    write_tensors(bench.adapter / "adapter_model.safetensors", tensors, {})


def _with(**config):
    return lambda bench: _adapter(bench, config)


def _without_weights(spoil):
    def make(bench):
        _adapter(bench)
        (bench.adapter / "adapter_model.safetensors").unlink()
        spoil(bench.adapter)

    return make


def _weights_at(target):
    return lambda folder: (folder / "adapter_model.safetensors").symlink_to(target)


def _raw_config(text):
    def make(bench):
        _adapter(bench)
        (bench.adapter / "adapter_config.json").write_text(text)

    return make


ADAPTERS = {
    "pickled weights": _without_weights(lambda folder: (folder / "adapter_model.bin").write_bytes(pickle_bomb())),
    "a pickle that is called safetensors": _without_weights(
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(pickle_bomb() * 9)
    ),
    "weights that link out": _without_weights(_weights_at("/etc/passwd")),
    "weights that are a device": _without_weights(_weights_at("/dev/zero")),
    "weights that are a pipe": _without_weights(lambda folder: os.mkfifo(folder / "adapter_model.safetensors")),
    "no weights": _without_weights(lambda _: None),
    "settings that nest": _raw_config("[" * 200_000),
    "settings of three million lists": _raw_config("[" + "[]," * 3_000_000 + "[]]"),
    "settings that are a text": _raw_config('"LORA"'),
    "settings with a key twice": _raw_config('{"peft_type": "LORA", "r": 2, "r": 3}'),
    "a negative rank": _with(r=-2),
    "a huge rank": _with(r=10**30),
    "a rank that is true": _with(r=True),
    "an infinite scale": _raw_config('{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}'),
    "a scale that is a list": _with(lora_alpha=[4]),
    "a pattern without end": _with(rank_pattern={"([a-z_]+)+[0-9]": 3}),
    "a pattern of alternatives without end": _with(alpha_pattern={"(a|a|[a-z])*[0-9]": 3}),
    "a pattern of many repeats": _with(rank_pattern={".*" * 30 + "x": 3}),
    "a pattern that is none": _with(rank_pattern={"(((": 3}),
    "a pattern that is a list": _with(rank_pattern=["q_proj"]),
    "a pattern of no number": _with(alpha_pattern={"q_proj": "4"}),
    "targets without end": _with(target_modules="(([a-z._0-9]+)+)+!"),
    "targets that are no pattern": _with(target_modules="*["),
    "targets that are numbers": _with(target_modules=[1, 2]),
    "exclusions that are numbers": _with(exclude_modules=7),
    "layers that are texts": _with(layers_to_transform="all"),
    "DoRA": _with(use_dora=True),
    "a name that climbs": lambda bench: _adapter(bench, None, {"base_model.model.../../x": np.ones(4, np.float32)}),
    "a name with controls": lambda bench: _adapter(bench, None, {ESCAPES[:4]: np.ones(4, np.float32)}),
    "half an update": lambda bench: _adapter(
        bench, None, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 64), np.float32)}
    ),
}


def _run_folder(manifest, telemetry="", **files):
    def make(bench):
        bench.adapter.mkdir()
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (bench.adapter / "training_manifest.json").write_text(text)
        (bench.adapter / "telemetry.jsonl").write_text(telemetry)
        for name, content in files.items():
            (bench.adapter / name).write_text(content)

    return make


COMPLETE = {"status": "complete"}
RUNS = {
    "a manifest that nests": _run_folder("[" * 200_000),
    "a manifest with a key twice": _run_folder('{"status": "failed", "status": "complete"}'),
    "a manifest that is a list": _run_folder([1]),
    "a manifest of no status": _run_folder({"status": {"complete": True}}),
    "a manifest of an unknown status": _run_folder({"status": "complete\x1b[31m"}),
    "telemetry that is no JSON": _run_folder(COMPLETE, "step\n"),
    "telemetry that nests": _run_folder(COMPLETE, "[" * 200_000 + "\n"),
    "telemetry of NaN": _run_folder(
        COMPLETE, '{"ts_ms": 1, "event": "evaluation", "payload": {"step": 0, "eval_loss": NaN}}\n'
    ),
    "telemetry of an unknown event": _run_folder(COMPLETE, '{"ts_ms": 1, "event": "pwned", "payload": {}}\n'),
    "telemetry of a field too many": _run_folder(
        COMPLETE, '{"ts_ms": 1, "event": "evaluation", "payload": {"step": 0, "eval_loss": 1, "x": 1}}\n'
    ),
    "telemetry without end": _run_folder(COMPLETE, "x" * 3_000_000),
}
LYING = COMPLETE | {"finetune_contract_digest": "x", "sha256": {}}
LYING_RUNS = {
    "no plan": COMPLETE,
    "a plan that is a text": LYING | {"plan": "x"},
    "hashes that are a list": LYING | {"plan": {"contract": {}, "contents": {}}, "sha256": []},
}


@pytest.mark.parametrize("case", ROWS)
def test_hostile_rows_are_refused(case, bench, capsys):
    ROWS[case](bench)
    bench.refused("plan", capsys)


@pytest.mark.parametrize("case", ["rows that nest", "a gzip bomb", "a row without end", "rows of a role nobody has"])
def test_rows_are_shown_no_sooner_than_they_are_read(case, bench, capsys):
    ROWS[case](bench)
    bench.refused("show", capsys)


def test_rows_that_steer_the_terminal_are_shown_escaped(bench, capsys):
    _rows(_line({"prompt": ESCAPES, "response": f"So {ESCAPES}", "source": ESCAPES, "category": ESCAPES}) * 9)(bench)
    code, printed, _ = bench.run("show", capsys)
    assert code == 0
    assert "\\x1b[2J" in printed
    assert "\\u202e" in printed


def test_the_watch_for_steering_sees_it():
    assert steering(ESCAPES)
    assert not steering("So\n\tsaid é 字 👩‍👩‍👧")


def test_a_folder_whose_name_steers_the_terminal_is_shown_escaped(bench, capsys):
    named = bench.data.with_name("da\x1b[31mta\n")
    bench.data.rename(named)
    bench.data = named
    code, printed, _ = bench.run("show", capsys)
    assert code == 0
    assert "\\x1b[31m" in printed


@pytest.mark.parametrize("verb", ["mix", "config"])
@pytest.mark.parametrize("case", YAML)
def test_hostile_yaml_is_refused(case, verb, bench, capsys):
    content = YAML[case]
    raw = content if isinstance(content, bytes) else content.encode()
    (bench.world / {"mix": "mix.yaml", "config": "run.yaml"}[verb]).write_bytes(raw)
    bench.refused(verb, capsys)


@pytest.mark.parametrize("target", ["/dev/zero", "mix.yaml", "pipe"])
def test_yaml_that_is_no_file_is_refused(target, bench, capsys):
    os.mkfifo(bench.world / "pipe")
    (bench.world / "mix.yaml").symlink_to(target)
    bench.refused("mix", capsys)


@pytest.mark.parametrize("verb", ["info", "merge"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_hostile_adapter_is_refused(case, verb, bench, capsys):
    ADAPTERS[case](bench)
    bench.refused(verb, capsys)


@pytest.mark.parametrize("case", ["pickled weights", "a pattern without end", "a huge rank", "weights that link out"])
@pytest.mark.parametrize("verb", ["generate", "start"])
def test_a_hostile_adapter_is_refused_by_whoever_uses_one(case, verb, bench, capsys):
    ADAPTERS[case](bench)
    bench.refused(verb, capsys)


def test_a_friendly_adapter_is_described(bench, capsys):
    """The twin of the refusals."""
    _adapter(bench)
    assert bench.run("info", capsys)[0] == 0


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_lies_about_its_form_is_refused(case, bench, capsys):
    RUNS[case](bench)
    bench.refused("status", capsys)


@pytest.mark.parametrize("case", LYING_RUNS)
def test_a_manifest_that_lacks_what_is_verified_is_refused(case, bench, capsys):
    _run_folder(LYING_RUNS[case])(bench)
    bench.refused("verify", capsys)


def test_what_a_run_says_of_itself_is_shown_escaped(bench, capsys):
    _run_folder({"status": "failed", "error": f"Error: {ESCAPES}"})(bench)
    code, printed, _ = bench.run("status", capsys)
    assert code == 1
    assert "\\x1b[2J" in printed


BOMBS = ("a Zstandard bomb", "a gzip bomb of lists", "a row without end")


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_within_two_gigabytes_of_addresses(case, bench):
    """The twin of the bench's own account: the system itself would stop who takes more."""
    ROWS[case](bench)
    limit = 2 << 30
    done = subprocess.run(
        [sys.executable, "-m", "mens_core", "corpus", "validate", *map(str, bench.data.glob("train.jsonl*"))],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "has a line of more than 16,777,216 bytes" in done.stdout + done.stderr
