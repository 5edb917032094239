"""One merge at work: each tensor of the result, made or copied, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np

from mens_core.artifacts.files import write_json
from mens_core.artifacts.lora import LoraAdapter
from mens_core.artifacts.norms import update_norm
from mens_core.artifacts.tensors import AnyArray, Block, TensorFolder, stream_tensors
from mens_core.atomic import appearing
from mens_core.backend import Backend
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.hf.header import FLOATS
from mens_core.hf.inventory import Inventory
from mens_core.hf.keymap import canonical_name
from mens_core.hf.layout import Layout
from mens_core.merging.binding import HEAD, Binding
from mens_core.merging.nf4_checkpoint import (
    Part,
    as_rows,
    filled,
    quantization_config,
    quantize_merged,
    row_notes,
    write_parts,
)
from mens_core.merging.numbers import TensorError, merged_blocks
from mens_core.merging.output import copy_companions, write_card, write_weights

__all__ = ["REPORT", "Job", "Wanted"]

REPORT = "merge_report.json"
# Layers in NF4 lie here until their sizes are known and the weight files are put together.
_SCRATCH = ".layers"
_HANDOFF = "external_serving_handoff_v1.json"

_NUMPY = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Fewer changed elements than this share of the merged weights, and nobody could tell the model from its base.
_LEAST_CHANGED = 1e-4
_CAST_ROWS = 1 << 20
# After so many blocks the pages that they were read from are let go; to map them again one by one costs a tenth.
_BLOCKS_MAPPED = 8


@attrs.frozen(kw_only=True)
class Wanted:
    """How the result is to be written.

    Attributes:
        adapters: that are merged, with their weights.
        output: the folder to make; a file where the merged tensors alone are written.
        backend: which computes.
        dtype: code of the format of all weights; None to keep each as it is.
        storage: the NF4 in which the base is taken; None for the original.
        quantize: the NF4 in which the linear layers are written; None for weights that need no dequantising.
        max_shard_bytes: of a weight file.
    """

    adapters: Sequence[tuple[LoraAdapter, float]]
    output: Path
    backend: Backend
    dtype: str | None
    storage: NF4Spec | None
    quantize: NF4Spec | None
    max_shard_bytes: int


class Job:
    """One merge at work.

    Args:
        wanted: how the result is to be written.
        inventory: of the base.
        layout: of the base; None for single shards without config.json.
        binding: where the updates go.
        notes: what the report has to say beside its numbers.
    """

    def __init__(
        self, wanted: Wanted, inventory: Inventory, layout: Layout | None, binding: Binding, notes: Sequence[str]
    ) -> None:
        self._wanted, self._layout, self._binding, self._notes = wanted, layout, binding, list(notes)
        self._inventory, self._tensors = inventory, TensorFolder(inventory)
        self._subset = False
        self._errors: dict[str, TensorError] = {}
        self._parts: dict[str, Part] = {}

    def write_folder(self) -> dict[str, Any]:
        """A complete model."""
        wanted, folder = self._wanted, self._inventory.folder
        if self._layout is None:
            raise ModelError(
                "single shards without their config.json make no model",
                where=folder,
                fix="--format subset, which writes the merged tensors alone; or --base DIR",
            )
        with appearing(wanted.output) as building:
            untied = self._binding.untied is not None
            names = [*dict.fromkeys([*self._inventory.tensors, *([HEAD] if untied else [])])]
            scratch = building / _SCRATCH
            specs = {part: spec for name in names for part, spec in self._specs(name, scratch).items()}
            files = write_weights(building, specs, self._blocks, max_shard_bytes=wanted.max_shard_bytes)
            scratch.unlink(missing_ok=True)
            copy_companions(folder, building, self._config(), dtype=wanted.dtype, untied=untied)
            report = self._report(names) | {"files": files}
            write_json(building / REPORT, report)
            write_json(building / _HANDOFF, self._handoff(report))
            write_card(building, report, wanted.adapters[0][0].license_class)
        return report

    def write_subset(self) -> dict[str, Any]:
        """The merged tensors alone, in float32."""
        self._subset, output = True, self._wanted.output
        if output.exists():
            raise ModelError("the output exists", where=output, fix="choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        names = [*self._binding.updates, *self._binding.whole]
        tensors = self._inventory.tensors
        specs = {name: ("F32", tensors[self._source(name)].shape) for name in names}
        stream_tensors(output, specs, self._blocks, {"format": "pt"})
        try:
            return self._report(names) | {"files": [output.name]}
        except ModelError:
            output.unlink()
            raise

    def _specs(self, name: str, scratch: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the result holds of a tensor: itself, or the parts that it has in NF4, which are made here."""
        if self._wanted.quantize is None or not self._is_linear(name):
            source = self._source(name)
            return {name: (self._code(source), self._inventory.tensors[source].shape)}
        parts = write_parts(scratch, name, self._in_nf4(name, self._wanted.quantize), self._code(name))
        self._parts |= parts
        return {part: (made.code, made.shape) for part, made in parts.items()}

    def _in_nf4(self, name: str, spec: NF4Spec) -> QuantizedWeight:
        backend, transposed, pair = self._wanted.backend, self._is_transposed(), self._binding.updates.get(name)
        try:
            weight = self._binding.whole[name] if name in self._binding.whole else self._weight(name)
            before = backend.quantize(as_rows(weight, transposed), spec)
            if pair is None:
                return before
            error = self._errors.setdefault(name, TensorError())
            merged = filled(weight.shape, merged_blocks(weight, pair, np.dtype(np.float32), backend, error))
            return quantize_merged(before, as_rows(merged, transposed), backend, error)
        finally:
            self._tensors.forget()

    def _config(self) -> dict[str, Any]:
        assert self._layout is not None, "a folder has its config.json"
        config = dict(self._layout.config)
        if self._wanted.quantize is not None:
            codes = [self._code(name) for name in self._inventory.tensors if self._is_linear(name)]
            config["quantization_config"] = quantization_config(self._wanted.quantize, codes[0])
            self._notes += row_notes(self._inventory.linears.values(), self._wanted.quantize)
        return config

    def _source(self, name: str) -> str:
        """The tensor of the base that one of the result is made from."""
        return self._binding.untied if name == HEAD and self._binding.untied is not None else name

    def _code(self, name: str) -> str:
        code = self._inventory.tensors[name].dtype
        if self._subset:
            return "F32"
        return self._wanted.dtype if self._wanted.dtype is not None and code in FLOATS else code

    def _blocks(self, name: str) -> Iterator[Block]:
        try:
            for number, block in enumerate(self._made(name), start=1):
                yield block
                if not number % _BLOCKS_MAPPED:
                    self._tensors.forget()
        finally:
            self._tensors.forget()

    def _made(self, name: str) -> Iterable[Block]:
        if name in self._parts:
            return (self._parts[name].stored,)
        source = self._source(name)
        code = self._code(source)
        if name in self._binding.whole:
            return (self._binding.whole[name].astype(_NUMPY[code], copy=False),)
        pair = self._binding.updates.get(name)
        if pair is not None:
            error = self._errors.setdefault(name, TensorError())
            return merged_blocks(self._weight(source), pair, _NUMPY[code], self._wanted.backend, error)
        if self._is_quantised(name):
            return (self._weight(name).astype(_NUMPY[code], copy=False),)
        if code == self._inventory.tensors[source].dtype:
            return (self._tensors.stored(source),)
        return _cast(self._tensors[source], _NUMPY[code])

    def _weight(self, name: str) -> AnyArray:
        """The weight that is merged onto: as it is stored, or as NF4 gives it back."""
        stored = self._tensors[name]
        if not self._is_quantised(name):
            return stored
        backend, storage = self._wanted.backend, self._wanted.storage
        assert storage is not None
        # A backend quantises weights as (out, in), in the order in which it multiplies by them.
        transposed = self._is_transposed()
        back = backend.dequantize(backend.quantize(as_rows(stored, transposed), storage))
        return back.T if transposed else back

    def _is_quantised(self, name: str) -> bool:
        return self._wanted.storage is not None and self._is_linear(name)

    def _is_linear(self, name: str) -> bool:
        """Whether it is the weight of one of the decoder's linear layers, which QLoRA keeps in NF4."""
        if self._layout is None or not name.endswith(".weight"):
            return False
        return canonical_name(self._layout, name).removesuffix(".weight") in self._inventory.linears

    def _is_transposed(self) -> bool:
        return self._layout is not None and self._layout.family == "gpt2"

    def _report(self, names: Sequence[str]) -> dict[str, Any]:
        # All at once, since the threads of NumPy's linear algebra stay awake for a while after each.
        for name, error in self._errors.items():
            error.update = update_norm(self._binding.updates[name])
        errors = self._errors.values()
        changed, elements = (sum(getattr(error, name) for error in errors) for name in ("changed", "elements"))
        if not self._binding.whole and changed < _LEAST_CHANGED * elements:
            raise ModelError(
                f"the merge changes {changed:,} of {elements:,} weights, next to nothing",
                where=", ".join(str(adapter.source) for adapter, _ in self._wanted.adapters),
                expected="an adapter that was trained",
                fix="--dtype float32 without --quantize, if its update is finer than the format",
            )
        base, update, rounding = (
            math.hypot(*(getattr(error, name) for error in errors)) for name in ("base", "update", "rounding")
        )
        wanted = self._wanted
        first = wanted.adapters[0][0]
        return {
            "schema": "mens_merge_report_v1",
            "base_model": first.base_model or str(self._inventory.folder),
            "base": str(self._inventory.folder),
            "onto": "the original weights" if self._wanted.storage is None else "the weights as NF4 gives them back",
            "backend": wanted.backend.plugin,
            "adapters": [
                {"source": str(adapter.source), "kind": adapter.kind, "method": adapter.method, "weight": weight}
                for adapter, weight in wanted.adapters
            ],
            "head_untied": self._binding.untied is not None,
            "dtype": wanted.dtype or "as the base's",
            "quantize": None if wanted.quantize is None else attrs.asdict(wanted.quantize),
            "totals": {
                "merged": len(self._errors),
                "replaced_whole": len(self._binding.whole),
                "copied": len(names) - len(self._errors) - len(self._binding.whole),
                "elements": elements,
                "changed": changed,
                "relative_update": update / base if base else 0.0,
                "relative_rounding": rounding / update if update else 0.0,
            },
            "tensors": {name: error.as_dict() for name, error in self._errors.items()},
            "notes": self._notes,
        }

    def _handoff(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The older system's record for whoever serves the model."""
        return {
            "schema": "vox_external_serving_handoff_v1",
            "schema_version": 1,
            "backend_family": "hf-transformers",
            "base_model": report["base_model"],
            "tokenizer_source": report["base_model"],
            "artifact_dir": str(self._wanted.output.resolve()),
            "prompt_format": "chat_template",
        }


def _cast(stored: AnyArray, dtype: np.dtype[Any]) -> Iterator[AnyArray]:
    if stored.ndim == 0:
        yield stored.astype(dtype)
        return
    rows = max(1, _CAST_ROWS // max(1, math.prod(stored.shape[1:])))
    for start in range(0, stored.shape[0], rows):
        yield stored[start : start + rows].astype(dtype)
