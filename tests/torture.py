"""Kill runs at random moments and go on with them: python tests/torture.py [--kills 52] [--only torch_lora=9 …].

Every run is killed by SIGKILL again and again and gone on with until it is complete. Each adapter then has the bytes of
an undisturbed run's, nothing is left that an undisturbed run would not leave, and whenever somebody looked, the
manifest was valid JSON and true. A child is forked for every attempt, from a parent that has imported the frameworks
and computed nothing, so that an attempt takes a second and not ten.

A kill comes from outside, after a random time, or from inside, at the n-th event of a kind that the interpreter's audit
hooks tell of (a file opened, renamed, removed) or the n-th batch of a window: nothing in the tested code knows of it.
"""

import argparse
import collections
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

KERNELS = ("torch_lora", "torch_qlora", "jax_lora", "jax_qlora")
# What is opened, renamed or removed, in the run's folder, when a kill comes from inside.
POINTS = {
    "save": (("open",), "/.step-", 60),
    "rename": (("os.rename",), "checkpoints/step-", 5),
    "manifest": (("open", "os.rename"), "training_manifest.json", 6),
    "rotation": (("shutil.rmtree", "os.remove", "os.rmdir"), "/.step-", 12),
    "telemetry": (("open", "os.rename"), "telemetry.jsonl", 3),
    "end": (("open", "os.rename"), "adapter", 25),
}
KILLS_A_RUN = 6
SETTINGS = {
    "epochs": 3,
    "batch_size": 2,
    "grad_accum": 2,
    "seq_len": 64,
    "rank": 4,
    "dropout": 0.1,
    "learning_rate": 5e-3,
    "max_grad_norm": 0.5,
    "warmup_steps": 3,
    "checkpoint_every": 2,
    "eval_every": 3,
}


def _write_inputs(folder):
    from mens_core import write_random_model

    text = folder / "text.py"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    write_random_model(folder / "model", arch="llama", text=[text], seed=7)
    (folder / "data").mkdir()
    rows = [{"prompt": f"p {i}", "response": f"x = {str(i) * (3 + i % 5)}"} for i in range(24)]
    for name, part in (("train", rows[4:]), ("eval", rows[:4])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _asked(folder, kernel, output):
    # One of the two methods packs, so that both ways are tortured on both backends.
    packing = "best-fit" if kernel.endswith("qlora") else "none"
    places = {"model": str(folder / "model"), "data_dir": folder / "data", "output_dir": output}
    return {**SETTINGS, **places, "backend": kernel, "packing": packing}


def _kill_at(point, count):
    """Die at the count-th event of a kind."""
    left = [count]

    def die_at_last():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if point == "window":
        step = importlib.import_module("mens_torch.step")
        real = step._dropped_loss_sum

        def counted(*given):
            die_at_last()
            return real(*given)

        step._dropped_loss_sum = counted
        return
    kinds, name, _ = POINTS[point]

    def hear(event, arguments):
        if event in kinds and any(isinstance(part, str | Path) and name in str(part) for part in arguments):
            die_at_last()

    sys.addaudithook(hear)


def _fork(folder, asked, kill=None):
    """Begin an attempt in a child; its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if asked["backend"].startswith("jax"):
            import jax

            jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        if kill is not None:
            _kill_at(*kill)
        from mens_core import Planner

        Planner().run(resume="auto", **asked)
        code = 0
    except BaseException:  # noqa: BLE001 (the parent shows it)
        (folder / "trace").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(code)


class Rig:
    """One kernel's runs.

    Attributes:
        kills: by where they hit.
        faults: what was wrong, in words.
    """

    def __init__(self, folder, kernel, rng):
        self.folder, self.kernel, self.rng = folder, kernel, rng
        self.kills, self.faults = collections.Counter(), []
        self.resumes = self.equal = self.runs = self.orphans = self.looks = 0
        self._pids = set()
        output = folder / f"{kernel}-undisturbed"
        started = time.monotonic()
        if os.waitpid(_fork(folder, _asked(folder, kernel, output)), 0)[1]:
            raise SystemExit((folder / "trace").read_text(encoding="utf-8"))
        self._adapter, self._files = _sha256(output / "adapter_model.safetensors"), _files(output)
        self._results = _results(output)
        self.seconds = time.monotonic() - started
        shutil.rmtree(output)

    def run(self, kills):
        """One run, killed at most so often."""
        output = self.folder / f"{self.kernel}-{self.runs}"
        self.runs += 1
        attempts = 0
        started = time.monotonic()
        while not self._attempt(output, kill=kills > attempts):
            attempts += 1
            self.resumes += 1
        if not attempts:
            # Everything was compiled already, which it was not for the undisturbed run.
            self.seconds = min(self.seconds, time.monotonic() - started)
        self.equal += _sha256(output / "adapter_model.safetensors") == self._adapter
        if _results(output) != self._results:
            self.faults.append(f"{output.name}: losses and counters are not those of the undisturbed run")
        left = _files(output) - self._files
        self.orphans += len(left)
        self.faults += [f"{output.name}: left over {name}" for name in sorted(left)]
        shutil.rmtree(output)

    def _attempt(self, output, *, kill):
        """True if the run is complete."""
        choices = ["timer", "timer", "timer", "first_second", *POINTS]
        choices += ["window"] * 2 if self.kernel.startswith("torch") else []
        point = self.rng.choice(choices) if kill else "none"
        inside = None
        if point in POINTS:
            inside = (point, self.rng.randint(1, POINTS[point][2]))
        elif point == "window":
            inside = (point, self.rng.randint(1, 40))
        limit = {"timer": self.seconds, "first_second": min(1.0, self.seconds)}.get(point)
        child = _fork(self.folder, _asked(self.folder, self.kernel, output), inside)
        self._pids.add(child)
        deadline = None if limit is None else time.monotonic() + self.rng.uniform(0, limit)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            self._look(output)
            pause = 0.02
            if deadline is not None:
                pause = min(pause, max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                    break
            time.sleep(pause)
        self._look(output)
        if os.WIFSIGNALED(status):
            self.kills[point] += 1
            self._check_checkpoints(output)
            return False
        if status:
            raise SystemExit((self.folder / "trace").read_text(encoding="utf-8"))
        return True

    def _look(self, output):
        """The manifest is whole and true, if it is there."""
        try:
            text = (output / "training_manifest.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        self.looks += 1
        try:
            manifest = json.loads(text)
        except ValueError:
            self.faults.append(f"{output.name}: the manifest is no JSON")
            return
        if manifest["status"] not in {"planned", "running", "complete"} or manifest["pid"] not in self._pids:
            self.faults.append(f"{output.name}: {manifest['status']} by process {manifest['pid']}")
        if manifest["status"] == "complete":
            written = manifest["sha256"]["run_files"]
            if any(_sha256(output / name) != digest for name, digest in written.items()):
                self.faults.append(f"{output.name}: complete, and its files are not there")

    def _check_checkpoints(self, output):
        """What has a checkpoint's name is a whole one."""
        from mens_core.artifacts.checkpoints import check_checkpoint, checkpoint_folders
        from mens_core.errors import ResumeError

        for path in checkpoint_folders(output / "checkpoints").values():
            try:
                check_checkpoint(path)
            except ResumeError as error:
                self.faults.append(f"{output.name}: {error.what}")


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _results(folder):
    """What does not depend on the clock."""
    results = json.loads((folder / "training_manifest.json").read_text(encoding="utf-8"))["results"]
    timed = ("seconds", "per_sec", "memory")
    return {name: value for name, value in results.items() if not any(word in name for word in timed)}


def torture(kernels, seed):
    """Kill each kernel's runs as often as it says; the summary line, and what was wrong."""
    for module in ("mens_torch.hooks", "transformers.models.llama.modeling_llama", "mens_core.planner"):
        importlib.import_module(module)
    if any(kernel.startswith("jax") for kernel in kernels):
        importlib.import_module("mens_jax.hooks")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    began, rigs = time.monotonic(), []
    try:
        _write_inputs(folder)
        for kernel, kills in kernels.items():
            rig = Rig(folder, kernel, random.Random(f"{seed} {kernel}"))  # noqa: S311 (no secret)
            rigs.append(rig)
            while rig.kills.total() < kills:
                rig.run(min(KILLS_A_RUN, kills - rig.kills.total()))
    finally:
        shutil.rmtree(folder)
    points = sum((rig.kills for rig in rigs), collections.Counter())
    line = (
        f"torture: {points.total()} kills, {sum(rig.resumes for rig in rigs)} resumes, "
        f"{sum(rig.equal for rig in rigs)} of {sum(rig.runs for rig in rigs)} adapters equal, "
        f"{sum(rig.orphans for rig in rigs)} orphans, {sum(rig.looks for rig in rigs)} looks at the manifest, "
        f"{sum(len(rig.faults) for rig in rigs)} faults, {time.monotonic() - began:.0f} s; "
        + ", ".join(f"{rig.kernel} {rig.kills.total()}" for rig in rigs)
        + "; "
        + ", ".join(f"{point} {count}" for point, count in sorted(points.items()))
    )
    unequal = [f"{rig.kernel}: an adapter differs" for rig in rigs if rig.equal != rig.runs]
    return line, [*unequal, *(fault for rig in rigs for fault in rig.faults)]


def main():
    """Torture, and end with exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=52, help="of each of the four kernels (default 52)")
    parser.add_argument("--only", nargs="+", metavar="KERNEL=KILLS", help="these kernels, each so often")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    named = dict(part.split("=") for part in arguments.only or [f"{kernel}={arguments.kills}" for kernel in KERNELS])
    line, faults = torture({kernel: int(kills) for kernel, kills in named.items()}, arguments.seed)
    sys.stdout.write("\n".join([*faults, line]) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
