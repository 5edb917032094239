"""One Jinja chat template, run as transformers runs it, without transformers.

The sandbox keeps a template, which is foreign code, from everything but its arguments: no files, no imports, no
attributes that begin with an underscore, no change of what it is given, no range of more than 100 000 numbers. How
long it may work, and how much it may write, is bounded as ``mens_core.chat.bounds`` says.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from mens_core.chat.messages import Message
from mens_core.chat.sealed import Looked, sealing
from mens_core.corpus.faults import Fault
from mens_core.errors import ModelError, printable

if TYPE_CHECKING:
    import jinja2

__all__ = ["PINNED_DATE", "Template"]

#: The day a template is told when it asks for it, so that a row gives the same tokens every day. Llama 3's templates
#: write this one where they have no clock.
PINNED_DATE = dt.datetime(2024, 7, 26)  # noqa: DTZ001 (a template wants the wall clock, which has no zone)

# The largest template in use has 20 thousand characters; a whole row seldom has a million.
_LONGEST_SOURCE, _LONGEST_TEXT = 200_000, 50_000_000
_LONGEST_REASON = 200


class Template:
    """A compiled template.

    Args:
        source: in Jinja.
        tokens: what it may ask for by name: ``bos_token``, ``eos_token`` ….

    Raises:
        ModelError: if it is no valid Jinja, or longer than any template can be.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        # heavy: a template language, needed by no command that only prints help
        import jinja2  # noqa: PLC0415

        if len(source) > _LONGEST_SOURCE:
            raise ModelError("the chat template cannot be used", where=f"it has {len(source)} characters")
        try:
            tree = _environment().parse(source)
            self._tree, self._compiled = tree, _environment().from_string(tree)
        # One that nests too deep fails in whatever way Python's own parser does.
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
            reason = f"line {error.lineno}: {error.message}" if isinstance(error, jinja2.TemplateSyntaxError) else error
            raise ModelError(
                "the chat template is no valid Jinja", where=reason, fix="take it from the model's own page"
            ) from error
        names = {name.name for name in tree.find_all(jinja2.nodes.Name)}
        #: Whether it may write functions that are offered, and the day.
        self.uses_tools, self.uses_date = "tools" in names, "strftime_now" in names
        #: The tags that it compares contents with or cuts them at, such as ``</think>``.
        self.marks = frozenset(
            mark
            for constant in tree.find_all(jinja2.nodes.Const)
            if isinstance(constant.value, str)
            for mark in re.findall(r"<+/?\w+>+", constant.value)
        )
        self._tokens = {"documents": None, **tokens}

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, opened: bool = False) -> str:
        """Write a conversation.

        Args:
            messages: as transformers' users write them.
            tools: JSON schemas; none is told to the template as none.
            opened: whether the assistant's next turn is opened at the end.

        Raises:
            Fault: if the template refuses the conversation, or fails.
            ModelError: if it works, or writes, without end.
        """
        try:
            text = self._written(self._compiled, messages, tools, opened=opened)
        # It was stopped, and would have to be for every row.
        except ModelError:
            raise
        # Whatever a template raises is its way to say that it cannot write this conversation.
        except Exception as error:
            raise Fault(f"a conversation that the chat template refuses: {_reason(error)}", _ACCEPTED) from error
        return text

    def filled(self, messages: Sequence[Message]) -> str | None:
        """Write a conversation with sealed contents, as words are to be put into it.

        Args:
            messages: whose contents are ``Sealed``.

        Returns:
            The text, which is that of any words between their stand-ins; None if it depends on a word.
        """
        try:
            return self._written(self._sealed, messages, (), opened=False)
        except ModelError:
            raise
        # A failure proves nothing: such conversations are rendered word by word, and fail there if they have to.
        except (Looked, Exception):  # noqa: BLE001 (whatever it is)
            return None

    @functools.cached_property
    def _sealed(self) -> jinja2.Template:
        return sealing(_new_environment()).from_string(self._tree)

    def _written(
        self,
        compiled: jinja2.Template,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        opened: bool,
    ) -> str:
        values = {**self._tokens, "messages": messages, "tools": tools or None, "add_generation_prompt": opened}
        compiled.environment.begin()  # type: ignore[attr-defined]
        parts, length = [], 0
        for part in compiled.root_render_func(compiled.new_context(values)):
            parts.append(part)
            length += len(part)
            if length > _LONGEST_TEXT:
                raise ModelError("the chat template makes an endless text", fix="take it from the model's own page")
        return "".join(parts)


_ACCEPTED = "turns in the order, with the roles and the fields, that this model's template can write"


def _reason(error: Exception) -> str:
    text = printable(" ".join(str(error).split()))
    return (text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…") or type(error).__name__


@functools.cache
def _environment() -> jinja2.Environment:
    return _new_environment()


def _new_environment() -> jinja2.Environment:
    """The environment of transformers 5 (``utils/chat_template_utils.py``), with a clock that stands still."""
    import jinja2.ext  # noqa: PLC0415
    from jinja2 import nodes, parser  # noqa: PLC0415

    # heavy: it is made of Jinja's classes
    from mens_core.chat.bounds import BoundedSandbox  # noqa: PLC0415

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``, by which a template may mark what the assistant writes: its body, as it stands."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own type)

        def parse(self, parser: parser.Parser) -> nodes.Scope:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(BoundedSandbox):
        """The sandbox with two short cuts, which answer what it answers: half of a row's time went there."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            # Jinja asks a dict for its own attributes first, and a failure costs more than a look.
            if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
                return obj[attribute]
            return super().getattr(obj, attribute)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            # It depends on the type and the name alone.
            key = type(obj), attr
            if key not in safe:
                safe[key] = super().is_safe_attribute(obj, attr, value)
            return safe[key]

    safe: dict[tuple[type, str], bool] = {}
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.add_filter("tojson", _tojson)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": PINNED_DATE.strftime,
    }
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
