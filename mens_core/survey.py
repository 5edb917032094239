"""What can be learned of a base and of the rows before anything is spent: small files whole, headers, a sample."""

from __future__ import annotations

import math
from pathlib import Path

import attrs

from mens_core.artifacts.files import sha256_file
from mens_core.contract import FineTuneContract
from mens_core.corpus.data_dir import DataFiles, find_data
from mens_core.errors import ContractError
from mens_core.gates import base_gates, data_gates, folder_gates, refuse_failed
from mens_core.hf.files import find_file
from mens_core.hf.hub import find_model, hub_inventory
from mens_core.hf.inventory import Coverage, Inventory, holds_weights, middle_coverage, read_inventory
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import Layout, read_layout
from mens_core.plan import BaseWeights, GateVerdict
from mens_core.text.encode import Encoder, open_encoder
from mens_core.training.data import RowSample, sample

__all__ = ["Base", "Rows", "look_at_base", "look_at_rows"]


@attrs.frozen(kw_only=True)
class Base:
    """The base model.

    Attributes:
        name: what the user called it.
        folder: where it lies.
        layout: what config.json says.
        inventory: what the headers of its weight files say.
        coverage: of its attention output projections.
        tokenizer: ``hf`` or ``lab``.
        tokenizer_file: the tokenizer.json, whether it is used or not.
        encoder: of that tokenizer.
        gates: what was checked.
    """

    name: str
    folder: Path
    layout: Layout
    inventory: Inventory
    coverage: Coverage
    tokenizer: str
    tokenizer_file: Path
    encoder: Encoder
    gates: tuple[GateVerdict, ...]

    @property
    def weights(self) -> BaseWeights:
        """What backends are told: the tensors config.json asks for; of an unknown family those that are there."""
        inventory, known = self.inventory, self.layout.family is not None
        asked = sum(math.prod(shape) for shape in tensor_shapes(self.layout).values()) if known else 0
        return BaseWeights(
            parameters=asked if known else inventory.parameters,
            stored_bytes=inventory.stored_bytes,
            linears=inventory.linears,
        )

    def contents(self) -> dict[str, str]:
        """Sha256 of config and tokenizer under names that hold no path; of the weights, names, types and shapes."""
        files = {"config.json": self.folder / "config.json"}
        files |= {"tokenizer.json": self.tokenizer_file} if self.tokenizer == "hf" else {}
        hashes = {name: sha256_file(path) for name, path in files.items()}
        return hashes | {"weight_headers": self.inventory.digest, "chat": self.encoder.chat.digest}


@attrs.frozen(kw_only=True)
class Rows:
    """The rows of a run.

    Attributes:
        files: where they are.
        sample: some of them.
        gates: what was checked.
    """

    files: DataFiles
    sample: RowSample
    gates: tuple[GateVerdict, ...]

    def contents(self) -> dict[str, str]:
        """Sha256 of the files of rows, under names that hold no path."""
        files = {"train.jsonl": self.files.train, "eval.jsonl": self.files.held_out}
        return {name: sha256_file(path) for name, path in files.items() if path is not None}


def look_at_base(contract: FineTuneContract, *, weights: bool) -> Base:
    """Find the base and read what is small.

    Args:
        contract: names the base.
        weights: whether the weights of a hub id are downloaded; without them their headers are asked for.

    Raises:
        ModelError: if it cannot be found, or config, headers or tokenizer are malformed.
        GateError: if it has no config.json or no tokenizer that fits.
    """
    asked = contract.model
    name, folder = find_model(asked.model, asked.revision, weights=weights)
    present = folder_gates(folder)
    refuse_failed(present)
    layout = read_layout(folder)
    tokenizer = asked.tokenizer if asked.tokenizer != "auto" else _own_tokenizer(contract)
    # The folder's own is held to the folder; a file that was named may lie anywhere.
    tokenizer_file = asked.tokenizer_json or find_file(folder, "tokenizer.json") or folder / "tokenizer.json"
    gates = base_gates(layout, tokenizer, tokenizer_file)
    refuse_failed(gates)
    on_hub = not (weights or holds_weights(folder) or asked.model is None or Path(asked.model).expanduser().is_dir())
    inventory = hub_inventory(name, asked.revision, folder, layout) if on_hub else read_inventory(folder, layout)
    return Base(
        name=name,
        folder=folder,
        layout=layout,
        inventory=inventory,
        coverage=middle_coverage(layout, inventory.tensors, contract.adapter.method),
        tokenizer=tokenizer,
        tokenizer_file=tokenizer_file,
        encoder=open_encoder(tokenizer, tokenizer_file, folder, layout),
        gates=(*present, *gates),
    )


def look_at_rows(contract: FineTuneContract, base: Base) -> Rows:
    """Find the rows and read some of them.

    Raises:
        ContractError: if no data folder is given.
        DataError: if none of the rows can be used.
        GateError: if there are none, or the model is too short for them.
    """
    if contract.data.data_dir is None:
        raise ContractError("data_dir is required", fix="python -m mens_core train --help")
    files = find_data(contract.data.data_dir)
    gates = data_gates(contract, files.train, files.held_out, base.layout)
    refuse_failed(gates)
    return Rows(files=files, sample=sample(files.train, contract, base.encoder), gates=gates)


def _own_tokenizer(contract: FineTuneContract) -> str:
    return "lab" if contract.model.model is None and contract.model.tokenizer_json is None else "hf"
