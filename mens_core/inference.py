"""A base, or a base with its adapter, opened to answer and to be measured; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np

from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.lora import LoraAdapter
from mens_core.artifacts.rundir import MANIFEST
from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.errors import DataError, GateError, ModelError
from mens_core.exchange import BatchShape, TrainingState
from mens_core.gates import refuse_failed
from mens_core.hf.files import find_file, read_json
from mens_core.hf.fit import HEAD
from mens_core.hf.inventory import read_inventory
from mens_core.hf.keymap import canonical_name
from mens_core.plan import ExecutionPlan
from mens_core.planner import resolve
from mens_core.text.encode import Encoder, open_encoder
from mens_core.text.tokens import TokenRows
from mens_core.training.data import load_rows

__all__ = ["OpenModel", "open_model", "with_whole"]

_DECIDED_BY_A_RUN = ("model", "revision", "tokenizer", "tokenizer_json", "method", "block_size", "double_quant")


@attrs.frozen(kw_only=True, eq=False)
class OpenModel:
    """What is needed to use a model.

    Attributes:
        plan: of its use.
        backend: which computes.
        encoder: of its tokenizer and template.
        adapter: that it is opened with, or None.
    """

    plan: ExecutionPlan
    backend: Backend
    encoder: Encoder
    adapter: LoraAdapter | None

    def session(self, shape: BatchShape) -> Any:
        """A session for batches up to a shape, with the adapter in it.

        Raises:
            ModelError: as ``mens_open`` and ``mens_restore`` do.
        """
        session = self.backend.open(self.plan, shape)
        if self.adapter is None:
            return session
        return self.backend.restore(session, TrainingState(adapter=self.adapter.tensors(), optimizer={}, step=0))

    def rows(self, path: Path) -> TokenRows:
        """The rows of a file, as training would read them.

        Raises:
            DataError: if there is no such file, or as ``load_rows`` does.
        """
        if not path.is_file():
            raise DataError("there is no such file of rows", where=path)
        return load_rows(path, sha256_file(path), self.plan.contract, self.encoder).rows


def open_model(model: str | None, adapter: LoraAdapter | None, **fields: Any) -> OpenModel:
    """Choose a backend for a model and read its tokenizer; weights are read by ``session``.

    Args:
        model: folder or hub id of the base; None for the one the adapter was trained on, or the lab base.
        adapter: to open it with.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Raises:
        MensError: if base, adapter or backend cannot be used.
    """
    given = {"model": model, **fields} if model is not None else fields
    contract = FineTuneContract.from_fields(trains=False, **((_adapter_fields(adapter) if adapter else {}) | given))
    plan, backend = resolve(contract, trains=False)
    refuse_failed(plan.preflight, "preflight refuses the base")
    if adapter is not None:
        plan = with_whole(plan, adapter)
    encoder = open_encoder(plan.tokenizer, plan.tokenizer_file, plan.model_dir, plan.layout)
    return OpenModel(plan=plan, backend=backend, encoder=encoder, adapter=adapter)


def with_whole(plan: ExecutionPlan, adapter: LoraAdapter) -> ExecutionPlan:
    """The plan with the tensors that an adapter holds whole in the places of the base's.

    Raises:
        ModelError: if one has no counterpart of the same shape in the base, is not finite, or is to be quantised.
        GateError: if the backend does not put them in.
    """
    if not adapter.whole:
        return plan
    if not plan.offer.whole:
        raise GateError(
            f"backend {plan.backend} does not say that it takes tensors trained whole, and the adapter holds "
            f"{len(adapter.whole)}, such as {next(iter(adapter.whole))}",
            where=str(adapter.source),
            fix="--backend torch, or merge-adapter, which makes one model of the base and the adapter",
        )
    layout, inventory = plan.layout, read_inventory(plan.model_dir, None)
    shapes = {canonical_name(layout, name): info.shape for name, info in inventory.tensors.items()}
    if layout.tied:
        shapes[HEAD] = (layout.vocab_size, layout.hidden_size)
    quantised = {f"{path}.weight" for path in inventory.linears if plan.contract.adapter.method == "qlora"}
    whole = {canonical_name(layout, name): tensor for name, tensor in adapter.whole.items()}
    for name, tensor in whole.items():
        problem = (
            "has no counterpart in the base"
            if name not in shapes
            else f"has shape {tensor.shape}, that of the base {shapes[name]}"
            if tensor.shape != shapes[name]
            else "holds numbers that are not finite"
            if not np.isfinite(np.asarray(tensor, np.float32)).all()
            else "takes the place of a layer that is stored in NF4; --method lora"
            if name in quantised
            else None
        )
        if problem is not None:
            raise ModelError(
                f"{name}, which the adapter holds whole, {problem}",
                where=f"{adapter.source} onto {plan.model_dir}",
                expected="the base that the adapter was trained on",
            )
    return attrs.evolve(plan, whole=whole)


def _adapter_fields(adapter: LoraAdapter) -> dict[str, Any]:
    """The contract fields that an adapter's own files decide: a run's manifest, else PEFT's configuration."""
    folder = adapter.source if adapter.source.is_dir() else adapter.source.parent
    record = folder / MANIFEST
    asked = {}
    if find_file(folder, MANIFEST) is not None:
        manifest = read_json(record, expected="the manifest of a run")
        try:
            contract = manifest["plan"]["contract"]
            asked = {name: contract[name] for name in _DECIDED_BY_A_RUN}
            # What a branch stood for then, not what it stands for now.
            asked["revision"] = manifest["base_commit"] or asked["revision"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the run's manifest cannot be read: {error!r}", where=record) from error
    return {"model": adapter.base_model, **asked, **adapter.settings(), "targets": adapter.modules}
