"""Properties of the three parsers of foreign files: a value or an error of ours, never another, and soon."""

import json
import time

from hypothesis import strategies as st

from mens_core.corpus.mix_config import MixConfig, read_mix_config
from mens_core.corpus.row import Row
from mens_core.corpus.rows import read_rows
from mens_core.errors import MensError
from mens_core.hf.header import TensorInfo, read_header

__all__ = ["PARSERS", "check"]

# A single input of these sizes takes milliseconds; machines of tests stall.
_MOST_SECONDS = 10.0

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "user", "assistant", "a.jsonl", "\x1b[31m", "<|im_start|>", "tool_trace", ".."])
)


def _values(keys):
    """JSON with keys that a parser knows, and others."""
    names = st.sampled_from(keys) | st.text(max_size=4)
    return st.recursive(
        _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=20
    )


_ROW_KEYS = (
    "prompt",
    "response",
    "messages",
    "role",
    "content",
    "instruction",
    "input",
    "output",
    "conversations",
    "from",
    "value",
    "tool_calls",
    "tools",
    "function",
    "name",
    "arguments",
    "category",
    "rating",
    "lane",
    "reasoning_content",
    "id",
    "type",
    "source",
)
_HEADER_KEYS = ("dtype", "shape", "data_offsets", "__metadata__", "a", "b")
_MIX_KEYS = (
    "sources",
    "output",
    "path",
    "weight",
    "record_format",
    "optional",
    "sample_rate",
    "include_lanes",
    "exclude_lanes",
    "seed",
    "eval_fraction",
    "dedup",
    "total_rows",
    "<<",
)

_WORDS = st.text(min_size=1, max_size=12)
_TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _SCALARS}),
    max_size=4,
)
_ROWS = st.lists(
    st.fixed_dictionaries({"prompt": _WORDS, "response": _WORDS})
    | _values(_ROW_KEYS)
    | st.fixed_dictionaries({"messages": _TURNS})
    | st.dictionaries(st.sampled_from(_ROW_KEYS), _SCALARS),
    max_size=4,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F4"]),
        "shape": st.lists(st.integers(-1, 5) | st.integers(2**31, 2**64), max_size=4),
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2),
    }
)
_HEADERS = st.dictionaries(st.sampled_from("abcd"), _ENTRY | _values(_HEADER_KEYS), max_size=4) | _values(_HEADER_KEYS)
_SOURCES = st.just([{"path": "a.jsonl"}]) | st.lists(
    st.dictionaries(st.sampled_from(_MIX_KEYS), _SCALARS, max_size=4), max_size=3
)
_OTHERS = dict.fromkeys(_MIX_KEYS[1:], _values(_MIX_KEYS))
_MIXES = st.fixed_dictionaries({"sources": _SOURCES | _SCALARS}, optional=_OTHERS)
_YAML = st.lists(st.sampled_from([*"{}[],:-?&*!|>'\"%@` \n#", *_MIX_KEYS, "!!python/name:os.system", "*a", "&a"]))


def _dumped(value):
    return json.dumps(value).encode()


def _damaged(raw):
    """Bytes with some of them changed, cut out or doubled."""
    cuts = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.binary(max_size=3)), max_size=3)

    def cut(drawn):
        content, damages = drawn
        for start, length, put in damages:
            content = content[:start] + put + content[start + length % 9 :]
        return content

    return st.tuples(raw, cuts).map(cut)


def _header_file(header):
    return len(header).to_bytes(8, "little") + header


def _read_rows(path):
    return all(isinstance(row, Row) for row in read_rows(path))


def _read_header(path):
    return all(isinstance(info, TensorInfo) for info in read_header(path).values())


def _read_mix(path):
    return isinstance(read_mix_config(path), MixConfig)


#: Name → (what a file of it holds, its name, what reads it and says whether the answer is one).
PARSERS = {
    "rows": (
        _damaged(_ROWS.map(lambda rows: b"\n".join(map(_dumped, rows)))) | st.binary(max_size=200),
        "train.jsonl",
        _read_rows,
    ),
    "safetensors header": (
        st.tuples(_damaged(_HEADERS.map(_dumped)).map(_header_file), st.binary(max_size=64)).map(b"".join)
        | st.binary(max_size=200),
        "model.safetensors",
        _read_header,
    ),
    "mix": (
        _MIXES.map(_dumped)
        | _damaged(_MIXES.map(_dumped))
        | _YAML.map(lambda parts: "".join(parts).encode())
        | st.binary(max_size=200),
        "mix.yaml",
        _read_mix,
    ),
}


def check(read, path, raw):
    """Hold one parser to the property on one input; returns whether it gave a value."""
    path.write_bytes(raw)
    started = time.monotonic()
    try:
        taken = read(path)
    except MensError:
        return False
    finally:
        seconds = time.monotonic() - started
        assert seconds < _MOST_SECONDS
    assert taken
    return True
