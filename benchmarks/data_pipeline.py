"""What it costs to turn a file of rows into packed batches, against the tokenizer alone and against ``datasets``.

    floor   the tokenizer's own encode_batch_fast over the same texts
    ours    read, check, render, tokenise, mask, pack
    peer    datasets: load, map(apply_chat_template with the assistant's mask)

All on one core, in turns, in CPU seconds; ids and masks are compared first. Then memory with four times the rows, and
the second start on a million. Real text: the source of Python's standard library, under a vocabulary trained on it.

    make bench-data
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before any of the libraries starts its threads.
os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import figures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mens_core import FineTuneContract
from mens_core.artifacts.files import sha256_file
from mens_core.chat.open_chat import Chat, ChatML, open_chat
from mens_core.text.encode import Encoder
from mens_core.text.pack import Batching
from mens_core.training.data import ReadRows, load_rows

ROUNDS = 21
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    """Measure and print one line a claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--many", type=int, default=1_000_000, help="rows of the second start")
    parser.add_argument("--measure-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        read(arguments.measure_memory, encoder_of(arguments.measure_memory, template=False))
        # Not by getrusage, which counts what the process was before it became this one.
        print(round(figures.resident("VmHWM")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": scratch, "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        folder = Path(scratch)
        write_tokenizer(folder)
        write_rows(folder / "train.jsonl", arguments.rows)
        speed(folder)
        memory(folder, arguments.rows)
        second_start(folder, arguments.many)


def source_lines() -> list[str]:
    """Lines of the standard library that say something."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [line for file in files for line in file.read_text(errors="ignore").splitlines() if len(line) > 20]


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of 32,000, as GPT-2's and Qwen's are, and the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(source_lines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_rows(path: Path, count: int, *, lines: int = 12) -> None:
    """Conversations of three turns, as long as instruction data are."""
    draw, source = random.Random(0), source_lines()  # noqa: S311 (text to measure with)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answered = (
                "\n".join(draw.choices(source, k=draw.randint(1 + most // 6, most)))
                for most in (lines, -(-lines * 2 // 3))
            )
            turns = [("system", "You are a helpful assistant."), ("user", asked), ("assistant", answered)]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")


def encoder_of(path: Path, *, template: bool) -> Encoder:
    """A fresh encoder, which knows no text yet."""
    file = path.with_name("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    chat: Chat = open_chat(path.parent, tokenizer) if template else ChatML(tokenizer)
    return Encoder(tokenizer, chat, sha256_file(file))


def read(path: Path, encoder: Encoder, content: str = "") -> ReadRows:
    """The rows as a run reads them; without a content's hash they are never found made."""
    contract = FineTuneContract.from_fields(trains=False, data_dir=path.parent, on_overlong="drop", seq_len=4096)
    return load_rows(path, content or str(random.random()), contract, encoder)  # noqa: S311


def ours(path: Path, encoder: Encoder) -> int:
    """Everything, up to packed batches."""
    rows = read(path, encoder).rows
    windows = Batching(batch_size=8, grad_accum=1, seed=0).windows(rows, 0)
    return sum(len(batch.input_ids) for window in windows for batch in window)


def peer(path: Path) -> Callable[[], list[dict[str, list[int]]]]:
    """What a datasets user writes, with a fresh tokenizer."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path.with_name("tokenizer.json")), eos_token="<|im_end|>")  # noqa: S106
    tokenizer.chat_template = TEMPLATE

    def encoded(row: dict[str, object]) -> dict[str, list[int]]:
        found = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "mask": found["assistant_masks"]}

    def run() -> list[dict[str, list[int]]]:
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", download_mode="force_redownload")
        return loaded.map(encoded, remove_columns=["messages"])

    return run


def speed(folder: Path) -> None:
    """Ids and masks against the peer's, then the ratios."""
    path = folder / "train.jsonl"
    rows = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
    texts = ["\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in row) for row in rows]
    agreement(path, peer(path)())
    # Each makes what it needs, a tokenizer that has seen nothing yet, before its time runs.
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "floor": lambda: functools.partial(floor, Tokenizer.from_file(str(folder / "tokenizer.json")), texts),
        "ours": lambda: functools.partial(ours, path, encoder_of(path, template=False)),
        "template": lambda: functools.partial(ours, path, encoder_of(path, template=True)),
        "peer": lambda: peer(path),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            take = make()
            started = time.process_time()
            take()
            seconds[name].append(time.process_time() - started)
    a_row = {name: 1e6 * statistics.median(found) / len(rows) for name, found in seconds.items()}
    print(f"{len(rows)} rows, µs a row: " + ", ".join(f"{name} {value:.0f}" for name, value in a_row.items()))
    for name, what in (("ours", "ChatML"), ("template", "the model's own template")):
        print(
            f"{what}: {ratio(seconds[name], seconds['floor'])} of the tokenizer alone, "
            f"{ratio(seconds['peer'], seconds[name])} as fast as datasets + apply_chat_template"
        )


def floor(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The tokenizer alone, over as many rows at a time as ours."""
    for start in range(0, len(texts), 1024):
        tokenizer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False)


def ratio(above: list[float], below: list[float]) -> str:
    """Median and range of the ratios round by round."""
    found = sorted(one / other for one, other in zip(above, below, strict=True))
    return f"{statistics.median(found):.2f}x [{found[0]:.2f}, {found[-1]:.2f}]"


def agreement(path: Path, theirs: list[dict[str, list[int]]]) -> None:
    """How many rows have the peer's ids, and its mask.

    The peer lets the first token of an answer run together with the newline before it where its text begins with
    blanks; a model that goes on from a prompt never sees such a token.
    """
    for what, template in (("ChatML", False), ("the template", True)):
        mine = read(path, encoder_of(path, template=template)).rows
        same = sum(
            row.input_ids.tolist() == other["input_ids"] and row.supervised.astype(int).tolist() == other["mask"]
            for row, other in zip(mine, theirs, strict=True)
        )
        print(f"{what}: ids and masks of {same} of {len(mine)} rows are apply_chat_template's")


def memory(folder: Path, count: int) -> None:
    """Peak memory of reading, with so many rows and with four times as many."""
    peaks = []
    for rows in (count, 4 * count):
        write_rows(folder / "memory.jsonl", rows)
        command = [sys.executable, __file__, "--measure-memory", str(folder / "memory.jsonl")]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(found.stdout))
    print(f"peak memory: {peaks[0]} MiB with {count} rows, {peaks[1]} MiB with {4 * count}")


def second_start(folder: Path, count: int) -> None:
    """Wall seconds until a run knows its rows: the first time, and when they are found made."""
    path = folder / "many.jsonl"
    write_rows(path, count, lines=1)
    started = time.perf_counter()
    content = sha256_file(path)
    hashed = time.perf_counter() - started
    taken = []
    for _ in range(2):
        encoder = encoder_of(path, template=False)
        started = time.perf_counter()
        found = read(path, encoder, content)
        taken.append(time.perf_counter() - started)
    print(
        f"{len(found.rows):,} rows, {found.rows.tokens:,} tokens: first {taken[0]:.1f} s, "
        f"found made {taken[1]:.2f} s, and {hashed:.2f} s to hash {path.stat().st_size / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
