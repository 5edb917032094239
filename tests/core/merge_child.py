"""Merges in a process of their own, run by ``test_merge_streams.py`` and ``test_merge_faults.py``.

python merge_child.py FOLDER MODE …

    plain    merge FOLDER/adapter into FOLDER/base as FOLDER/plain; print the peak of memory above that before, in bytes
    hold     the same, never telling the system that pages need not stay: the mistake that must show
    small    the same as plain, and no file may become larger than a few thousand bytes
    killed   the same as plain, and the process kills itself once the fourth tensor is merged
"""

import os
import resource
import signal
import sys
from pathlib import Path

import mens_core
from mens_core.artifacts.tensors import TensorFolder
from mens_core.backend import Backend
from mens_core.errors import MensError
from mens_core.plugins import load_backend

LARGEST_FILE = 20_000


def main() -> None:
    """Run one mode after the other."""
    load_backend("torch")
    for mode in sys.argv[2:]:
        sys.stdout.write(f"{run(Path(sys.argv[1]), mode)}\n")


def run(folder: Path, mode: str) -> int | MensError:
    """Bytes, or the error that it ended with."""
    if mode == "hold":
        TensorFolder.forget = lambda _: None
    if mode == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    if mode == "killed":
        kill_after(4)
    # What came before is not this merge's: the mark of the highest use starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    try:
        mens_core.merge([(folder / "adapter", 1.0)], base=folder / "base", output=folder / mode, backend="torch")
    except MensError as error:
        return error
    return resident("VmHWM") - before


def kill_after(count: int) -> None:
    """The process ends in the middle of a merge, with no chance to clean up."""
    plain, calls = Backend.merge, []

    def merge(*arguments):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    Backend.merge = merge


def resident(field: str) -> int:
    """Bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


if __name__ == "__main__":
    main()
