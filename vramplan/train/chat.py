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
    spans = []
    for index, message in enumerate(talk.messages):
        if message["role"] == ASSISTANT and index >= talk.first:
            last = index == len(talk.messages) - 1
            upto = text if last else render(talk, tokenizer, index + 1)
            before = render(talk, tokenizer, index, prompt=True) if index else _header(upto, message)
            if text.startswith(upto) and upto.startswith(before):
                spans.append((len(before), len(upto)))
            else:
                spans.append(_found(text, before, upto, message, index + 1))
    return Rendered(text, spans)


def _header(text: str, message: dict[str, Any]) -> str:
    """What stands before the words of the first message; templates refuse to render no messages at all."""
    return text[: max(text.find(_words(message)), 0)]


def _words(message: dict[str, Any]) -> str:
    return str(message.get("content") or "").strip()


def _found(text: str, before: str, upto: str, message: dict[str, Any], number: int) -> Span:
    """The turn found by its words, for templates (Qwen3's) that write a turn otherwise once others follow.

    There the thoughts are left out of all turns but the last. `upto` shows what ends a turn.
    """
    words = _words(message)
    for part in (words, words.rpartition(_END_OF_THOUGHT)[2].strip()):
        at = text.find(part, len(before))
        ends = upto[upto.rfind(part) + len(part) :]
        if part and part in upto and at >= 0 and text.startswith(before) and text.startswith(ends, at + len(part)):
            return len(before), at + len(part) + len(ends)
    raise InputError(
        f"the chat template rewrites earlier turns (message {number} differs once more follow), so the assistant's "
        "tokens cannot be told apart",
        "use a template with {% generation %}, one assistant turn a row, or prompt and completion columns",
    )
