"""Find backends by their metadata, load one, explain what goes wrong.

Backends are entry points of the group ``mens_core.backends``; the built-in ones come in by the same door as
third parties. Listing imports nothing. Further gates, and observers that are always at work, are entry points of
``mens_core.plugins``; those of ``mens_core.observers`` are at work where ``--report-to`` names them.

A new ``PluginManager`` per run holds the chosen backend and those other plugins, nothing else: with two backends
registered a first-result hook would answer from the one registered last.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import pluggy
from packaging.requirements import Requirement

from mens_core import hookspecs
from mens_core.backend import Backend
from mens_core.errors import (
    AmbiguousBackendError,
    BrokenBackendError,
    HookContractError,
    PluginError,
    UnknownBackendError,
)
from mens_core.plan import ExecutionPlan

__all__ = [
    "BACKENDS",
    "OBSERVERS",
    "OFFERS",
    "PLUGINS",
    "BackendInfo",
    "add_observers",
    "backend_names",
    "check_observers",
    "installed_backends",
    "load_backend",
    "load_offers",
]

BACKENDS = "mens_core.backends"
OFFERS = "mens_core.offers"
PLUGINS = "mens_core.plugins"
OBSERVERS = "mens_core.observers"

_BUILT_IN = ("torch", "jax")


@attrs.frozen(kw_only=True)
class BackendInfo:
    """What the metadata says of one backend.

    Attributes:
        name: the entry point's name, as ``--backend`` takes it.
        distribution: the installed distribution that offers it.
        version: of that distribution.
        target: the module it would import.
        needs: required distributions.
        missing: required distributions that are not installed; empty when the backend is ready.
        install: the command that brings what is missing.
    """

    name: str
    distribution: str
    version: str
    target: str
    needs: tuple[str, ...]
    missing: tuple[str, ...]
    install: str


def installed_backends() -> tuple[BackendInfo, ...]:
    """Every backend any installed distribution offers, in the planner's order: torch, jax, then by name."""
    return tuple(_describe(entry) for entry in _backends())


def backend_names() -> tuple[str, ...]:
    """Their names, in the same order; what they need is not looked at, which takes longer than all else here."""
    return tuple(entry.name for entry in _backends())


def load_backend(name: str) -> Backend:
    """Import one backend and register it, beside the observers and gates, with a manager of its own.

    Raises:
        UnknownBackendError: nobody offers the name.
        AmbiguousBackendError: two distributions do.
        BrokenBackendError: it, or another plugin, cannot be imported.
        HookContractError: it has a hook that is not specified, or with other arguments.
    """
    info = _single(name)
    return _loaded(info, [*_offers(info), _entry(BACKENDS, name)])


def load_offers(name: str) -> Backend:
    """Import what answers ``mens_plan`` and no more: the backend's module for it, or, having none, the backend.

    Raises:
        PluginError: as ``load_backend`` does.
    """
    info = _single(name)
    offers = _offers(info)
    if offers and info.missing:
        # The module loads without its framework; the backend would not.
        raise BrokenBackendError(
            f"backend {name!r} needs {', '.join(info.missing)}", where=info.distribution, fix=info.install
        )
    return _loaded(info, offers or [_entry(BACKENDS, name)])


def check_observers(names: Iterable[str]) -> list[importlib.metadata.EntryPoint]:
    """The entry points of observers, by the metadata alone.

    Args:
        names: as ``--report-to`` takes them; ``none`` stands for nobody.

    Raises:
        PluginError: nobody offers a name, or it needs a package that is not installed.
    """
    offered = {entry.name: entry for entry in importlib.metadata.entry_points(group=OBSERVERS)}
    chosen = []
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        if name not in offered:
            close = difflib.get_close_matches(name, offered, n=1)
            raise PluginError(
                f"there is no observer {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                expected=f"--report-to none, or some of {', '.join(sorted(offered))}",
            )
        info = _describe(offered[name])
        if info.missing:
            raise PluginError(f"observer {name!r} needs {', '.join(info.missing)}", fix=info.install)
        chosen.append(offered[name])
    return chosen


def add_observers(backend: Backend, plan: ExecutionPlan) -> None:
    """Register the observers that the plan's contract asks for beside its backend.

    Raises:
        PluginError: as ``check_observers`` does, or one cannot be imported.
    """
    for entry in check_observers(plan.contract.output.report_to):
        info = _describe(entry)
        observer = _import(entry, info)(plan)
        _add(backend.manager, observer, f"{entry.name} for one run", info)


def _loaded(info: BackendInfo, entries: Sequence[importlib.metadata.EntryPoint]) -> Backend:
    manager = pluggy.PluginManager("mens_core")
    manager.add_hookspecs(hookspecs)
    for entry in entries:
        _register(manager, entry, info)
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        _register(manager, entry, _describe(entry))
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise _contract_broken(info, error) from error
    if os.environ.get("MENS_TRACE_HOOKS") == "1":
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return Backend(name=info.name, plugin=f"{info.distribution} {info.version}", manager=manager)


def _backends() -> list[importlib.metadata.EntryPoint]:
    order = {name: place for place, name in enumerate(_BUILT_IN)}
    return sorted(
        importlib.metadata.entry_points(group=BACKENDS),
        key=lambda entry: (order.get(entry.name, len(order)), entry.name, entry.dist.name if entry.dist else ""),
    )


def _single(name: str) -> BackendInfo:
    entries = _backends()
    matching = [_describe(entry) for entry in entries if entry.name == name]
    if not matching:
        names = [entry.name for entry in entries]
        close = difflib.get_close_matches(name, names, n=1)
        raise UnknownBackendError(
            f"there is no backend {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            expected=f"one of {', '.join(names)}" if names else "an installed backend",
            fix="python -m mens_core backends",
        )
    if len(matching) > 1:
        claims = " and ".join(f"{info.distribution} {info.version}" for info in matching)
        raise AmbiguousBackendError(
            f"two installed distributions offer a backend named {name!r}",
            where=claims,
            fix=f"pip uninstall {matching[-1].distribution}",
        )
    return matching[0]


def _entry(group: str, name: str) -> importlib.metadata.EntryPoint:
    return next(iter(importlib.metadata.entry_points(group=group, name=name)))


def _offers(info: BackendInfo) -> list[importlib.metadata.EntryPoint]:
    """The entry point of the same name and distribution that answers ``mens_plan``, if there is one."""
    entries = importlib.metadata.entry_points(group=OFFERS, name=info.name)
    return [entry for entry in entries if entry.dist is not None and entry.dist.name == info.distribution]


def _register(manager: pluggy.PluginManager, entry: importlib.metadata.EntryPoint, info: BackendInfo) -> None:
    _add(manager, _import(entry, info), entry.value, info)


def _import(entry: importlib.metadata.EntryPoint, info: BackendInfo) -> Any:
    try:
        return entry.load()
    # Whatever a plugin raises while it is imported is its own failure; it is chained, not hidden.
    except Exception as error:
        raise BrokenBackendError(
            f"plugin {info.name!r} of {info.distribution} {info.version} cannot be imported: "
            f"{type(error).__name__}: {error}",
            where=entry.value,
            fix=info.install if info.missing else f"pip install --force-reinstall {info.distribution}",
        ) from error


def _add(manager: pluggy.PluginManager, plugin: Any, name: str, info: BackendInfo) -> None:
    try:
        manager.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        raise _contract_broken(info, error) from error
    if not manager.get_hookcallers(plugin):
        raise PluginError(
            f"plugin {info.name!r} of {info.distribution} {info.version} implements no hook",
            where=info.target,
            expected="functions marked with @mens_core.hookimpl, named as in mens_core/hookspecs.py",
        )


def _contract_broken(info: BackendInfo, error: pluggy.PluginValidationError) -> HookContractError:
    return HookContractError(
        f"plugin {info.name!r} of {info.distribution} {info.version} does not fit the hooks: {error}",
        where=info.target,
        expected="the names and arguments specified in mens_core/hookspecs.py",
    )


def _describe(entry: importlib.metadata.EntryPoint) -> BackendInfo:
    distribution = entry.dist
    if distribution is None:
        raise PluginError(f"the entry point {entry.name!r} belongs to no distribution", where=entry.value)
    metadata = distribution.metadata
    name = metadata["Name"]
    requirements = [Requirement(text) for text in distribution.requires or ()]
    # A distribution may keep a backend's needs in an extra of the backend's name, as this one does.
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": entry.name})]
    missing = tuple(item.name for item in needed if not _is_installed(item.name))
    extra = entry.name in (metadata.get_all("Provides-Extra") or ())
    return BackendInfo(
        name=entry.name,
        distribution=name,
        version=distribution.version,
        target=entry.value,
        needs=tuple(item.name for item in needed),
        missing=missing,
        install=f"pip install '{name}[{entry.name}]'" if extra else f"pip install {' '.join(missing) or name}",
    )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
