"""Contents that a template may write and may not read: a proof that it only fills its own text with them.

A template that is given sealed contents writes the same text round them as it does round any words, since whatever it
did that depends on a word would have raised ``Looked``. Rows of such a shape need not be rendered: their text is the
shape's own with the words put in.

A sealed text is no ``str``. So nothing written in C, which would see its letters and not ask, takes it for one: it
fails there, and a failure proves nothing and is taken for a look. What all words of the shape have in common is
answered: that they are text, not empty, which blanks are round them, and that no marks are in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

__all__ = ["Looked", "Sealed", "sealing"]


class Looked(BaseException):
    """A template's text depends on a word. No ``Exception``, since Jinja's filters and tests keep some of those."""


def _looked(*_: object) -> NoReturn:
    raise Looked


class Sealed:  # noqa: PLW1641 (it has a hash that is a look)
    """Words that stand for any others of their shape, alone or between a template's own text.

    Args:
        text: the stand-in of the words with blanks round it, or what else a template has written there.
        marked: whether a text holds one of the marks that no words of this shape hold; None if there is more than
            blanks round the words, which may make a mark with them.
        trimmed: whether there are no further blanks round the words; the same for all texts of one conversation.
    """

    __slots__ = ("_marked", "_text", "_trimmed")

    def __init__(self, text: str, marked: Callable[[str], bool] | None = None, *, trimmed: bool = True) -> None:
        self._text, self._marked, self._trimmed = text, marked, trimmed

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if self is not other and (isinstance(other, Sealed) or (isinstance(other, str) and other)):
            raise Looked
        return self is other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: object) -> Sealed:
        return Sealed(self._text + _plain(other), trimmed=self._trimmed)

    def __radd__(self, other: object) -> Sealed:
        return Sealed(_plain(other) + self._text, trimmed=self._trimmed)

    def __contains__(self, part: object) -> bool:
        return self._without(part)

    def startswith(self, part: object) -> bool:
        """As ``str.startswith``, of a mark."""
        return self._without(part)

    endswith = startswith

    def strip(self, letters: str | None = None) -> Sealed:
        """As ``str.strip``, of blanks: the words have none at their ends, a template's own text may."""
        return Sealed(self._text.strip(self._blanks(letters)), self._marked)

    def lstrip(self, letters: str | None = None) -> Sealed:
        """As ``str.lstrip``."""
        return Sealed(self._text.lstrip(self._blanks(letters)), self._marked)

    def rstrip(self, letters: str | None = None) -> Sealed:
        """As ``str.rstrip``."""
        return Sealed(self._text.rstrip(self._blanks(letters)), self._marked)

    def split(self, mark: object, _most: int = -1) -> list[Sealed]:
        """As ``str.split``, at a mark."""
        self._without(mark)
        return [self]

    rsplit = split

    def replace(self, mark: object, _by: object, _most: int = -1) -> Sealed:
        """As ``str.replace``, of a mark."""
        self._without(mark)
        return self

    def _without(self, mark: object) -> bool:
        """False, as the answer whether a mark is somewhere in these words."""
        if self._marked is None or type(mark) is not str or not self._marked(mark) or mark.split() != [mark]:
            raise Looked
        return False

    def _blanks(self, letters: object) -> str | None:
        if self._trimmed and (letters is None or (type(letters) is str and letters.isspace())):
            return letters
        return _looked()

    # Whatever else there is to learn of a text. Jinja asks for attributes first and for items then.
    __getattr__ = __getitem__ = __len__ = __iter__ = __reversed__ = __hash__ = _looked
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = _looked
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _looked


class _Written(str):
    """A piece of a text with sealed words in it, on its way into the text."""

    __slots__ = ("trimmed",)
    trimmed: bool

    def __str__(self) -> str:
        return self

    # Which is asked for by whoever escapes.
    __html__ = _looked


def sealing(environment: jinja2.Environment) -> jinja2.Environment:
    """Teach a fresh environment sealed texts: to write them, to join them, and to know them for texts.

    Returns:
        The environment itself.
    """
    tests, filters, getitem = environment.tests, environment.filters, environment.getitem
    concat = environment.concat

    def write(value: Any) -> Any:
        if not isinstance(value, Sealed):
            return value
        written = _Written(value._text)  # noqa: SLF001
        written.trimmed = value._trimmed  # noqa: SLF001
        return written

    def join(pieces: Iterable[str]) -> Any:
        # The text of a macro or of a block may still be looked at.
        parts = list(pieces)
        sealed = [part for part in parts if isinstance(part, _Written)]
        text = concat(parts)
        return Sealed(text, trimmed=sealed[0].trimmed) if sealed else text

    def item(container: Any, key: Any) -> Any:
        return _looked() if isinstance(key, Sealed) else getitem(container, key)

    def as_text(test: Any) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, Sealed) or test(value)

    trim = filters["trim"]
    filters["trim"] = lambda value, chars=None: value.strip(chars) if isinstance(value, Sealed) else trim(value, chars)
    for name in ("string", "iterable", "sequence"):
        tests[name] = as_text(tests[name])
    environment.finalize = write
    environment.concat, environment.getitem = join, item  # type: ignore[assignment, method-assign]
    return environment


def _plain(other: object) -> str:
    if isinstance(other, Sealed):
        return other._text  # noqa: SLF001
    # str itself: one of its kin could answer for itself.
    return other if type(other) is str else _looked()
