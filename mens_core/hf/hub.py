"""Where a base model lies on disk: the bundled lab base, a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from mens_core.errors import ModelError

__all__ = ["LAB_BASE", "find_model"]

LAB_BASE = "lab-base"

# Never *.bin, *.pt or *.py: nothing is unpickled and no code from a hub is run.
_WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
)


def find_model(model: str | None, revision: str | None) -> tuple[str, Path]:
    """Bring a model to a folder on disk.

    Args:
        model: a folder, a hub id ``owner/name``, or None for the bundled lab base.
        revision: commit, tag or branch of a hub id.

    Returns:
        (name for the manifest, folder).

    Raises:
        ModelError: if the folder does not exist, the repository cannot be had, or what is given a revision has none.
    """
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
    return model, _download(model, revision)


def _download(repository: str, revision: str | None) -> Path:
    # heavy: brings an HTTP client, and only a hub id needs it
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {repository!r} is neither a folder here nor can it be downloaded: {first}",
            where=f"hub id {repository}" + (f", revision {revision}" if revision else ""),
            fix="check the name, the network and HF_TOKEN; or download the folder elsewhere and pass its path",
        ) from error
