"""The bench on which hostile files are tried: a public verb, run in process, with everything watched."""

import resource
import shutil
import sys
import time

from mens_core.cli import main

__all__ = ["CANARY", "Bench", "listing", "pickle_bomb", "steering"]

# What one verb may take beyond a run on friendly files. Machines of tests are shared, hence the time.
_MOST_SECONDS = 60
_MOST_BYTES = 1 << 30

CANARY = "canary"


def listing(folder):
    """Every path under a folder with its size, and for small files its bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (
            path.read_bytes() if regular and status.st_size < 100_000 else status.st_size
        )
    return found


def peak():
    """Highest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def steering(text):
    """Characters of a text that would steer a terminal or turn its direction."""
    return [c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in "\u202d\u202e\u2066"]


class Bench:
    """Files to spoil under ``model``, ``data`` and ``adapter``; nothing may be written but under ``output``."""

    def __init__(self, folder, model_dirs, corpus_dir, monkeypatch):
        self.folder, self.world = folder, folder / "world"
        self.model, self.data, self.adapter = (self.world / name for name in ("model", "data", "adapter"))
        self.output = folder / "output"
        self.world.mkdir()
        shutil.copytree(model_dirs["llama"], self.model)
        shutil.copytree(corpus_dir, self.data)
        monkeypatch.chdir(self.world)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("CANARY", str(self.world / CANARY))

    def run(self, verb, capsys):
        """Run a verb on the world; returns (exit code, standard output, standard error)."""
        before, high, started = listing(self.world), peak(), time.monotonic()
        code = main([str(word) for word in self.words(verb)])
        seconds, more = time.monotonic() - started, peak() - high
        printed = capsys.readouterr()
        assert listing(self.world) == before, "something was written outside the output folder"
        assert not any(path.name == CANARY for path in self.folder.rglob("*")), "something was executed"
        assert seconds < _MOST_SECONDS
        assert more < _MOST_BYTES, f"{more / 2**20:.0f} MiB"
        steering = [c for c in printed.out + printed.err if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]
        assert not steering, "the terminal was steered"
        return code, printed.out, printed.err

    def refused(self, verb, capsys):
        """Run a verb that has to refuse; returns its error."""
        code, _, error = self.run(verb, capsys)
        assert code == 2, f"exit code {code}"
        assert sum(line.startswith("error:") for line in error.splitlines()) == 1, error
        assert "Traceback" not in error
        if self.output.exists():
            assert not any(path.name.endswith((".safetensors", ".tmp")) for path in self.output.rglob("*"))
        return error

    def words(self, verb):
        """The command line of a verb on this world."""
        model, output = ["--model", self.model], ["--output", self.output]
        rows = ["--data-dir", self.data, *model, "--seq-len", 256]
        return {
            "plan": ["plan", *rows, "--output-dir", self.output],
            "scan": ["train", *rows, "--output-dir", self.output, "--scan-weights"],
            "train": ["train", *rows, "--output-dir", self.output, "--max-steps", 1, "--rank", 2],
            "show": ["data", "show", *rows[:4], "--no-colour"],
            "config": ["plan", "--config", self.world / "run.yaml", *rows, "--output-dir", self.output],
            "mix": ["corpus", "mix", "--config", self.world / "mix.yaml"],
            "pairs": ["corpus", "pairs", self.data, *output],
            "validate": ["corpus", "validate", self.data / "train.jsonl"],
            "info": ["adapter", "info", self.adapter],
            "diff": ["adapter", "diff", self.adapter, self.adapter],
            "merge": ["merge-adapter", "--adapter", self.adapter, "--base", self.model, *output],
            "generate": ["generate", "--adapter", self.adapter, *model, "--prompt", "x", "--max-new-tokens", 1],
            "eval": ["eval", "--data", self.data / "eval.jsonl", *model],
            "start": ["plan", *rows, "--output-dir", self.output, "--start-from", self.adapter, "--rank", 2],
            "status": ["status", self.adapter],
            "verify": ["verify", self.adapter],
        }[verb]


def pickle_bomb():
    """A pickle that writes the canary when it is loaded."""
    return b"cos\nsystem\n(S'touch \"$CANARY\"'\ntR."
