"""A finished run looked at again: does all that its manifest says still hold?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.adapters import open_adapter, weights_of
from mens_core.artifacts.checkpoints import check_checkpoint, checkpoint_folders
from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mens_core.artifacts.rundir import CHECKPOINTS, MANIFEST, PREFLIGHT
from mens_core.contract import FineTuneContract
from mens_core.errors import MensError, ModelError
from mens_core.hf.files import find_file, read_json
from mens_core.hf.hub import find_model
from mens_core.hf.inventory import read_inventory
from mens_core.hf.layout import read_layout
from mens_core.text.encode import open_encoder

__all__ = ["verify_run"]

_WHOLE = "as its COMPLETE says"
_NOT_RECORDED = "the manifest has no hash of it"


@attrs.frozen
class _Claim:
    """Something that a manifest says.

    Attributes:
        what: it is about.
        recorded: what the manifest says; None where it says nothing.
        now: finds what is so today; FileNotFoundError where there is nothing to look at.
    """

    what: str
    recorded: Any
    now: Callable[[], Any]

    def judged(self) -> dict[str, str]:
        """``what``, ``state`` (ok, changed, missing) and ``detail``."""
        try:
            found = self.now()
        except FileNotFoundError as error:
            return self._with("missing", f"there is no {error.filename or error}")
        except (MensError, OSError) as error:
            return self._with("changed", f"it cannot be read: {str(error).splitlines()[0]}")
        if self.recorded is None:
            return self._with("missing", _NOT_RECORDED)
        if found != self.recorded:
            return self._with("changed", f"{_short(found)}, the manifest says {_short(self.recorded)}")
        return self._with("ok", _short(found))

    def _with(self, state: str, detail: str) -> dict[str, str]:
        return {"what": self.what, "state": state, "detail": detail}


def verify_run(folder: str | Path) -> dict[str, Any]:
    """Recheck every hash that a run's manifest holds, and what else it says of its files.

    Args:
        folder: of the run. A base from the hub is looked for where a run would find it.

    Returns:
        ``run``, ``status`` as the manifest has it, ``holds``, and ``checks``: one for each claim with ``what``,
        ``state`` (``ok``, ``changed``, ``missing``) and ``detail``.

    Raises:
        ModelError: if there is no manifest, or it is not one of a run.
    """
    folder = Path(folder)
    record = find_file(folder, MANIFEST) if folder.is_dir() else None
    if record is None:
        raise ModelError(f"there is no {MANIFEST}", where=folder, expected="the folder of a run")
    manifest = read_json(record, expected="the manifest of a run")
    try:
        checks = [claim.judged() for claim in _claims(folder, manifest)]
        status = str(manifest["status"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the run's manifest cannot be read: {error!r}", where=record) from error
    holds = all(check["state"] == "ok" for check in checks)
    return {"run": str(folder), "status": status, "holds": holds, "checks": checks}


def _claims(folder: Path, manifest: Mapping[str, Any]) -> Iterator[_Claim]:
    yield _Claim("status", "complete", lambda: manifest["status"])
    yield _Claim("contract digest", manifest["finetune_contract_digest"], lambda: _digest(manifest["plan"]))
    yield from _of_base(manifest)
    yield from _of_rows(manifest)
    yield from _of_run(folder, manifest)
    for path in checkpoint_folders(folder / CHECKPOINTS).values():
        yield _Claim(f"checkpoint, {path.name}", _WHOLE, lambda path=path: check_checkpoint(path) and _WHOLE)  # type: ignore[misc]


def _digest(plan: Mapping[str, Any]) -> str:
    given = {name: value for name, value in plan["contract"].items() if value is not None}
    return FineTuneContract.from_fields(trains=False, **given).digest(plan["contents"])


def _of_base(manifest: Mapping[str, Any]) -> Iterator[_Claim]:
    plan, hashes = manifest["plan"], manifest["sha256"]
    contract = plan["contract"]

    def base() -> Path:
        try:
            return find_model(contract["model"], manifest["base_commit"] or contract["revision"])[1]
        except ModelError as error:
            raise FileNotFoundError(f"base to look at: {error.what}") from error

    def tokenizer() -> Path:
        named = contract["tokenizer_json"]
        return Path(named) if named else base() / "tokenizer.json"

    def chat() -> str:
        file = tokenizer() if plan["tokenizer"] == "hf" else None
        return open_encoder(plan["tokenizer"], file, base(), read_layout(base())).chat.digest

    def shards() -> list[str]:
        return sorted(file.name for file in read_inventory(base(), None).files)

    yield _Claim("base, config.json", hashes["config.json"], lambda: sha256_file(base() / "config.json"))
    for name, digest in hashes["base_shards"].items():
        yield _Claim(f"base, {name}", digest, lambda name=name: sha256_file(base() / name))  # type: ignore[misc]
    yield _Claim("base, its weight files", sorted(hashes["base_shards"]), shards)
    yield _Claim(
        "base, names, types and shapes of its tensors",
        hashes["weight_headers"],
        lambda: read_inventory(base(), None).digest,
    )
    if "tokenizer.json" in hashes:
        yield _Claim("tokenizer.json", hashes["tokenizer.json"], lambda: sha256_file(tokenizer()))
    yield _Claim("chat template", hashes["chat"], chat)


def _of_rows(manifest: Mapping[str, Any]) -> Iterator[_Claim]:
    hashes, train = manifest["sha256"], Path(manifest["train_file"])
    yield _Claim(f"rows, {train.name}", hashes["train.jsonl"], lambda: sha256_file(train))
    if "eval.jsonl" in hashes:
        held_out = Path(manifest["eval_file"])
        yield _Claim(f"rows, {held_out.name}", hashes["eval.jsonl"], lambda: sha256_file(held_out))


def _of_run(folder: Path, manifest: Mapping[str, Any]) -> Iterator[_Claim]:
    contract = manifest["plan"]["contract"]
    named = {name: manifest[name] for name in ("execution_kernel", "finetune_contract_digest")}

    def checked() -> dict[str, Any]:
        preflight = read_json(folder / PREFLIGHT, expected="the checks of a run")
        return {
            "execution_kernel": preflight.get("execution_kernel"),
            "finetune_contract_digest": preflight.get("contract_digest"),
        }

    def scaling() -> dict[str, Any]:
        return open_adapter(folder).settings()

    if "start_adapter" in manifest["sha256"]:
        start = Path(contract["start_from"])
        recorded = manifest["sha256"]["start_adapter"]
        yield _Claim("adapter that it went on from", recorded, lambda: sha256_file(weights_of(start)))
    written: Mapping[str, str] = manifest["sha256"].get("run_files", {})
    for name in written or (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        yield _Claim(f"run, {name}", written.get(name), lambda name=name: sha256_file(folder / name))  # type: ignore[misc]
    parity = manifest.get("parity")
    if parity is not None:
        yield _Claim("run, certificate of parity", parity["sha256"], lambda: sha256_file(folder / parity["file"]))
    yield _Claim("run, kernel and digest that were checked", named, checked)
    recorded = {name: contract.get(name, {}) for name in ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")}
    yield _Claim("run, rank and scale of its adapter", recorded, scaling)


def _short(value: Any) -> str:
    """A hash by its first digits, anything else as JSON."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value, ensure_ascii=False)
