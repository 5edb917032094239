"""Which of the conversations the published templates cannot write, or not so that the mask can be proved, and why."""

from chat_conversations import CONVERSATIONS
from chat_families import FAMILIES

NO_TOOLS = "no place for"
LEFT_OUT = "leaves out"

#: What cannot be written, or not be proved: template → conversation → why.
REFUSED = {
    "llama-3.1-8b-instruct": {"two calls": "only supports single tool-calls", "words and a call": LEFT_OUT},
    "llama-3.2-3b-instruct": {"two calls": "only supports single tool-calls", "words and a call": LEFT_OUT},
    "gemma-2-2b-it": {"system": "System role not supported"},
    "mistral-7b-instruct-v0.1": {"system": "roles must alternate"},
    # Only a question that stands last gets the system's text.
    "mistral-7b-instruct-v0.3": {"system": LEFT_OUT, "words and a call": LEFT_OUT},
    "mistral-nemo": {"system": LEFT_OUT, "words and a call": LEFT_OUT},
    "gpt-oss-120b": {"two calls": LEFT_OUT, "words and a call": LEFT_OUT},
    # A turn with one call is never closed.
    "deepseek-r1-distill": {"calls unoffered": "no end of turn"},
}
ALTERNATING = {name for name in FAMILIES if name.startswith(("llama-2", "gemma", "mistral"))}
NO_CALLS = {
    name
    for name in FAMILIES
    if name.startswith(("llama-2", "llama-3-", "gemma", "mistral-7b-instruct-v0.1", "phi", "smollm"))
}
#: Calls are written, the functions that are offered are not.
NO_OFFERS = NO_CALLS | {name for name in FAMILIES if name.startswith("deepseek")}


def refused(name, conversation):
    """Why a conversation cannot be used with a template; None if it can."""
    turns, tools = CONVERSATIONS[conversation]
    if tools and name in NO_OFFERS:
        return NO_TOOLS
    if any(turn.tool_calls for turn in turns) and name in NO_CALLS:
        return NO_TOOLS
    if conversation in {"answers in a row", "answer first"} and name in ALTERNATING:
        return "roles must alternate"
    return REFUSED.get(name, {}).get(conversation)
