"""What a row of training data holds, and every kind of conversation as a list of messages.

| kind | columns |
|---|---|
| `messages` | `messages`: [{"role", "content"}, ...]; optional `tools` |
| `sharegpt` | `conversations`: [{"from", "value"}, ...]; optional `system`, `tools` |
| `prompt_completion` | `prompt`, `completion`: both text, or both lists of messages |
| `alpaca` | `instruction`, `output` or `response`; optional `input`, `system`, `history` |
| `tokens` | `input_ids`; optional `labels`, `attention_mask` |
| `text` | the text column |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vramplan.core.types import DATA_KINDS, DataSpec
from vramplan.errors import InputError

ASSISTANT = "assistant"
# What other formats call those who speak. LLaMA-Factory's sharegpt has function_call and observation.
ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_EXPECTED = {
    "messages": '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
    "prompt_completion": '{"prompt": ..., "completion": ...}',
    "alpaca": '{"instruction": ..., "input": ..., "output": ...}',
    "tokens": '{"input_ids": [...], "labels": [...]}',
    "text": "{TEXT_COLUMN: ...}",
}
_QUESTIONS, _ANSWERS = ("question", "query", "input", "problem"), ("answer", "response", "output", "solution")


class BadRow(ValueError):
    """This row cannot be used; the text says why and follows "line 3 "."""


def sound(text: str) -> str:
    """The text. BadRow if it is half a character, as JSON can write it and no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"has half a character (a lone surrogate) at position {error.start} of a text") from None
    return text


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them. Assistant messages before number `first` are not learned."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first: int = 0


# --------------------------------------------------------------------------------------------------- which kind
def detect_kind(row: dict[str, Any], data: DataSpec, where: str) -> str:
    """The kind of rows that `row`, the first usable one, shows; an explicit `data.kind` is only checked.

    `where` names file and row in the InputError for columns that fit no kind.
    """
    if data.kind not in DATA_KINDS:
        raise InputError(f"{data.kind!r} is not a kind of data", f"one of {', '.join(DATA_KINDS)}")
    found = [kind for kind, alternatives in _columns(data).items() if any(each <= row.keys() for each in alternatives)]
    expected = {kind: text.replace("TEXT_COLUMN", f'"{data.text_column}"') for kind, text in _EXPECTED.items()}
    if data.kind == "auto":
        if found:
            return found[0]
        wanted = " or ".join(text for kind, text in expected.items() if kind != "tokens")
    else:
        if data.kind in found:
            return data.kind
        wanted = expected[data.kind]
    columns = ", ".join(sorted(map(str, row))[:12]) or "none"
    raise InputError(f"{where} has the columns {columns}; expected {wanted}", _hint(row, data, found))


def _columns(data: DataSpec) -> dict[str, list[set[str]]]:
    """Columns of each kind, the most telling kind first; a text column the user named himself tells most."""
    columns = {
        "messages": [{"messages"}],
        "sharegpt": [{"conversations"}],
        "prompt_completion": [{"prompt", "completion"}],
        "alpaca": [{"instruction", "output"}, {"instruction", "response"}],
        "tokens": [{"input_ids"}],
        "text": [{data.text_column}],
    }
    if data.text_column != DataSpec(path="").text_column:
        columns = {"text": columns.pop("text"), **columns}
    return columns


def _hint(row: dict[str, Any], data: DataSpec, found: list[str]) -> str:
    """What to do about columns that fit no kind, or another than was asked for."""
    if found:
        return f"these are rows of the kind {found[0]}; leave the kind of data out to have it detected"
    if {"chosen", "rejected"} <= row.keys():
        return "pairs of answers are for preference training; as prompt and completion the chosen ones can be learned"
    questions, answers = (next((n for n in names if n in row), None) for names in (_QUESTIONS, _ANSWERS))
    if questions and answers:
        return f'rename "{questions}" to "prompt" and "{answers}" to "completion"'
    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    return f"if {texts[0]!r} holds the text, name it with --text-column" if texts else ""


# ------------------------------------------------------------------------------------------------ as messages
def conversation(kind: str, row: dict[str, Any]) -> Conversation:
    """The row as messages. BadRow for one that is none, or that leaves nothing to learn."""
    if kind == "alpaca":
        made = Conversation(_alpaca(row))
    elif kind == "prompt_completion":
        prompt, completion = (_messages(row, column) for column in ("prompt", "completion"))
        made = Conversation([*prompt, *completion], _tools(row), len(prompt))
    else:
        column = "messages" if kind == "messages" else "conversations"
        made = Conversation([*_system(row), *_messages(row, column)], _tools(row))
    roles = [message["role"] for message in made.messages[made.first :]]
    if ASSISTANT not in roles:
        others = ", ".join(dict.fromkeys(roles))
        raise BadRow(f"has no message of the role assistant, only of {others}: there is nothing to learn")
    return made


def _messages(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """A column of messages, {"role", "content"} or {"from", "value"}, without the nulls that columnar files put in."""
    messages = _loaded(row.get(column))
    if not isinstance(messages, list) or not messages:
        raise BadRow(f'has no "{column}": expected a list of {{"role": ..., "content": ...}}')
    return [_message(message, number) for number, message in enumerate(messages, start=1)]


def _message(message: Any, number: int) -> dict[str, Any]:
    role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise BadRow(f"has a message {number} without a role")
    rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "from", "content", "value")}
    content = _text_of(message.get("value") if message.get("content") is None else message["content"])
    if content is None and not rest.get("tool_calls"):
        raise BadRow(f"has a message {number} ({role}) whose content is not text")
    return {"role": ROLES.get(role, role), **({} if content is None else {"content": content}), **rest}


def _text_of(content: Any) -> str | None:
    """The text of a message, which may come in parts; None if there is other than text."""
    if not isinstance(content, list):
        return sound(content) if isinstance(content, str) else None
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return sound("".join(texts)) if texts and len(texts) == len(parts) else None


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Stanford Alpaca's columns, and `system` and `history` (pairs of question and answer) of LLaMA-Factory."""
    messages = _system(row)
    history = _loaded(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow('has a "history" that is no list of pairs of question and answer')
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]
    asked, more = row.get("instruction"), row.get("input")
    answer = row.get("output") if row.get("output") is not None else row.get("response")
    question = f"{asked}\n\n{more}" if isinstance(asked, str) and isinstance(more, str) and more.strip() else asked
    messages += [{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]
    for message in messages:
        if not isinstance(message["content"], str):
            name = "an answer" if message["role"] == ASSISTANT else "an instruction"
            raise BadRow(f"has {name} that is no text but {type(message['content']).__name__}")
        sound(message["content"])
    return messages


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = _loaded(row.get("tools"))
    return tools if isinstance(tools, list) and tools else None


def _loaded(value: Any) -> Any:
    """Lists come as JSON text in CSV files, and in many a Parquet file."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
