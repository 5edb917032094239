"""How a model's conversations are written: by its own chat template, in ChatML where it has none."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from mens_core.chat.chatml import TURN_END, TURN_START, ChatML
from mens_core.chat.rendered import Chat, Rendered
from mens_core.chat.template_chat import TemplateChat
from mens_core.chat.template_files import read_templates

__all__ = ["TURN_END", "TURN_START", "Chat", "ChatML", "Rendered", "open_chat"]


def open_chat(folder: Path, tokenizer: Tokenizer) -> Chat:
    """The way in which a model's conversations are written.

    Args:
        folder: of the model.
        tokenizer: of the model.

    Raises:
        ModelError: if a chat template, or the file that holds it, is malformed.
    """
    files = read_templates(folder, tokenizer)
    return ChatML(tokenizer) if files is None else TemplateChat(files, tokenizer)
