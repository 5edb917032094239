"""Merge adapters into their base."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.files import write_json
from mens_core.artifacts.lora import LoraAdapter, combined
from mens_core.errors import ContractError, GateError, ModelError, PluginError
from mens_core.exchange import NF4Spec
from mens_core.hf.hub import find_model
from mens_core.hf.inventory import read_inventory, read_shards
from mens_core.hf.layout import Layout, read_layout
from mens_core.inference import open_model
from mens_core.merging.binding import bind, check_base
from mens_core.merging.fidelity import compare
from mens_core.merging.job import REPORT, Job, Wanted
from mens_core.plugins import installed_backends, load_backend

__all__ = ["merge"]

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_COMMANDS = {"lora": "merge-weights", "qlora": "merge-qlora"}

# No room is left, here or for one file; and no file can be made in this place.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def merge(
    adapters: Sequence[tuple[str | Path, float]],
    *,
    output: str | Path,
    base: str | Path | Sequence[Path] | None = None,
    meta: str | Path | None = None,
    method: str | None = None,
    subset: bool = False,
    dtype: str | None = None,
    quantized: bool = False,
    quantize: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    backend: str | None = None,
    base_changed_anyway: bool = False,
    held_out: str | Path | None = None,
) -> dict[str, Any]:
    """Write base + Σ weight · s · B A as a model that needs no adapter.

    Args:
        adapters: run directories, folders in PEFT's format or safetensors files, each with its weight; 1 alone merges
            an adapter as it is.
        output: the folder to make; the file to make with ``subset``.
        base: folder or hub id of the base, or some of its safetensors files; None for what the adapter names.
        meta: description of an adapter of version 2 or 3.
        method: ``lora`` or ``qlora``, if an adapter of the other one is to be refused.
        subset: whether the merged tensors alone are written, in float32, as the older system does.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None to keep each tensor's format.
        quantized: whether the update is added to the base as NF4 gives it back, instead of the original.
        quantize: ``nf4`` to write the linear layers of the decoder in NF4, as bitsandbytes and transformers store it.
        max_shard_bytes: largest weight file.
        backend: whose ``mens_merge`` computes; None for the first that is installed.
        base_changed_anyway: whether a base with other weights than those of the training is taken.
        held_out: rows on which the model is compared with base and adapter; None for those that a run was measured on.

    Returns:
        The report, which also lies in the folder as ``merge_report.json``.

    Raises:
        MensError: if something cannot be read, does not fit or would change next to nothing; nothing is written then.
    """
    started = time.perf_counter()
    opened = [(open_adapter(Path(path), Path(meta) if meta else None), weight) for path, weight in adapters]
    _check(opened, method, dtype)
    _check_quantize(quantize, subset=subset)
    folder, shards = _find(base, opened[0][0])
    layout = read_layout(folder) if folder is not None else None
    inventory = read_shards(shards, layout) if shards else read_inventory(_given(folder), layout)
    binding = bind(combined(opened), inventory, layout)
    notes = [check_base(adapter, inventory.files, changed_anyway=base_changed_anyway) for adapter, _ in opened]
    wanted = Wanted(
        adapters=opened,
        output=Path(output),
        backend=load_backend(backend or _first_installed()),
        dtype=None if dtype is None else _DTYPES[dtype],
        storage=_storage(opened[0][0], layout) if quantized else None,
        quantize=_written(layout) if quantize else None,
        max_shard_bytes=max_shard_bytes,
    )
    job = Job(wanted, inventory, layout, binding, [note for note in notes if note])
    try:
        report = job.write_subset() if subset else job.write_folder()
    except OSError as error:
        raise _unwritten(error, Path(output)) from error
    report["seconds"] = round(time.perf_counter() - started, 3)
    rows = Path(held_out) if held_out else opened[0][0].held_out
    if rows is not None and folder is not None and not subset:
        if quantize:
            report["fidelity"] = {"not_measured": "the backends open no checkpoint that is in NF4 already"}
        else:
            report["fidelity"] = _fidelity(combined(opened), folder, Path(output), rows, wanted.backend.name)
        write_json(Path(output) / REPORT, report)
    return report


def _fidelity(adapter: LoraAdapter, base: Path, output: Path, rows: Path, backend: str) -> dict[str, Any]:
    """The model beside base and adapter; a machine on which they cannot be opened says why."""
    try:
        adapted = open_model(str(base), adapter, backend=backend)
        return compare(adapted, open_model(str(output), None, backend=backend), rows)
    except GateError as error:
        return {"not_measured": error.what}


def _check(opened: Sequence[tuple[LoraAdapter, float]], method: str | None, dtype: str | None) -> None:
    if not opened:
        raise ContractError("no adapter is given", fix="--adapter PATH")
    if dtype is not None and dtype not in _DTYPES:
        raise ContractError(f"there is no format {dtype!r} for weights", expected=", ".join(_DTYPES))
    for adapter, _ in opened:
        if method is not None and adapter.method not in {method, None}:
            raise ModelError(
                f"this is an adapter of method {adapter.method}",
                where=adapter.source,
                expected=f"{_COMMANDS[method]} merges adapters of method {method}",
                fix=f"python -m mens_core {_COMMANDS[adapter.method]} --adapter {adapter.source} …",
            )


def _find(base: str | Path | Sequence[Path] | None, adapter: LoraAdapter) -> tuple[Path | None, tuple[Path, ...]]:
    """The base's folder, if it is known to be one, and single shards, if these were given."""
    if base is None or isinstance(base, str | Path):
        model = adapter.base_model if base is None else str(base)
        if model is None:
            raise ModelError("the adapter does not say what its base is", where=adapter.source, fix="--base DIR")
        # A commit belongs to the hub id beside which the adapter names it, and to no folder.
        named = base is None and not Path(model).is_dir()
        return find_model(model, adapter.config.get("revision") if named else None)[1], ()
    shards = tuple(base)
    missing = [shard for shard in shards if not shard.is_file()]
    pickled = [shard for shard in shards if shard.suffix.lower() == ".bin"]
    if not shards or missing or pickled:
        what = f"a *.bin shard is pickled: {pickled[0]}" if pickled else f"there is no shard {missing and missing[0]}"
        raise ModelError(what, expected="safetensors files of the base", fix="--base-shard FILE, once for each")
    home = shards[0].parent
    described = all(shard.parent == home for shard in shards) and (home / "config.json").is_file()
    return home if described else None, shards


def _given(folder: Path | None) -> Path:
    assert folder is not None, "without shards there is a folder"
    return folder


def _check_quantize(quantize: str | None, *, subset: bool) -> None:
    if quantize not in {None, "nf4"}:
        raise ContractError(f"there is no storage {quantize!r} for weights", where="quantize", expected="nf4")
    if quantize and subset:
        raise ContractError(
            "single tensors are written in float32", where="quantize", fix="--base DIR, for a model in NF4"
        )


def _written(layout: Layout | None) -> NF4Spec:
    """The NF4 of a checkpoint: as most are written, whatever the run was trained on."""
    if layout is None or layout.family is None:
        raise _not_known(layout, "without --quantize, in the base's format")
    return NF4Spec()


def _unwritten(error: OSError, output: Path) -> ModelError:
    full, closed = error.errno in _FULL, error.errno in _CLOSED
    return ModelError(
        f"the merged model cannot be written: {error.strerror or error}",
        where=error.filename or output,
        expected="room for a model as large as its base" if full else None,
        fix="free some room, or choose another --output" if full else "choose another --output" if closed else None,
    )


def _not_known(layout: Layout | None, fix: str) -> ModelError:
    return ModelError(
        "which layers of this model are quantised is not known",
        where=f"model_type {layout.model_type}" if layout else "single shards without their config.json",
        fix=fix,
    )


def _storage(adapter: LoraAdapter, layout: Layout | None) -> NF4Spec:
    if layout is None or layout.family is None:
        raise _not_known(layout, "--onto original, onto the weights as they are")
    return adapter.nf4 or NF4Spec()


def _first_installed() -> str:
    for info in installed_backends():
        if not info.missing:
            return info.name
    raise PluginError("no backend is installed that could compute a merge", fix="pip install 'mens-core[torch]'")
