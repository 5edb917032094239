"""The house as it is drawn: mirrored backends, light imports, a pinned surface, every hook documented and tested."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mens_core
from mens_core import hookspecs
from mens_core.cli import VERBS

ROOT = Path(__file__).parents[1]
TORCH = ROOT / "backends/torch_backend/mens_torch"
JAX = ROOT / "backends/jax_backend/mens_jax"
HOOKS = [name for name in vars(hookspecs) if name.startswith("mens_")]

HEAVY = ("torch", "jax", "flax", "optax", "transformers", "bitsandbytes")


def _public(path):
    """Public definitions of a module: name → parameters with defaults; for a class, those of its public methods."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = _signature(node.args)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = "class"
    return found


def _signature(arguments):
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    defaults = [ast.unparse(default) for default in [*arguments.defaults, *arguments.kw_defaults] if default]
    return [argument.arg for argument in named], defaults


def _files(package):
    """Names of a backend's public modules; one that starts with an underscore is its own affair."""
    return sorted(path.name for path in package.glob("*.py") if path.name == "__init__.py" or path.name[0] != "_")


def test_the_two_backends_have_the_same_files():
    assert _files(TORCH) == _files(JAX)


@pytest.mark.parametrize("name", _files(TORCH))
def test_the_two_backends_have_the_same_public_names_and_signatures(name):
    assert _public(JAX / name) == _public(TORCH / name)


def _help_of(verb):
    """Code that prints a verb's help."""
    silently = "import contextlib, mens_core.cli\nwith contextlib.suppress(SystemExit):"
    return f"{silently}\n    mens_core.cli.main(['{verb}', '-h'])"


def _imported_by(code):
    """Modules that a fresh interpreter has loaded after running ``code``."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import mens_core",
        "import mens_core.planner",
        "from mens_core.plugins import installed_backends; installed_backends()",
        *map(_help_of, VERBS),
    ],
)
def test_no_framework_is_imported_before_a_backend_is_chosen(code):
    assert not set(HEAVY) & set(_imported_by(code))


def _foreign(code):
    """Distributions, and this one, that a fresh interpreter has loaded after running ``code``."""
    bare, loaded = ({name.partition(".")[0] for name in _imported_by(words)} for words in ("", code))
    return loaded - bare - sys.stdlib_module_names


@pytest.mark.parametrize("verb", VERBS)
def test_help_waits_for_nothing_heavier_than_attrs_and_orjson(verb):
    # What it loads and not what it takes: a clock on a busy machine says little. Some 60 ms, a bare Python 15.
    assert _foreign(_help_of(verb)) <= {"attr", "attrs", "mens_core", "orjson"}


def test_the_list_of_verbs_waits_for_nothing_at_all():
    assert _foreign(_help_of("--help")) == {"mens_core"}
    loaded = _imported_by(_help_of("--help"))
    assert [name for name in loaded if name.startswith("mens_core")] == ["mens_core", "mens_core.cli"]
    assert "typing" not in loaded


def test_the_jax_backend_imports_no_torch():
    assert not {"torch", "transformers", "bitsandbytes"} & set(_imported_by("import mens_jax.hooks"))


def test_the_torch_backend_imports_no_jax():
    assert not {"jax", "flax", "optax"} & set(_imported_by("import mens_torch.hooks"))


def test_the_public_surface_is_what_it_says():
    assert mens_core.__all__ == [
        "BackendInfo",
        "BaseWeights",
        "Batch",
        "BatchShape",
        "Conversation",
        "ExecutionPlan",
        "FineTuneContract",
        "GateVerdict",
        "GenerateSettings",
        "KernelOffer",
        "Machine",
        "MensError",
        "NF4Spec",
        "Planner",
        "QuantizedWeight",
        "RunResult",
        "Speed",
        "StepMetrics",
        "TrainingState",
        "Workload",
        "certify",
        "compare_adapters",
        "convert_adapter",
        "describe_adapter",
        "evaluate_model",
        "examine",
        "follow_run",
        "generate",
        "hookimpl",
        "installed_backends",
        "judge_run",
        "measure_speeds",
        "merge",
        "mix",
        "preview_rows",
        "run_gate",
        "run_status",
        "verify_run",
        "write_pairs",
        "write_random_model",
    ]
    assert all(getattr(mens_core, name) is not None for name in mens_core.__all__)
    assert dir(mens_core) == sorted(mens_core.__all__)


def test_there_are_the_hooks_of_the_design():
    assert HOOKS == [
        "mens_plan",
        "mens_gates",
        "mens_quantize",
        "mens_dequantize",
        "mens_open",
        "mens_forward",
        "mens_loss",
        "mens_step",
        "mens_state",
        "mens_restore",
        "mens_generate",
        "mens_merge",
        "mens_event",
    ]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_a_prose_contract(name):
    text = inspect.getdoc(getattr(hookspecs, name))
    assert len(text) > 150
    assert "Called" in text


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name):
    calls = re.compile(rf"backend\.{name.removeprefix('mens_')}\(|\b{name}\b")
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert any(calls.search(path.read_text(encoding="utf-8")) for path in tests)


@pytest.mark.parametrize("name", [hook for hook in HOOKS if hook not in {"mens_gates", "mens_event"}])
@pytest.mark.parametrize("backend", [TORCH, JAX])
def test_both_backends_implement_every_hook(backend, name):
    assert name in _public(backend / ("offer.py" if name == "mens_plan" else "hooks.py"))


def test_no_file_of_ours_is_long():
    sources = [path for folder in ("mens_core", "backends") for path in (ROOT / folder).rglob("*.py")]
    too_long = {str(path): lines for path in sources if (lines := len(path.read_text().splitlines())) > 400}
    assert not too_long


def test_what_takes_a_path_takes_its_text_too():
    asked = [
        f"{name}({argument})"
        for name in mens_core.__all__
        if inspect.isfunction(function := getattr(mens_core, name))
        for argument in inspect.signature(function).parameters.values()
        if "Path" in str(argument.annotation) and "str" not in str(argument.annotation)
    ]
    assert not asked
