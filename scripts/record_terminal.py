"""Record what a command shows on a terminal, as a picture.

    python scripts/record_terminal.py docs/images/train.svg python -m mens_core train …

It runs on a pseudo-terminal of its own, 100 columns wide; what its last screen shows is drawn, with its colours. Needs
the extra ``docs``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pty
import select
import shlex
import subprocess
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 100, 200


def record(command: list[str]) -> pyte.Screen:
    """The screen after the command has ended."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **size}) as process:  # noqa: S603
        os.close(theirs)
        while process.poll() is None or select.select([ours], [], [], 0.1)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    stream.feed(os.read(ours, 1 << 16))
                except OSError:  # how a pseudo-terminal ends
                    break
    os.close(ours)
    return screen


def lines(screen: pyte.Screen) -> list[Text]:
    """Its lines with their colours, up to the last that is not blank."""
    drawn = []
    for row in range(LINES):
        text, cells = Text(), (screen.buffer[row][column] for column in range(COLUMNS))
        for (colour, bold), alike in itertools.groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text.append("".join(cell.data for cell in alike), Style(color=_colour(colour), bold=bold))
        text.rstrip()
        drawn.append(text)
    while drawn and not drawn[-1].plain:
        drawn.pop()
    return drawn


def _colour(name: str) -> str | None:
    named = {"brown": "yellow", "default": None}
    return named.get(name, f"#{name}" if len(name) == 6 and name != "yellow" else name)


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    screen = record(arguments.command)
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    shown = ["python", *arguments.command[1:]] if "python" in arguments.command[0] else arguments.command
    console.print(Text(f"$ {shlex.join(shown)}", Style(bold=True)))
    for line in lines(screen):
        console.print(line)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.output), title="mens-core", unique_id="run")


if __name__ == "__main__":
    main()
