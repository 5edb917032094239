"""Rows drawn for people: on a terminal with colours, in a pipe with marks, or as a page."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from mens_core.errors import harmless, printable

if TYPE_CHECKING:
    from mens_core.preview import Preview, ShownRow

__all__ = ["preview_page", "preview_text"]

_TRAINED, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_OPEN, _CLOSE = "⟦", "⟧"
_BAR = 40

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; padding: 1rem; border-radius: 6px }
mark { background: #b9ecc4; color: inherit } table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0 }
.wide { width: 20rem } .bar { background: #7aa7d9; height: .8rem } .refused { color: #a40000 } h2 { margin-top: 2rem }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #dfe5ec } pre { background: #1e252d }
mark { background: #22603a } .refused { color: #ff8a80 } }
"""


def preview_text(preview: Preview, *, colours: bool) -> str:
    """The preview as lines; trained tokens are green, or stand between ⟦ and ⟧ where there are no colours."""
    legend = f"{_TRAINED}trained on{_PLAIN}" if colours else f"{_OPEN}trained on{_CLOSE}"
    head = harmless(f"{preview.file}: as {preview.base} reads it, by {_template(preview)}")
    lines = [f"{head}; {legend}"]
    for row in preview.shown:
        lines += [
            "",
            f"── {_heading(row)} ──",
            "".join(_marked(text, trained, colours) for text, trained in row.pieces),
        ]
    lines += ["", *(f"{name:<28}{value}" for name, value in _facts(preview)), "", "length in tokens"]
    most = max(count for _, count in preview.histogram)
    for upper, count in preview.histogram:
        lines.append(f"  ≤ {upper:>7,}  {count:>9,}  {'█' * -(-count * _BAR // most)}")
    lines += [f"warning: {printable(warning)}" for warning in preview.warnings]
    lines += [f"a run would be refused: {preview.refusal}"] if preview.refusal else []
    return "\n".join(lines)


def preview_page(preview: Preview) -> str:
    """The preview as a page of its own, which loads nothing from anywhere."""
    rows = "".join(
        f"<h2>{html.escape(_heading(row))}</h2><pre>"
        + "".join(f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text) for text, trained in row.pieces)
        + "</pre>"
        for row in preview.shown
    )
    facts = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in _facts(preview))
    most = max(count for _, count in preview.histogram)
    bars = "".join(
        f"<tr><td>≤ {upper:,}<td>{count:,}<td class=wide><div class=bar style='width: {count / most:.1%}'></div>"
        for upper, count in preview.histogram
    )
    notes = "".join(f"<li>{html.escape(printable(warning))}" for warning in preview.warnings)
    refusal = (
        f"<pre class=refused>a run would be refused: {html.escape(preview.refusal)}</pre>" if preview.refusal else ""
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(preview.file.name)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(str(preview.file))}</h1>"
        f"<p>As {html.escape(preview.base)} reads it, by {_template(preview)}; <mark>trained on</mark>.</p>"
        f"{refusal}<ul>{notes}</ul><table>{facts}</table>{rows}<h2>length in tokens</h2><table>{bars}</table></html>\n"
    )


def _template(preview: Preview) -> str:
    return "ChatML" if preview.template == "chatml" else "the model's own chat template"


def _heading(row: ShownRow) -> str:
    return f"line {row.line}, {printable(row.source)}: {row.tokens:,} tokens, {row.trained:,} of them trained on"


def _facts(preview: Preview) -> list[tuple[str, str]]:
    counted = [(name.replace("_", " "), f"{count:,}") for name, count in preview.counters.items() if count]
    shares = [(f"tokens of {role}", f"{share:.0%}") for role, share in preview.roles.items()]
    return [*counted, *shares, ("longest row", f"{preview.longest:,}")]


def _marked(text: str, trained: bool, colours: bool) -> str:
    shown = printable(text, keep="\n\t")
    if not trained:
        return shown
    # A colour that went over a line's end would colour what a pager puts there.
    return (
        shown.replace("\n", f"{_PLAIN}\n{_TRAINED}").join((_TRAINED, _PLAIN)) if colours else f"{_OPEN}{shown}{_CLOSE}"
    )
