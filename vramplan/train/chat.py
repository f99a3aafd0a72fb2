"""Conversations through the tokenizer's chat template: the text, and where in it the assistant's words are.

Templates that mark those words with {% generation %} say so themselves; of others an assistant turn is what the text
grows by when that turn is added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vramplan.errors import InputError
from vramplan.train.kinds import ASSISTANT, BadRow, Conversation

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# For tokenizers without a chat template (base models). It is stored in the tokenizer, so that the saved adapter
# carries it and is used with the words it was trained on.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
_END_OF_THOUGHT = "</think>"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; learned is what lies in the spans of characters."""

    text: str
    spans: list[Span]


def give_template(tokenizer: Any) -> bool:
    """Give the tokenizer the plain template if it has none; whether that was so. InputError if that cannot work."""
    if tokenizer.chat_template:
        return False
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has neither a chat template nor an end-of-text token", "use text rows")
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def marks_the_assistant(tokenizer: Any) -> bool:
    """Whether the template itself says which words are the assistant's, in a way that the tokenizer can follow."""
    return bool(getattr(tokenizer, "is_fast", False)) and bool(GENERATION.search(tokenizer.get_chat_template()))


def render(talk: Conversation, tokenizer: Any, count: int | None = None, *, prompt: bool = False) -> str:
    """The first `count` messages as text, with `prompt` up to where the assistant begins. BadRow if refused."""
    messages = talk.messages if count is None else talk.messages[:count]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=talk.tools, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, ValueError
        raise refused(error) from error


def refused(error: Exception) -> BadRow:
    lines = str(error).strip().splitlines()
    return BadRow(f"is refused by the chat template: {(lines[0] if lines else type(error).__name__)[:300]}")


def rendered(talk: Conversation, tokenizer: Any) -> Rendered:
    """The text with a span for each assistant message that is learned: its words and what ends its turn.

    InputError for a template that writes turns in a way that cannot be followed.
    """
    text = render(talk, tokenizer)
    spans: list[Span] = []
    for index, message in enumerate(talk.messages):
        if message["role"] == ASSISTANT and index >= talk.first:
            last = index == len(talk.messages) - 1
            upto = text if last else render(talk, tokenizer, index + 1)
            before = _before(talk, tokenizer, index, upto) if index else _header(upto, message)
            if text.startswith(upto) and upto.startswith(before):
                spans.append((len(before), len(upto)))
            else:
                spans.append(_found(text, talk, index, before, upto, spans[-1][1] if spans else 0))
    return Rendered(text, spans)


def _before(talk: Conversation, tokenizer: Any, index: int, upto: str) -> str:
    """The text up to where the assistant begins message `index`.

    A template may ask for more than it writes of a turn that is there: "<think>" (DeepSeek-R1's). Then what both have
    in common counts.
    """
    before = render(talk, tokenizer, index, prompt=True)
    if upto.startswith(before):
        return before
    asked = render(talk, tokenizer, index)
    shared = next((at for at, (a, b) in enumerate(zip(before, upto, strict=False)) if a != b), len(upto))
    if shared <= len(asked) or not upto.startswith(asked):
        return before
    found = [upto.find(part, len(asked)) for part in _parts(talk.messages[index])]
    return upto[: min([shared, *(at for at in found if at >= 0)])]


def _header(text: str, message: dict[str, Any]) -> str:
    """What stands before the words of the first message; templates refuse to render no messages at all."""
    return text[: max(text.find(_words(message)), 0)]


def _words(message: dict[str, Any]) -> str:
    return str(message.get("content") or "").strip()


def _parts(message: dict[str, Any]) -> list[str]:
    """The words of a message, and those behind its thoughts, which templates leave out."""
    words = _words(message)
    return [part for part in (words, words.rpartition(_END_OF_THOUGHT)[2].strip()) if part]


def _found(text: str, talk: Conversation, index: int, before: str, upto: str, after: int) -> Span:
    """The turn found by its words, for templates that write turns otherwise once others follow: Qwen3's leaves the
    thoughts out of all but the last, Mistral's puts the system's words into the last question.

    `before` shows what stands before a turn, `upto` what ends it; the turn is looked for from character `after` on.
    """
    start = len(before) if text.startswith(before) else _behind(text, talk.messages[index - 1], before, after)
    for part in _parts(talk.messages[index]):
        at = text.find(part, start)
        ends = upto[upto.rfind(part) + len(part) :]
        if start > 0 and part in upto and at >= 0 and text.startswith(ends, at + len(part)):
            return start, at + len(part) + len(ends)
    raise InputError(
        f"the chat template rewrites earlier turns (message {index + 1} differs once more follow), so the assistant's "
        "tokens cannot be told apart",
        "use a template with {% generation %}, one assistant turn a row, or prompt and completion columns",
    )


def _behind(text: str, previous: dict[str, Any], before: str, after: int) -> int:
    """Where the assistant begins after the message before it: behind its words and what follows them in `before`."""
    words = _words(previous)
    header = words + before[before.rfind(words) + len(words) :] if words in before else ""
    at = text.find(header, after) if header else -1
    return at + len(header) if at >= 0 else -1
