"""Where a base model lies on disk: the bundled lab base, a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mens_core.errors import ModelError
from mens_core.hf.header import TensorInfo
from mens_core.hf.inventory import Inventory, decoder_linears
from mens_core.hf.layout import Layout

__all__ = ["LAB_BASE", "commit_of", "find_model", "hub_inventory"]

LAB_BASE = "lab-base"

# Never *.bin, *.pt or *.py: nothing is unpickled and no code from a hub is run.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def find_model(model: str | None, revision: str | None, *, weights: bool = True) -> tuple[str, Path]:
    """Bring a model to a folder on disk.

    Args:
        model: a folder, a hub id ``owner/name``, or None or ``lab-base`` for the bundled lab base.
        revision: commit, tag or branch of a hub id.
        weights: whether the weights of a hub id are downloaded too.

    Returns:
        (name for the manifest, folder).

    Raises:
        ModelError: if the folder does not exist, the repository cannot be had, or what is given a revision has none.
    """
    if model == LAB_BASE and not Path(model).exists():
        model = None
    folder = Path(model).expanduser() if model is not None else None
    if revision is not None and (folder is None or folder.is_dir()):
        raise ModelError(f"revision {revision!r} is given, but only a hub id has revisions", where=model or LAB_BASE)
    if model is None or folder is None:
        return LAB_BASE, Path(str(importlib.resources.files("mens_core"))) / "lab_base"
    if folder.is_dir():
        return model, folder.resolve()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise ModelError(
            "there is no such model folder",
            where=model,
            expected="a folder with config.json, tokenizer.json and *.safetensors, or a hub id such as owner/name",
        )
    return model, _download(model, revision, (*_SMALL, *_WEIGHTS) if weights else _SMALL)


def commit_of(folder: Path) -> str | None:
    """The commit that a model was downloaded at, by which the hub's client names its folder; None of other folders."""
    named = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if named else None


def hub_inventory(repository: str, revision: str | None, folder: Path, layout: Layout | None) -> Inventory:
    """What the headers of a repository's weight files say, by asking for the headers alone.

    Args:
        repository: hub id.
        revision: commit, tag or branch.
        folder: where its small files lie.
        layout: what its config.json says.

    Returns:
        An inventory whose files are not on this disk; a tensor's place is counted from the end of its header.

    Raises:
        ModelError: if the repository cannot be asked, or has no safetensors.
    """
    # heavy: brings an HTTP client, and only a hub id needs it
    import huggingface_hub  # noqa: PLC0415

    with _hub_errors(repository, revision):
        found = huggingface_hub.get_safetensors_metadata(repository, revision=revision)
    tensors = {
        name: TensorInfo(
            dtype=info.dtype, shape=tuple(info.shape), start=info.data_offsets[0], stop=info.data_offsets[1]
        )
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return Inventory(
        folder=folder,
        files=tuple(folder / name for name in sorted(found.files_metadata)),
        tensors=tensors,
        places={name: folder / file for name, file in found.weight_map.items()},
        linears=decoder_linears(layout, tensors),
    )


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # heavy: brings an HTTP client, and only a hub id needs it
    import huggingface_hub  # noqa: PLC0415

    with _hub_errors(repository, revision):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one error that says what to look at."""
    # heavy: brings an HTTP client, and only a hub id needs it
    from huggingface_hub import errors  # noqa: PLC0415

    known = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.NotASafetensorsRepoError,
        errors.SafetensorsParsingError,
        OSError,
    )
    try:
        yield
    except known as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {repository!r} is neither a folder here nor can it be had from the hub: {first}",
            where=f"hub id {repository}" + (f", revision {revision}" if revision else ""),
            fix="check the name, the network and HF_TOKEN; or download the folder elsewhere and pass its path",
        ) from error
