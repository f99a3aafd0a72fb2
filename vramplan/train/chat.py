"""One row of training data -> token ids and which of them are learned. Three kinds of rows:

- `messages`: {"messages": [{"role": ..., "content": ...}, ...]}: the assistant's words are learned;
- `prompt_completion`: {"prompt": text, "completion": text}: the completion and the end-of-text token are learned;
- `text`: {text_column: text}: all is learned, an end-of-text token is appended.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vramplan.core.types import DataSpec
from vramplan.errors import InputError

KINDS = ("messages", "prompt_completion", "text")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXPECTED = {
    "messages": '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
    "prompt_completion": '{"prompt": ..., "completion": ...}',
    "text": "{TEXT_COLUMN: ...}",
}

# For tokenizers without a chat template (base models). It is stored in the tokenizer, so that the saved adapter
# carries it and is used with the words it was trained on.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class BadRow(ValueError):
    """This row cannot be used; the text says why and follows "line 3 "."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, and for each whether the loss counts it."""

    input_ids: list[int]
    learned: list[bool]


Encoder = Callable[[dict[str, Any]], Encoded]


def detect_kind(row: dict[str, Any], data: DataSpec, where: str) -> str:
    """The kind of rows that `row`, the first usable one, shows; an explicit `data.kind` is only checked.

    `where` names file and row in the InputError for columns that fit no kind.
    """
    expected = {kind: text.replace("TEXT_COLUMN", f'"{data.text_column}"') for kind, text in _EXPECTED.items()}
    if data.kind not in ("auto", *KINDS):
        raise InputError(f"{data.kind!r} is not a kind of data", f"one of auto, {', '.join(KINDS)}")
    found = [kind for kind, columns in _columns(data).items() if columns <= row.keys()]
    if data.kind == "auto":
        if found:
            return found[0]
        wanted = " or ".join(expected.values())
    else:
        if data.kind in found:
            return data.kind
        wanted = expected[data.kind]
    columns = ", ".join(sorted(map(str, row))[:12]) or "none"
    raise InputError(f"{where} has the columns {columns}; expected {wanted}", _rename_hint(row, data))


def _columns(data: DataSpec) -> dict[str, set[str]]:
    """Columns of each kind, the most telling kind first; a text column the user named himself tells most."""
    columns = {"messages": {"messages"}, "prompt_completion": {"prompt", "completion"}, "text": {data.text_column}}
    if data.text_column != DataSpec(path="").text_column:
        columns = {"text": columns.pop("text"), **columns}
    return columns


def _rename_hint(row: dict[str, Any], data: DataSpec) -> str:
    if "conversations" in row:
        return 'rename "conversations" to "messages", "from" to "role" (user, assistant) and "value" to "content"'
    if "instruction" in row:
        return 'rename "instruction" (with "input") to "prompt" and "output" to "completion"'
    if data.kind in ("auto", "text"):
        texts = [str(name) for name, value in row.items() if isinstance(value, str)]
        return f"if {texts[0]!r} holds the text, name it as the text column" if texts else ""
    return "leave the kind of data out to have it detected"


def encoder(kind: str, tokenizer: Any, data: DataSpec, warn: Callable[[str], None]) -> Encoder:
    """The function that turns a row of this kind into tokens; it raises BadRow. `warn` is told of choices made."""
    if kind == "messages":
        return _messages_encoder(tokenizer, warn)
    if tokenizer.eos_token_id is None:
        warn("the tokenizer has no end-of-text token: the model will not learn where an answer ends")
    if kind == "prompt_completion":
        return lambda row: _prompt_completion(row, tokenizer)
    return lambda row: _text(row, tokenizer, data.text_column)


# -------------------------------------------------------------------------------------- text, prompt and completion
def _string(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        what = "no" if column not in row else f"a {type(value).__name__} as"
        raise BadRow(f'has {what} "{column}", expected text')
    return value


def _text(row: dict[str, Any], tokenizer: Any, column: str) -> Encoded:
    text = _string(row, column)
    ids = _with_eos(_tokens(tokenizer, text), tokenizer) if text.strip() else []
    return Encoded(ids, [True] * len(ids))


def _prompt_completion(row: dict[str, Any], tokenizer: Any) -> Encoded:
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    if not completion.strip():
        return Encoded([], [])
    start = _without_eos(_tokens(tokenizer, prompt), tokenizer)
    ids = _tokens(tokenizer, prompt + completion)
    # In use the prompt is tokenised alone. Where the last token of the prompt would merge with the first of the
    # completion, the completion is tokenised alone as well.
    if ids[: len(start)] != start or len(ids) <= len(start):
        ids = start + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    ids = _with_eos(ids, tokenizer)
    return Encoded(ids, [index >= len(start) for index in range(len(ids))])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


# ------------------------------------------------------------------------------------------------------ messages
def _messages_encoder(tokenizer: Any, warn: Callable[[str], None]) -> Encoder:
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither a chat template nor an end-of-text token", "use text rows")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        warn('the tokenizer has no chat template: "### User:", "### Assistant:" headings are used and saved with it')
    fast = bool(getattr(tokenizer, "is_fast", False))
    if fast and _GENERATION.search(tokenizer.get_chat_template()):
        return lambda row: _by_template(_messages(row), row.get("tools"), tokenizer)
    return lambda row: _by_prefixes(_messages(row), row.get("tools"), tokenizer, fast)


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's messages without the nulls that columnar files put in."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow('has no "messages": expected a list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"has a message {number} without a role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRow(f"has a message {number} ({message['role']}) whose content is not text")
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise BadRow(f"has no message of the role assistant, only of {roles}: there is nothing to learn")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _by_template(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> Encoded:
    """For templates that mark the assistant's words with {% generation %}."""
    try:
        made = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, ValueError
        raise _refused(error) from error
    return Encoded(list(made["input_ids"]), [bool(one) for one in made["assistant_masks"]])


def _by_prefixes(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, fast: bool) -> Encoded:
    """For other templates: an assistant turn is what the text grows by when that turn is added."""

    def render(count: int, prompt: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages[:count], tools=tools or None, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:
            raise _refused(error) from error

    full = render(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            upto = render(index + 1)
            before = render(index, prompt=True) if index else _header(upto, message)
            if not (full.startswith(upto) and upto.startswith(before)):
                raise InputError(
                    f"the chat template rewrites earlier turns (message {index + 1} differs once more follow), so the "
                    "assistant's tokens cannot be told apart",
                    "use a template with {% generation %}, one assistant turn a row, or prompt and completion columns",
                )
            spans.append((len(before), len(upto)))
    return _spans_to_tokens(full, spans, tokenizer, fast)


def _header(rendered: str, message: dict[str, Any]) -> str:
    """What stands before the words of the first message; templates refuse to render no messages at all."""
    return rendered[: max(rendered.find(str(message.get("content") or "").strip()), 0)]


def _spans_to_tokens(text: str, spans: list[tuple[int, int]], tokenizer: Any, fast: bool) -> Encoded:
    """Tokenise the rendered text as a whole; learned are the tokens with a character inside a span."""
    if fast:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [any(start < b and end > a for a, b in spans) for start, end in made["offset_mapping"]]
        return Encoded(list(made["input_ids"]), learned)
    ids: list[int] = []
    learned = []
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for a, b in pairwise(edges):
        piece = list(tokenizer(text[a:b], add_special_tokens=False)["input_ids"])
        ids += piece
        learned += [(a, b) in spans] * len(piece)
    if ids != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
        raise InputError(
            "this tokenizer (a slow one) joins characters across the start of an assistant turn",
            "use the model's fast tokenizer, or prompt and completion columns",
        )
    return Encoded(ids, learned)


def _refused(error: Exception) -> BadRow:
    lines = str(error).strip().splitlines()
    return BadRow(f"is refused by the chat template: {(lines[0] if lines else type(error).__name__)[:300]}")
