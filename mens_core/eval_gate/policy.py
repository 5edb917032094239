"""The file of a policy: closed keys, and every problem at once.

    supervised_ratio: {min: 0.1, block: true}
    truncation: {max: 0.5, block: true}
    throughput: {min: 10, block: false}
    held_out_loss: {min_improvement: 0.1, block: true}
    exact_match:
      codes: {file: codes.jsonl, min: 0.95, max_new_tokens: 16, block: true}
    per_context:
      tool_trace: {max_loss: 1.5, block: false}

Every gate says whether it blocks. Paths are relative to the policy's folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ContractError
from mens_core.strict_yaml import read_mapping, unknown_keys

__all__ = ["DEFAULT_POLICY", "Bound", "Policy", "Suite", "read_policy"]

#: The policy that comes with the package.
DEFAULT_POLICY = Path(__file__).with_name("policy.yaml")


@attrs.frozen(kw_only=True)
class Bound:
    """What one number must be.

    Attributes:
        gate: its name, such as ``throughput`` or ``per_context tool_trace``.
        kind: ``min``, ``max``, ``min_improvement`` or ``max_loss``.
        value: the bound.
        block: whether the verdict depends on it; otherwise it warns.
    """

    gate: str
    kind: str
    value: float
    block: bool

    def holds(self, number: float) -> bool:
        """Whether a number is within the bound, which it may reach."""
        return number <= self.value if self.kind.startswith("max") else number >= self.value


@attrs.frozen(kw_only=True)
class Suite:
    """Prompts whose answers are known.

    Attributes:
        bound: of the share that is answered exactly.
        file: JSON lines of ``prompt`` and ``expected``.
        max_new_tokens: longest answer.
    """

    bound: Bound
    file: Path
    max_new_tokens: int


@attrs.frozen(kw_only=True)
class Policy:
    """What a run must be.

    Attributes:
        numbers: gate → bound, of single numbers of the run.
        suites: of exact answers.
        contexts: category of the held-out rows → bound of their loss.
    """

    numbers: Mapping[str, Bound]
    suites: tuple[Suite, ...]
    contexts: Mapping[str, Bound]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_Rules = dict[str, tuple[Callable[[object], bool], str]]
_BLOCK: _Rules = {"block": (lambda value: isinstance(value, bool), "true or false")}
_NUMBER = (_is_number, "a number")
_SHARE = (lambda value: _is_number(value) and 0 <= value <= 1, "a share from 0 to 1")
_NUMBERS: dict[str, _Rules] = {
    "supervised_ratio": {"min": _SHARE} | _BLOCK,
    "truncation": {"max": _SHARE} | _BLOCK,
    "throughput": {"min": _NUMBER} | _BLOCK,
    "held_out_loss": {"min_improvement": _NUMBER} | _BLOCK,
}
_LENGTH = (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0")
_SUITE: _Rules = {
    "file": (lambda value: isinstance(value, str) and bool(value.strip()), "a path"),
    "min": _SHARE,
    "max_new_tokens": _LENGTH,
} | _BLOCK
_CONTEXT: _Rules = {"max_loss": _NUMBER} | _BLOCK
_GROUPS: dict[str, _Rules] = {"exact_match": _SUITE, "per_context": _CONTEXT}


def read_policy(path: Path = DEFAULT_POLICY) -> Policy:
    """Read a policy.

    Raises:
        ContractError: if the file cannot be read, or listing every key and value that is wrong.
    """
    content = read_mapping(path, ContractError)
    problems = unknown_keys(content, [*_NUMBERS, *_GROUPS], "")
    for gate, rules in _NUMBERS.items():
        problems += _problems(content[gate], rules, gate) if gate in content else []
    for group, rules in _GROUPS.items():
        members = content.get(group, {})
        if not isinstance(members, dict):
            problems.append(f"{group} must be a mapping of names to gates (got {members!r})")
            continue
        problems += [line for name, gate in members.items() for line in _problems(gate, rules, f"{group}.{name}")]
    if not content:
        problems.append("a policy without a gate lets everything pass")
    if problems:
        raise ContractError("\n".join(["the policy cannot be used", *(f"  {line}" for line in problems)]), where=path)
    suites = content.get("exact_match", {}).items()
    return Policy(
        numbers={gate: _bound(gate, content[gate]) for gate in _NUMBERS if gate in content},
        suites=tuple(
            Suite(
                bound=_bound(f"exact_match {name}", gate),
                file=path.parent / gate["file"],
                max_new_tokens=gate["max_new_tokens"],
            )
            for name, gate in suites
        ),
        contexts={name: _bound(f"per_context {name}", gate) for name, gate in content.get("per_context", {}).items()},
    )


def _bound(gate: str, content: Mapping[str, Any]) -> Bound:
    kind = next(key for key in content if key.startswith(("min", "max")) and key != "max_new_tokens")
    return Bound(gate=gate, kind=kind, value=content[kind], block=content["block"])


def _problems(content: object, rules: _Rules, gate: str) -> list[str]:
    if not isinstance(content, dict):
        return [f"{gate} must be a mapping of {', '.join(rules)} (got {content!r})"]
    lines = unknown_keys(content, [*rules], f"{gate}.")
    for key, (fits, expected) in rules.items():
        if key not in content:
            lines.append(f"{gate}.{key} is missing")
        elif not fits(content[key]):
            lines.append(f"{gate}.{key} must be {expected} (got {content[key]!r})")
    return lines
