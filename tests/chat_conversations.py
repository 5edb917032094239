"""Conversations for chat templates, in the shapes that templates treat apart."""

from mens_core.corpus.row import ToolCall, Turn

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}


def user(text):
    return Turn("user", text)


def assistant(text, **fields):
    return Turn("assistant", text, **fields)


def call(number=1):
    # Mistral's templates want ids of nine letters or digits.
    return ToolCall(name="weather", arguments={"city": "Zürich"}, id=f"abcdefgh{number}")


def told(text, number=1):
    return Turn("tool", text, name="weather", tool_call_id=f"abcdefgh{number}")


MULTI = (user("Hi?"), assistant("Hello."), user("More."), assistant("Sure."))
CALLS = (user("Rain?"), assistant("", tool_calls=(call(),)), told('{"sky": "blue"}'), assistant("No rain."))

#: By name: the turns and the functions that are offered.
CONVERSATIONS = {
    "single": (MULTI[:2], ()),
    "multi": (MULTI, ()),
    "system": ((Turn("system", "Be kind."), *MULTI), ()),
    "reasoning": (
        (
            user("Hi?"),
            assistant("Hello.", reasoning="A greeting."),
            user("More."),
            assistant("Sure.", reasoning="Again."),
        ),
        (),
    ),
    "thoughts in contents": (
        (
            user("Hi?"),
            assistant("<think>\nA greeting.\n</think>\n\nHello."),
            user("More."),
            assistant("<think>\nAgain.\n</think>\n\nSure."),
        ),
        (),
    ),
    "blanks": ((user("  Hi?\n"), assistant("\n Hello. \n\n"), user("\tMore.\n"), assistant("  Sure.  ")), ()),
    "one letter": ((user("?"), assistant("."), user("<"), assistant("\\n")), ()),
    "foreign": ((user("Wie heißt „🦀“ auf 中文?"), assistant("螃蟹 <b>&amp;</b> {{ x }} {% y %}")), ()),
    "calls": (CALLS, (WEATHER,)),
    "calls unoffered": (CALLS, ()),
    "two calls": (
        (
            user("Rain?"),
            assistant("", tool_calls=(call(1), call(2))),
            told("blue", 1),
            told("red", 2),
            assistant("No rain."),
            user("Thanks."),
            assistant("Welcome."),
        ),
        (WEATHER,),
    ),
    "words and a call": (
        (user("Rain?"), assistant("I look.", tool_calls=(call(),)), told("blue"), assistant("No rain.")),
        (WEATHER,),
    ),
    "thoughts and calls": (
        (
            user("Rain?"),
            assistant("", reasoning="Look.", tool_calls=(call(),)),
            told("blue"),
            assistant("No rain.", reasoning="Blue."),
        ),
        (WEATHER,),
    ),
    "answers in a row": (
        (user("Hi?"), assistant("Hello."), assistant("There."), user("More."), assistant("Sure.")),
        (),
    ),
    "answer first": ((assistant("Hello."), user("More."), assistant("Sure.")), ()),
}
