"""Do the learned tokens say what the assistant says, and nothing else?

Which tokens are learned is worked out from the chat template, and templates do as they like: they leave out parts,
rewrite turns, mark too much or too little. So the learned tokens of the first rows, and of every new order of roles,
are turned back into text and held against the messages.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from vramplan.errors import InputError
from vramplan.train.encode import Encoded
from vramplan.train.kinds import ASSISTANT, Conversation

FIRST_ROWS, MOST_ORDERS = 32, 256
_SHOWN = 60  # characters of a text in a message
_TELLING = 8  # characters from which a text cannot be part of the template by chance


class TemplateCheck:
    """Looks at rows until it has seen enough kinds of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rows = 0
        self.orders: set[tuple[str, ...]] = set()
        self.endless = ""  # the first row whose last turn has no end that is learned
        self.unsaid = ""  # the first row of which the template leaves out what another than the assistant says

    def look(self, row: Encoded, where: str) -> None:
        """InputError, without the row's place, if what is learned is not what the assistant says."""
        talk = row.talk
        if talk is None:
            return
        order = tuple(message["role"] for message in talk.messages)
        if self.rows >= FIRST_ROWS and (order in self.orders or len(self.orders) >= MOST_ORDERS):
            return
        self.rows += 1
        self.orders.add(order)
        ids = [token for token, learned in zip(row.input_ids, row.learned, strict=True) if learned]
        if not ids and not any(_said(message) for message in talk.messages if message["role"] == ASSISTANT):
            return  # there is nothing that could be learned
        if getattr(self.tokenizer, "unk_token_id", None) in ids:
            return  # what the vocabulary lacks cannot be turned back
        rest = self._without_words(talk, self._text(ids))
        self._refuse_others(talk, rest)
        whole = _plain(self._text(row.input_ids))
        unsaid = [m["role"] for m in talk.messages if (words := _others_words(m)) and _plain(words) not in whole]
        if unsaid and not self.unsaid:
            self.unsaid = f"{unsaid[0]}, {where}"
        if not rest[-1] and not self._special(row):
            self.endless = self.endless or where

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _without_words(self, talk: Conversation, text: str) -> list[str]:
        """What is learned before, between and after the assistant's words. InputError if they are not all there."""
        learned, at, rest = _plain(text), 0, []
        for number, message in enumerate(talk.messages, start=1):
            if message["role"] != ASSISTANT or number <= talk.first:
                continue
            for words in _said(message):
                found = learned.find(_plain(words), at)
                if found < 0:
                    raise InputError(
                        f"the chat template does not teach what the assistant says: message {number} is "
                        f"{_show(words)}, but learned is {_show(text)}",
                        "mend the template's {% generation %} marks; --no-assistant-only-loss learns all that is said",
                    )
                rest.append(learned[at:found])
                at = found + len(_plain(words))
        return [*rest, learned[at:]]

    def _refuse_others(self, talk: Conversation, rest: list[str]) -> None:
        for number, message in enumerate(talk.messages, start=1):
            words = _others_words(message)
            if words and any(_plain(words) in part for part in rest):
                raise InputError(
                    f"the chat template makes the model learn what the {message['role']} says (message {number}, "
                    f"{_show(words)})",
                    "mend the template's {% generation %} marks, or say --no-assistant-only-loss if that is meant",
                )

    def _special(self, row: Encoded) -> bool:
        """Whether the last learned token is a special one: the end of a turn."""
        last = max(index for index, learned in enumerate(row.learned) if learned)
        return row.input_ids[last] in self.tokenizer.all_special_ids


def _others_words(message: dict[str, Any]) -> str:
    """What somebody else than the assistant says, if it is long enough to be told from the template's own words."""
    words = message.get("content")
    telling = message["role"] != ASSISTANT and isinstance(words, str) and len(_plain(words)) >= _TELLING
    return str(words) if telling else ""


def _said(message: dict[str, Any]) -> list[str]:
    """What must be found again of a message: its words without the thoughts, and the tools it calls by name."""
    content = message.get("content")
    words = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, dict)]
    functions = [call.get("function") if isinstance(call.get("function"), dict) else call for call in calls]
    return [text for text in (words, *(str(f.get("name") or "") for f in functions if f)) if text]


def _plain(text: str) -> str:
    """Without what tokenizers change on the way: spaces, case, the form of characters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _show(text: str) -> str:
    flat = " ".join(text.split())
    return f"«{flat}»" if len(flat) <= _SHOWN else f"«{flat[: _SHOWN - 1]}…»"
