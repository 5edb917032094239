"""The page on writing a backend: its code runs, and it names every hook, argument, record, field and capability."""

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path

import attrs
import pluggy
import pytest

import mens_core
from mens_core import hookspecs
from mens_core.contract import FineTuneContract
from mens_core.hf.layout import read_layout
from mens_core.plan import MEMORY_PARTS
from mens_core.plugins import BACKENDS, OFFERS
from mens_core.testing import tiny
from mens_core.testing.conformance.capabilities import CAPABILITIES, declaration_problems

PAGE = (Path(__file__).parents[1] / "docs/writing_a_backend.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(hookspecs) if name.startswith("mens_")]
RECORDS = [
    name
    for name in mens_core.__all__
    if attrs.has(record := getattr(mens_core, name)) and record.__module__ in {"mens_core.exchange", "mens_core.plan"}
]


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _run(source):
    space = {}
    exec(source, space)  # noqa: S102 - the page's own code
    return space


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_there_with_its_arguments(name):
    arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
    assert f"`{name}({arguments})`" in PAGE


def test_no_hook_is_there_that_is_not_one():
    assert set(re.findall(r"\bmens_[a-z]+(?=[(`])", PAGE)) - {"mens_core", "mens_mine", "mens_numpy"} <= set(HOOKS)


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_there_with_its_fields_and_no_others(name):
    section = PAGE.partition(f"### {name}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    assert section, f"{name} has no section"
    told = set(re.findall(r"`([a-z_]+)`", section)) - {"nvidia", "float32", "bfloat16"}
    if name == "KernelOffer":
        assert told.issuperset(MEMORY_PARTS)
        told -= set(MEMORY_PARTS)
    fields = {field.name for field in attrs.fields(getattr(mens_core, name))}
    if name == "ExecutionPlan":  # it has more than a backend needs
        assert told <= fields
    else:
        assert fields <= told
        assert told - fields <= {"supervised_tokens", "reason"}


def test_fields_of_the_contract_that_are_named_exist():
    contract = FineTuneContract.from_fields(trains=False)
    for section, names in re.findall(r"`contract\.(\w+)` has ((?:`\w+`[, and\n]*)+)", PAGE):
        assert all(hasattr(getattr(contract, section), name) for name in re.findall(r"`(\w+)`", names)), section


def test_what_may_be_relied_on_is_there():
    named = re.findall(r"^\| `(mens_core(?:\.\w+)+)\.(\w+)` \|", PAGE, re.MULTILINE)
    assert len(named) == 6
    assert all(name in import_module(module).__all__ for module, name in named)


def test_the_entry_points_are_of_the_groups_that_are_looked_at():
    (block,) = _blocks("toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {BACKENDS, OFFERS}


def test_its_code_runs_and_its_offer_is_an_offer(tmp_path):
    start, error, suite = map(_run, [*_blocks("python"), *_blocks("py")])
    manager = pluggy.PluginManager("mens_core")
    manager.add_hookspecs(hookspecs)
    manager.register(type("Plugin", (), {"mens_plan": staticmethod(start["mens_plan"])})())
    manager.check_pending()
    for family, feasible in (("llama", True), ("gpt2", False)):
        layout = read_layout(tiny.write_model(tmp_path / family, family))
        contract = FineTuneContract.from_fields(trains=False)
        offer = manager.hook.mens_plan(
            contract=contract, layout=layout, machine=tiny.MACHINE, weights=None, workload=tiny.WORKLOAD
        )
        assert offer.feasible is feasible
        assert bool(offer.reason) is not feasible
    assert isinstance(error["error"], mens_core.MensError)
    assert declaration_problems(suite["Capabilities"]) == []


def test_every_capability_is_there():
    table = PAGE.partition("| capability |")[2].partition("\n\n")[0]
    named = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert named == set(CAPABILITIES)


def test_the_failure_it_shows_is_the_one_that_is_told():
    from mens_core.testing.conformance.promises import promise

    with pytest.raises(pytest.fail.Exception) as caught:
        promise(
            kept=False, hook="mens_state", phrase="The copy does not change", broken="a step changed an earlier copy"
        )
    assert str(caught.value).strip() in PAGE
