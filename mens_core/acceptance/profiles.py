"""The file of the gate's steps: closed keys, and every problem at once.

    steps:
      matmul: {rows: ["5"], part: M4, tests: {file: test_row_5.py, keyword: f32_matmul_parity}}
      lora_run: {rows: ["11"], part: runs, commands: [[train, --backend, lora, …]], check: lora_run}
    profiles:
      quick: [matmul]

A step is tests or commands. Files of tests are relative to the file's folder; each step of commands has a fresh
working folder of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.acceptance.checks import CHECKS
from mens_core.errors import ContractError
from mens_core.strict_yaml import read_mapping, unknown_keys

__all__ = ["PACKAGE", "PROFILES", "Step", "read_profiles"]

PACKAGE = Path(__file__).parents[1]
#: The steps that come with the package.
PROFILES = PACKAGE / "testing" / "acceptance" / "profiles.yaml"


@attrs.frozen(kw_only=True)
class Step:
    """One step of a gate.

    Attributes:
        name: of the step.
        rows: rows and sign-offs of the runbook that it satisfies.
        part: of the gate that it belongs to, such as M1.
        file: tests; None for a step of commands.
        keyword: which of the file's tests, as pytest's ``-k`` reads it; None for all.
        commands: the words after ``python -m mens_core``, run one after the other.
        check: name in ``CHECKS`` of what must hold once they have run.
    """

    name: str
    rows: tuple[str, ...]
    part: str
    file: Path | None = None
    keyword: str | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    check: str | None = None


def read_profiles(path: Path = PROFILES) -> dict[str, tuple[Step, ...]]:
    """Read the steps of every profile.

    Returns:
        Name of a profile → its steps in order.

    Raises:
        ContractError: if the file cannot be read, or listing every key and value that is wrong.
    """
    content = read_mapping(path, ContractError)
    problems = unknown_keys(content, ("steps", "profiles"), "")
    steps, profiles = (content.get(key) or {} for key in ("steps", "profiles"))
    for key, value in (("steps", steps), ("profiles", profiles)):
        if not isinstance(value, dict) or not value:
            problems.append(f"{key} must be a mapping of at least one name")
    if not problems:
        problems += [line for name, step in steps.items() for line in _step_problems(name, step)]
        problems += [line for name, listed in profiles.items() for line in _profile_problems(name, listed, steps)]
    if problems:
        raise ContractError(
            "\n".join(["the gate's steps cannot be used", *(f"  {line}" for line in problems)]), where=path
        )
    made = {name: _step(name, step, path.parent) for name, step in steps.items()}
    return {name: tuple(made[step] for step in listed) for name, listed in profiles.items()}


def _step(name: str, content: Mapping[str, Any], folder: Path) -> Step:
    tests = content.get("tests", {})
    return Step(
        name=name,
        rows=tuple(content["rows"]),
        part=content["part"],
        file=folder / tests["file"] if tests else None,
        keyword=tests.get("keyword"),
        commands=tuple(map(tuple, content.get("commands", ()))),
        check=content.get("check"),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_words(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_commands(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_words, value))


_STEP: dict[str, tuple[Callable[[object], bool], str]] = {
    "rows": (_is_words, "a list of rows of the runbook, each in quotation marks"),
    "part": (_is_text, "a word"),
    "tests": (lambda value: isinstance(value, dict), "a mapping such as {file: test_row_5.py, keyword: matmul}"),
    "commands": (_is_commands, "a list of commands, each a list of words in quotation marks"),
    "check": (lambda value: value in CHECKS, f"one of {', '.join(CHECKS)}"),
}
_TESTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "file": (_is_text, "a path"),
    "keyword": (_is_text, "a word"),
}


def _values(
    content: Mapping[str, Any], rules: Mapping[str, tuple[Callable[[object], bool], str]], where: str
) -> list[str]:
    wrong = [(key, value, rules[key]) for key, value in content.items() if key in rules and not rules[key][0](value)]
    return [f"{where}{key} must be {expected} (got {value!r})" for key, value, (_, expected) in wrong]


def _step_problems(name: str, content: object) -> list[str]:
    where = f"steps.{name}."
    if not isinstance(content, dict):
        return [f"steps.{name} must be a mapping (got {content!r})"]
    lines = unknown_keys(content, _STEP, where) + _values(content, _STEP, where)
    lines += [f"{where}{key} is missing" for key in ("rows", "part") if key not in content]
    if ("tests" in content) == ("commands" in content):
        lines.append(f"steps.{name} must have tests or commands, one of the two")
    if ("commands" in content) != ("check" in content):
        lines.append(f"steps.{name} must say with check what its commands must have done, and only commands have one")
    tests = content.get("tests")
    if isinstance(tests, dict):
        lines += unknown_keys(tests, _TESTS, f"{where}tests.") + _values(tests, _TESTS, f"{where}tests.")
        lines += [] if "file" in tests else [f"{where}tests.file is missing"]
    return lines


def _profile_problems(name: str, listed: object, steps: Collection[str]) -> list[str]:
    if not isinstance(listed, list) or not _is_words(listed):
        return [f"profiles.{name} must be a list of steps (got {listed!r})"]
    lines = [f"profiles.{name} has {step} twice" for step in sorted({s for s in listed if listed.count(s) > 1})]
    for step in listed:
        if step not in steps:
            close = difflib.get_close_matches(step, steps, n=1)
            lines.append(f"profiles.{name}: there is no step {step}" + (f"; did you mean {close[0]}?" if close else ""))
    return lines
