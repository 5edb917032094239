"""What the lab base reads: the running interpreter's standard library, as a stream of byte ids.

    *.py ─▶ source files ────────────────────────────┐
        └─▶ docstrings, asked for as ChatML turns ───┼─▶ shuffled, joined by <|endoftext|> ─▶ train, held out
    pydoc_data/topics.py ─▶ topics of the reference ─┘

A file and the docstrings inside it fall on the same side of the held-out split, which the file's content
decides.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mens_core.text.lab import END_OF_TEXT_ID, TURN_END_ID, TURN_START_ID, encode_bytes

__all__ = ["ASKED_SHARE", "HELD_OUT_SHARE", "WRAPPED_SHARE", "Document", "Streams", "build_streams"]

#: Share of the source files that are never trained on.
HELD_OUT_SHARE = 0.05
#: Share of the source files and topics that are shown as the answer of a ChatML dialogue.
WRAPPED_SHARE = 0.05
#: Share of the docstrings that are asked for as dialogues; all of them are read once more inside their files.
ASKED_SHARE = 0.5
#: Folders left out: tests and fixtures, installed packages, tables of character codes, topics (read apart).
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)
#: Records of how one interpreter was built: they name folders of the machine that built it.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
#: Docstrings shorter than this many characters say too little to be an answer.
SHORTEST_DOCSTRING = 40


@dataclass(frozen=True)
class Document:
    """One document: the question that would fetch it, its text, and how it is shown."""

    question: str
    text: bytes
    wrapped: bool
    held_out: bool

    def ids(self) -> list[int]:
        """The document as ids, closed by the end-of-text token."""
        body = encode_bytes(self.text)
        if not self.wrapped:
            return [*body, END_OF_TEXT_ID]
        user = [TURN_START_ID, *encode_bytes(b"user\n" + self.question.encode()), TURN_END_ID]
        answer = [TURN_START_ID, *encode_bytes(b"assistant\n"), *body, TURN_END_ID]
        return [*user, *encode_bytes(b"\n"), *answer, END_OF_TEXT_ID]


@dataclass(frozen=True)
class Streams:
    """The two streams of ids and what they are made of."""

    train: array[int]
    held_out: array[int]
    num_files: int
    num_documents: int
    wrapped_share_of_tokens: float


def build_streams(seed: int) -> Streams:
    """Read the standard library and lay its documents end to end, in an order drawn from ``seed``."""
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_source_files(root))
    documents = [document for path in files for document in _documents_of(path, root)]
    documents += _topics(root)
    random.Random(seed).shuffle(documents)  # noqa: S311 (an order, not a secret)
    train, held_out, wrapped = array("H"), array("H"), 0
    for document in documents:
        ids = document.ids()
        wrapped += len(ids) * document.wrapped
        (held_out if document.held_out else train).extend(ids)
    return Streams(train, held_out, len(files), len(documents), wrapped / (len(train) + len(held_out)))


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            yield path


def _documents_of(path: Path, root: Path) -> Iterator[Document]:
    text = path.read_bytes()
    name = path.relative_to(root).as_posix()
    held_out = _share(text, "held out") < HELD_OUT_SHARE
    yield Document(name, text, _share(text, "wrapped") < WRAPPED_SHARE, held_out)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for qualified, docstring in _docstrings(ast.parse(text), module):
        if _share(docstring.encode(), "asked") < ASKED_SHARE:
            yield Document(f"What does `{qualified}` do?", docstring.encode(), wrapped=True, held_out=held_out)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= SHORTEST_DOCSTRING:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _topics(root: Path) -> list[Document]:
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_bytes())
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return [
        Document(
            f"Explain `{name}` in Python.",
            text.encode(),
            _share(text.encode(), "wrapped") < WRAPPED_SHARE,
            held_out=False,
        )
        for name, text in sorted(topics.items())
    ]


def _share(content: bytes, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but the content and what it is asked for."""
    digest = hashlib.sha256(purpose.encode() + b"\0" + content).digest()
    return int.from_bytes(digest[:8]) / 2**64
