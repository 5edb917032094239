"""The pages say what happens: their commands and their Python are run in order, and what they print is what comes out.

A page's ``console`` blocks hold commands after ``$`` and what they print; its ``python`` blocks are run as they are. In
what is printed ``…`` stands for anything within a line, and alone on a line for any number of lines. Every page begins
in an empty folder with what a reader is supposed to have: ``my_project``, some modules of the standard library, and
``Qwen2.5-0.5B``, a tiny model of that family.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import attrs
import pytest

from mens_core.cli import main

ROOT = Path(__file__).parents[1]
# Not those of an environment, or of a run that `make demo` left.
_OTHERS = {".venv", ".demo", "node_modules"}
PAGES = [page for page in sorted(ROOT.rglob("*.md")) if not _OTHERS & set(page.parts)]
MODULES = (
    "bisect",
    "calendar",
    "cmd",
    "colorsys",
    "copy",
    "csv",
    "fractions",
    "heapq",
    "statistics",
    "string",
    "textwrap",
)


@attrs.frozen
class Block:
    """A fenced block: its language, its line in the page, its text."""

    language: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(match[1], page.count("\n", 0, match.start()) + 1, match[2]) for match in fence.finditer(page)]


def commands(block: Block) -> list[tuple[str, str]]:
    """Command and what it is said to print, for each ``$`` of a block."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"line {block.line}: a console block begins with a command"
    found = []
    for part in parts[1:]:
        command, _, said = part.replace("\\\n", " ").partition("\n")
        while command.count('"') % 2 or ("<<'END'" in command and not command.endswith("\nEND")):
            assert said, f"line {block.line}: a command without an end"
            more, _, said = said.partition("\n")
            command = f"{command}\n{more}"
        found.append((command, said))
    return found


def agrees(said: str, printed: str) -> bool:
    """Whether what was printed is what the page says, its gaps filled."""
    lines = ["(?:.*\n)*?" if line.strip() == "…" else _line(line) for line in said.rstrip("\n").split("\n")]
    return re.fullmatch("".join(lines) + r"\s*", printed.rstrip() + "\n") is not None


def _line(line: str) -> str:
    pieces = [r"\s+".join(map(re.escape, re.split(r"\s+", piece))) for piece in line.rstrip().split("…")]
    return ".*?".join(pieces) + r"[ \t]*\n"


def run(command: str, capfd) -> str:
    """What a command prints; those of this project in this process, which has loaded everything already."""
    words = shlex.split(command.replace("python -m mens_core", "mens", 1), comments=True)
    capfd.readouterr()
    if words[0] == "mens" and not {"|", ">", "&&"} & set(words):
        status = main(words[1:])
    else:
        done = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
        status = subprocess.run(["bash", "-euc", done], check=False).returncode  # noqa: S607
    out, err = capfd.readouterr()
    assert status == 0 or "exit code" in command, f"{command} ended with {status}:\n{out}{err}"
    return out + err


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What a reader is supposed to have."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "my_project").mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        shutil.copy(library / f"{name}.py", folder / "my_project")
    model = folder / "Qwen2.5-0.5B"
    assert main(["init-model", "--arch", "qwen2", "--output", str(model), "--seed", "0"]) == 0
    return folder


EXECUTED = [page for page in PAGES if {"console", "python"} & {block.language for block in blocks(page.read_text())}]


@pytest.mark.parametrize("page", EXECUTED, ids=[str(page.relative_to(ROOT)) for page in EXECUTED])
def test_a_page_says_what_happens(page, desk, tmp_path, monkeypatch, capfd):
    place = shutil.copytree(desk, tmp_path / "desk")
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")
    names: dict[str, object] = {}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)  # noqa: S102 - our own pages
        for command, said in commands(block) if block.language == "console" else ():
            printed = run(command, capfd)
            assert agrees(said, printed), f"{page.name}, line {block.line}: {command}\nprints\n{printed}\nnot\n{said}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page):
    lost = [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page))
        if not target.startswith(("http://", "https://")) and not _leads_somewhere(page, target)
    ]
    assert not lost


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    found = (page.parent / name).resolve() if name else page
    if not anchor:
        return found.exists()
    titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_a_link_to_nowhere_is_found_out():
    page = ROOT / "README.md"
    assert _leads_somewhere(page, "docs/data.md#rows")
    assert not _leads_somewhere(page, "docs/data.md#no-such-title")
    assert not _leads_somewhere(page, "docs/no_such_page.md")


@pytest.mark.parametrize(
    ("said", "printed", "agreed"),
    [
        ("a  b\n", "a b\n", True),
        ("loss … after 3\n", "loss 0.25 after 3\n", True),
        ("a\n…\nz\n", "a\nb\nc\nz\n", True),
        ("a\n…\nz\n", "a\nz\n", True),
        ("a\n", "b\n", False),
        ("loss … after 3\n", "loss 0.25 after 4\n", False),
        ("a\n…\nz\n", "a\nb\n", False),
        ("", "a\n", False),
    ],
)
def test_a_page_that_says_something_else_is_found_out(said, printed, agreed):
    assert agrees(said, printed) is agreed


def test_the_reference_is_what_the_code_says():
    written = runpy.run_path(str(ROOT / "scripts/reference_pages.py"))
    for name, page in written["PAGES"].items():
        current = (written["DOCS"] / name).read_text(encoding="utf-8")
        assert current == page(), "python scripts/reference_pages.py writes it anew"
    written = runpy.run_path(str(ROOT / "scripts/telemetry_page.py"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), "python scripts/telemetry_page.py does"


def test_the_readme_quotes_figures_that_the_suite_of_benchmarks_has_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    written = runpy.run_path(str(ROOT / "benchmarks/suite.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (.+) \| (default|pages kept) \| (\d+\.\d\d \[.+\]) \|", readme, re.MULTILINE)
    measured = set()
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks/avx2"):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert (folder / "results.md").read_text(encoding="utf-8") == written["page"](results)
        lines = [line.split(" | ") for line in map(written["line"], results["figures"])]
        measured |= {(what, allocator, ratio) for _, what, allocator, ratio, *_ in lines}
        reached = [figure["reached"] for figure in results["figures"] if figure["reached"] is not None]
        assert f"{sum(reached)} of {len(reached)} goals" in readme
    assert quoted
    assert {*quoted} <= measured
