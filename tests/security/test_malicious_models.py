"""Hostile model folders through the public verbs: refused with one error, nothing run, nothing written, bounded."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hostile import CANARY, pickle_bomb

from mens_core.artifacts.tensors import read_tensors, write_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _config(**values):
    return lambda model: _edit(model / "config.json", lambda config: config.update(values))


def _text(name, text):
    return lambda model: (model / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _shard(name, target=None):
    """The only shard is called so by the index; a target makes it a link."""

    def spoil(model):
        names = list(read_tensors(model / WEIGHTS))
        (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        if target is not None:
            (model / name).symlink_to(target)

    return spoil


def _header(change):
    """A weight file whose header was changed; what follows it stays."""

    def spoil(model):
        raw = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        text = change(header)
        text = json.dumps(header).encode() if text is None else text
        (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return spoil


def _first(**values):
    """Values for the first tensor's entry."""

    def change(header):
        next(entry for name, entry in header.items() if name != "__metadata__").update(values)

    return _header(change)


def _overlap(header):
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    same = next((a, b) for a in entries for b in entries if a is not b and a["shape"] == b["shape"])
    same[0]["data_offsets"] = same[1]["data_offsets"]


def _gap(header):
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]


def _twice(header):
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1].encode() + f", {json.dumps(name)}: {json.dumps(header[name])}}}".encode()


def _length(value):
    return lambda model: (model / WEIGHTS).write_bytes(value.to_bytes(8, "little") + b"{}")


def _sparse(model):
    with (model / WEIGHTS).open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)


def _numbers(value):
    def spoil(model):
        tensors = {name: np.array(tensor) for name, tensor in read_tensors(model / WEIGHTS).items()}
        next(iter(tensors.values())).flat[3] = value
        write_tensors(model / WEIGHTS, tensors, {"format": "pt"})

    return spoil


def _replaced(name, make):
    def spoil(model):
        (model / name).unlink()
        make(model / name)

    return spoil


def _pickled(*names):
    def spoil(model):
        (model / WEIGHTS).unlink()
        for name in names:
            (model / name).write_bytes(pickle_bomb())

    return spoil


def _template(source):
    def spoil(model):
        # The rows' text passes through the template; what it writes decides.
        (model / "chat_template.jinja").write_text(source)

    return spoil


DEEP = "[" * 200_000
NESTED = '{"a":' * 500 + "1" + "}" * 500
WIDE = "[" + "[]," * 3_000_000 + "[]]"
REFUSED = {
    "index that climbs": _shard("../elsewhere.safetensors"),
    "index that climbs twice": _shard("../../elsewhere.safetensors"),
    "index with an absolute path": _shard("/etc/passwd.safetensors"),
    "index with a backslash": _shard("..\\elsewhere.safetensors"),
    "index with a NUL": _shard("a\0.safetensors"),
    "index that names a pickle": _shard("pytorch_model.bin"),
    "index that names nothing": _shard("absent.safetensors"),
    "index that is no object": lambda model: (_shard("x.safetensors")(model), _text(INDEX, "[1]")(model)),
    "index that nests": lambda model: (_shard("x.safetensors")(model), _text(INDEX, DEEP)(model)),
    "shard that links out": _shard("shard.safetensors", "../elsewhere.safetensors"),
    "shard that links to a device": _shard("shard.safetensors", "/dev/zero"),
    "shard that links in a circle": _shard("shard.safetensors", "shard.safetensors"),
    "weights that link out": _replaced(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")),
    "config that links out": _replaced("config.json", lambda path: path.symlink_to("/etc/passwd")),
    "tokenizer that links out": _replaced("tokenizer.json", lambda path: path.symlink_to("/etc/passwd")),
    "weights that are a pipe": _replaced(WEIGHTS, os.mkfifo),
    "config that is a pipe": _replaced("config.json", os.mkfifo),
    "tokenizer that is a pipe": _replaced("tokenizer.json", os.mkfifo),
    "weights that are a folder": _replaced(WEIGHTS, lambda path: path.mkdir()),
    "header longer than the file": _length(10**6),
    "header of 2^63 bytes": _length(2**63),
    "header of 2^64-1 bytes": _length(2**64 - 1),
    "header of 100 MB": _sparse,
    "header that nests": _header(lambda _: DEEP.encode()),
    "header of three million lists": _header(lambda _: WIDE.encode()),
    "header with a name twice": _header(_twice),
    "header that is no object": _header(lambda _: b"[]"),
    "header that is no UTF-8": _header(lambda _: b'{"\xff": 1}'),
    "header with NaN": _header(lambda _: b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
    "tensors that overlap": _header(_overlap),
    "tensors with a gap": _header(_gap),
    "tensor beyond the file": _first(data_offsets=[0, 10**12]),
    "tensor that ends before it begins": _first(data_offsets=[400, 0]),
    "negative offsets": _first(data_offsets=[-8, 8]),
    "unknown type": _first(dtype="F4096"),
    "type that lies": _first(dtype="F64"),
    "type that is a list": _first(dtype=["F32"]),
    "negative shape": _first(shape=[-1, -4]),
    "huge shape": _first(shape=[2**62, 2**62]),
    "shape that overflows to what fits": _first(shape=[2**32, 2**32, 4]),
    "shape with a huge axis and an empty one": _first(shape=[2**63 - 1, 0, 2**63 - 1]),
    "shape of a thousand axes": _first(shape=[1] * 1000),
    "shape of booleans": _first(shape=[True, True]),
    "shape of floats": _first(shape=[1e300]),
    "config that nests": _text("config.json", DEEP),
    "config that nests a little less": _text("config.json", NESTED),
    "config of three million lists": _text("config.json", WIDE),
    "config with a key twice": _text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'),
    "config that is no UTF-8": _text("config.json", b"\xff\xfe{}"),
    "config with an endless number": _config(hidden_size=10**400),
    "config with infinity": _text("config.json", '{"model_type": "llama", "hidden_size": Infinity}'),
    "config of negative layers": _config(num_hidden_layers=-1),
    "config of a billion layers": _config(num_hidden_layers=10**9),
    "config of a huge vocabulary": _config(vocab_size=2**60),
    "tokenizer that nests": _text("tokenizer.json", DEEP),
    "tokenizer of three million lists": _text("tokenizer.json", WIDE),
    "tokenizer of another form": _text("tokenizer.json", '{"model": {"type": "os.system"}}'),
    "tokenizer with ids beyond the model": lambda model: _edit(
        model / "tokenizer.json", lambda t: t["model"]["vocab"].update({"zzzz": 10**9})
    ),
    "pickled weights alone": _pickled("pytorch_model.bin"),
    "pickled weights under other names": _pickled("model.pt", "model.pth", "model.pkl"),
    "pickle that is called safetensors": _replaced(WEIGHTS, lambda path: path.write_bytes(pickle_bomb() * 10)),
}
SCANNED = {"NaN": float("nan"), "infinity": float("inf"), "a signalling NaN": np.uint32(0x7FA00001).view(np.float32)}
TEMPLATES = {
    "endless range": "{% for i in range(10**12) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long texts": "{{ 'x' * 10**10 }}",
    "long lists": "{{ ([0] * 10**10)|length }}",
    "long numbers": "{% set n = namespace(n=9) %}{% for i in range(60) %}{% set n.n = n.n * n.n %}{% endfor %}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "doubling by +": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set s = 'xx' %}" + "{% set s = s ~ s %}" * 60,
    "doubling by blocks": "{% set s = 'xx' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "replacing": "{% set n = namespace(s='xx') %}"
    "{% for i in range(60) %}{% set n.s = n.s.replace('x', 'xxxxxxxx') %}{% endfor %}",
    "joining": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s|join(n.s) %}{% endfor %}",
    "padding": "{{ 'x'.ljust(10000000000) }}",
    "padding by a format": "{{ '%10000000000d' % 1 }}",
    "padding by a width": "{{ '%*d' % (10000000000, 1) }}",
    "padding by a field": "{{ '{:>10000000000}'.format(1) }}",
    "padding by a nested field": "{{ '{:{w}}'.format(1, w=10000000000) }}",
    "indenting": "{{ [1]|tojson(indent=10000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that is wide": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "maps of maps": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "endless output": "{% set s = 'x' * 999999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "sums of lists": "{{ ([range(99999)|list] * 1000)|sum(start=[])|length }}",
    "translation": "{{ ('x' * 9999).translate({120: 'y' * 1000000}) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch \"$CANARY\"') }}",
    "classes by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "generators": "{{ (messages|map('upper')).gi_frame.f_builtins['exec']('1') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "length": "{# " + "x" * 5_000_000 + " #}",
}
NAMES = {"escape": "\x1b[2J\x1b]0;owned\x07", "newline": "a\nerror: nothing is wrong\n", "bell": "\x07\x08\x7f\x9b31m"}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_model_is_refused(case, bench, capsys):
    REFUSED[case](bench.model)
    bench.refused("plan", capsys)


@pytest.mark.parametrize("value", SCANNED)
def test_weights_that_are_no_numbers_are_refused_by_name(value, bench, capsys):
    _numbers(SCANNED[value])(bench.model)
    assert "finite" in bench.refused("scan", capsys)


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_is_refused(case, bench, capsys):
    _template(TEMPLATES[case])(bench.model)
    bench.refused("plan", capsys)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_steer_the_terminal_are_shown_escaped(name, bench, capsys):
    hostile = NAMES[name]

    def rename(header):
        first = next(found for found in header if found != "__metadata__")
        header[first + hostile] = header.pop(first)

    _header(rename)(bench.model)
    bench.refused("train", capsys)


def test_a_model_whose_path_steers_the_terminal_is_shown_escaped(bench, capsys):
    steering = bench.world / "mod\x1b[31mel\x07"
    bench.model.rename(steering)
    bench.model = steering
    code, printed, _ = bench.run("plan", capsys)
    assert code == 0
    assert "\\x1b[31m" in printed


def test_code_that_comes_with_a_model_is_not_run(bench, capsys):
    _config(auto_map={"AutoModelForCausalLM": "modeling_bomb.Bomb", "AutoConfig": "modeling_bomb.Config"})(bench.model)
    code = f"import pathlib; pathlib.Path({str(bench.world / CANARY)!r}).touch()\nBomb = Config = object\n"
    (bench.model / "modeling_bomb.py").write_text(code)
    for file in ("__init__.py", "conftest.py", "setup.py", "tokenization_bomb.py"):
        (bench.model / file).write_text(code)
    _edit(bench.model / "config.json", lambda config: config.update(model_type="llama"))
    code, _, error = bench.run("train", capsys)
    assert code == 0, error


def test_a_model_type_that_only_its_own_code_knows_is_refused(bench, capsys):
    _config(model_type="bomb", auto_map={"AutoModelForCausalLM": "modeling_bomb.Bomb"})(bench.model)
    (bench.model / "modeling_bomb.py").write_text(f"open({str(bench.world / CANARY)!r}, 'w')")
    bench.refused("train", capsys)


def test_a_pickle_beside_safetensors_is_never_looked_at(bench, capsys):
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (bench.model / name).write_bytes(pickle_bomb())
    code, _, error = bench.run("train", capsys)
    assert code == 0, error


def test_the_pickle_is_live(bench):
    """The twin of the tests above: loading it does write the canary."""
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    bomb = bench.world / "bomb.bin"
    bomb.write_bytes(pickle_bomb())
    subprocess.run([sys.executable, "-c", code, str(bomb)], check=True)
    assert (bench.world / CANARY).exists()


def test_a_friendly_model_is_taken(bench, capsys):
    """The twin of every refusal: the bench itself refuses nothing."""
    code, _, error = bench.run("plan", capsys)
    assert code == 0, error
