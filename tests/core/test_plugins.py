"""Backends come in by metadata; each way of failing has an error of its own.

The broken ones are real distributions: wheels, installed by pip into a temporary directory.
"""

import json
import subprocess
import sys
import zipfile

import attrs
import numpy as np
import pytest

import mens_core
from mens_core.artifacts.tensors import write_tensors
from mens_core.contract import FineTuneContract
from mens_core.errors import (
    AmbiguousBackendError,
    BrokenBackendError,
    GateError,
    HookContractError,
    PluginError,
    UnknownBackendError,
)
from mens_core.hf.hub import find_model
from mens_core.hf.layout import read_layout
from mens_core.planner import resolve
from mens_core.plugins import installed_backends, load_backend

HOOK = "from mens_core import hookimpl\n@hookimpl\n"

LIAR = f"""from mens_core import KernelOffer
{HOOK}def mens_plan(contract):
    return KernelOffer(kernel='torch_lora', feasible=False, reason='no')
"""

SPENDER = f"""from mens_core import KernelOffer
{HOOK}def mens_plan(contract):
    offer = dict(kernel='spender_lora', feasible=True, device='cpu', dtype='float32')
    return KernelOffer(**offer, **{{'memory': {{'bsae': 1}}}} if contract.adapter.rank == 1 else
                       {{'memory': {{'base': -1}}}} if contract.adapter.rank == 2 else {{'seconds_per_step': 'soon'}})
"""

# distribution → (entry point name, module source, requirement)
DISTRIBUTIONS = {
    "mens-typo": ("typo", f"{HOOK}def mens_plna(contract, layout, machine): ...\n", None),
    "mens-wrong-argument": ("wrong_argument", f"{HOOK}def mens_plan(contrakt): ...\n", None),
    "mens-needy": ("needy", "import a_package_nobody_has\n", "a-package-nobody-has"),
    "mens-raising": ("raising", "raise RuntimeError('no device today')\n", None),
    "mens-empty": ("empty", "VALUE = 1\n", None),
    "mens-twin-one": ("twin", f"{HOOK}def mens_event(event): ...\n", None),
    "mens-twin-two": ("twin", f"{HOOK}def mens_event(event): ...\n", None),
    "mens-silent": ("silent", f"{HOOK}def mens_event(event): ...\n", None),
    "mens-spender": ("spender", SPENDER, None),
    "mens-liar": (
        "liar",
        LIAR,
        None,
    ),
}


def _wheel(folder, distribution, entry, source, requirement):
    module = distribution.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    needs = f"Requires-Dist: {requirement}\n" if requirement else ""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}.py", source)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needs}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/entry_points.txt", f"[mens_core.backends]\n{entry} = {module}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory into which every distribution above has been installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    built = [_wheel(wheels, name, *parts) for name, parts in DISTRIBUTIONS.items()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, *built], check=True)
    return target


@pytest.fixture
def installed(site, monkeypatch):
    """The distributions, visible to this process."""
    monkeypatch.syspath_prepend(str(site))
    return site


def test_the_built_in_backends_come_first_and_their_state_is_known_without_importing_them():
    infos = installed_backends()
    assert [info.name for info in infos[:2]] == ["torch", "jax"]
    assert {info.distribution for info in infos[:2]} == {"mens-core"}
    assert infos[0].install == "pip install 'mens-core[torch]'"


@pytest.mark.usefixtures("installed")
def test_listing_shows_third_parties_and_what_they_lack_and_imports_none():
    infos = {info.name: info for info in installed_backends()}
    assert infos["raising"].distribution == "mens-raising"
    assert infos["needy"].missing == ("a-package-nobody-has",)
    assert not {name for name in sys.modules if name.startswith("mens_raising")}


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_lists_what_there_is_and_the_nearest():
    with pytest.raises(UnknownBackendError) as caught:
        load_backend("trch")
    assert "did you mean 'torch'?" in str(caught.value)
    assert "jax" in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_name_claimed_twice_names_both_distributions():
    with pytest.raises(AmbiguousBackendError) as caught:
        load_backend("twin")
    assert "mens-twin-one 1.0" in str(caught.value)
    assert "mens-twin-two 1.0" in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_missing_requirement_gives_the_pip_line_and_chains_the_error():
    with pytest.raises(BrokenBackendError, match="pip install a-package-nobody-has") as caught:
        load_backend("needy")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("installed")
def test_a_backend_that_raises_while_imported_says_what_it_raised():
    with pytest.raises(BrokenBackendError, match="RuntimeError: no device today"):
        load_backend("raising")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("name", "word"), [("typo", "mens_plna"), ("wrong_argument", "contrakt")])
def test_a_hook_that_is_not_specified_is_named_with_its_plugin(name, word):
    with pytest.raises(HookContractError, match=word) as caught:
        load_backend(name)
    assert f"mens-{name.replace('_', '-')} 1.0" in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_plugin_without_a_hook_is_refused():
    with pytest.raises(PluginError, match="implements no hook"):
        load_backend("empty")


def _plan(name, **fields):
    contract = FineTuneContract.from_fields(trains=False, **fields)
    return load_backend(name).plan(contract, read_layout(find_model(None, None)[1]), None, None, None)


@pytest.mark.usefixtures("installed")
def test_a_hook_that_is_missing_or_answers_wrongly_is_named_with_plugin_and_version():
    with pytest.raises(HookContractError, match="mens_plan: is not implemented") as caught:
        _plan("silent")
    assert "mens-silent 1.0" in str(caught.value)
    with pytest.raises(HookContractError, match="expected 'liar_lora'"):
        _plan("liar")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("rank", "problem"), [(1, "memory part 'bsae'"), (2, "-1 bytes"), (3, "'soon' seconds a step")]
)
def test_an_offer_whose_numbers_make_no_sense_is_named_with_its_plugin(rank, problem):
    with pytest.raises(HookContractError, match=problem) as caught:
        _plan("spender", rank=rank)
    assert "mens-spender 1.0" in str(caught.value)


def test_records_that_cross_the_hooks_are_frozen():
    for name in mens_core.__all__:
        record = getattr(mens_core, name)
        if attrs.has(record) and record.__module__ in {"mens_core.exchange", "mens_core.plan"}:
            assert record.__setattr__ is not object.__setattr__, name


@pytest.mark.usefixtures("installed")
def test_a_broken_third_party_does_not_stop_the_automatic_choice_and_stays_on_the_record(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch", **sizes}))
    write_tensors(tmp_path / "model.safetensors", {"x": np.zeros(1, np.float32)}, {})
    contract = FineTuneContract.from_fields(trains=False, model=str(tmp_path), tokenizer="lab")
    with pytest.raises(GateError) as caught:
        resolve(contract, trains=False)
    assert "raising_lora: plugin 'raising' of mens-raising 1.0 cannot be imported" in str(caught.value)
    assert "torch_lora: transformers knows no causal language model" in str(caught.value)
