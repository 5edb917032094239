"""Nothing unpickles, evaluates or runs foreign code, by the syntax tree of every module; and nothing calls home."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("mens_core", "backends", "examples", "scripts") for path in (ROOT / folder).rglob("*.py")
]

_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_METHODS = {"torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "subprocess.call"}


def dangers(source):
    """(line, what) of everything in a source that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in _MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            # A method of that name, as numba's and re's, is another thing.
            if called in _CALLS | _METHODS:
                yield node.lineno, called
            for setting in ("allow_pickle", "trust_remote_code", "shell"):
                if settings.get(setting, "False") != "False":
                    yield node.lineno, setting


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_evaluates(path):
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "import torch\ntorch.load('x')",
        "numpy.load('x', allow_pickle=True)",
        "numpy.load('x', allow_pickle=flag)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=asked)",
        "eval('1')",
        "exec('1')",
        "yaml.unsafe_load('1')",
        "subprocess.run('x', shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source", ["numpy.load('x')", "numpy.load('x', allow_pickle=False)", "re.compile('x')", "model.eval()"]
)
def test_the_search_finds_nothing_else(source):
    assert list(dangers(source)) == []


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_whole_run_and_an_answer_ask_nobody(name, model_dirs, corpus_dir, tmp_path):
    # No variable that turns a library's own requests off: that would hide them.
    environment = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
    fields = {"model": str(model_dirs["llama"]), "data_dir": str(corpus_dir), "output_dir": str(tmp_path / "run")}
    code = f"""
import socket
asked = []
def refuse(self, address, *rest):
    # A pair of sockets within the process, as an event loop makes, leaves no machine.
    if self.family != socket.AF_UNIX:
        asked.append(address)
        raise OSError("no connections here")
socket.socket.connect = socket.socket.connect_ex = refuse
def looked_up(*words, **_):
    asked.append(words)
    raise OSError("no names here")
socket.getaddrinfo = looked_up
import mens_core
from mens_core.cli import main
mens_core.Planner().run(max_steps=2, rank=2, seq_len=256, backend={name!r}, **{fields!r})
mens_core.generate("x", adapter={str(tmp_path / "run")!r}, max_new_tokens=2, backend={name!r})
assert main(["status", {str(tmp_path / "run")!r}]) == 0
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_a_request_would_be_caught_by_catches_one():
    code = """
import socket
def refuse(self, address, *rest):
    print("asked")
    raise OSError
socket.socket.connect = refuse
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "asked\n"


def test_a_hub_id_brings_config_tokenizer_and_safetensors_at_the_commit_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    from mens_core.hf.hub import find_model

    asked = {}

    def download(repository, **settings):
        asked.update(settings, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_model("owner/name", "0123456")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "0123456")
    wanted = asked["allow_patterns"]
    names = ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "model.pt", "modeling_x.py", "x.pkl", "flax_model.msgpack", "tf_model.h5", "x.so"]
    kept = list(huggingface_hub.utils.filter_repo_objects(names + unwanted, allow_patterns=wanted))
    assert kept == names
