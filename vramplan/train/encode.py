"""Rows of one kind -> token ids, and which of them are learned. Many rows at a time: tokenizers are fast that way.

- conversations: the assistant's words and the end of its turns are learned (`chat.py`);
- `prompt_completion` as text: the completion and the end-of-text token;
- `text`: all, with an end-of-text token at the end;
- `tokens`: what the row says.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vramplan.core.types import DataSpec
from vramplan.errors import InputError
from vramplan.train import chat
from vramplan.train.chat import Rendered, Span
from vramplan.train.kinds import ASSISTANT, BadRow, Conversation, conversation, sound
from vramplan.train.store import IGNORED

NO_TEMPLATE = 'the tokenizer has no chat template: "### User:", "### Assistant:" headings are used and saved with it'

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, and for each whether the loss counts it. `talk` is what it was made from, if one."""

    input_ids: Sequence[int]
    learned: Sequence[int]
    talk: Conversation | None = None


Result = Encoded | BadRow | InputError  # a BadRow spoils its row, an InputError the whole run
Encoder = Callable[[Sequence[Row]], list[Result]]


def encoder(kind: str, tokenizer: Any, data: DataSpec, warn: Callable[[str], None]) -> Encoder:
    """The function that turns rows of this kind into tokens. `warn` is told of choices made."""
    if kind == "tokens":
        return lambda rows: _each(rows, lambda row: _ready_made(row, len(tokenizer)))
    talks = _TalkEncoder(tokenizer, data, warn)
    if kind not in ("prompt_completion", "text"):
        return lambda rows: talks.encode(_each(rows, lambda row: conversation(kind, row)))
    if tokenizer.eos_token_id is None:
        warn("the tokenizer has no end-of-text token: the model will not learn where an answer ends")
    if kind == "text":
        return lambda rows: _texts(rows, tokenizer, data.text_column)

    def prompts(rows: Sequence[Row]) -> list[Result]:
        """Prompts that are messages go through the template, those that are text do not."""
        said = [isinstance(row.get("prompt"), list) for row in rows]
        talking = [row for row, is_talk in zip(rows, said, strict=True) if is_talk]
        plain = [row for row, is_talk in zip(rows, said, strict=True) if not is_talk]
        made = iter(talks.encode(_each(talking, lambda row: conversation(kind, row))) if talking else ())
        others = iter(_prompts(plain, tokenizer, data.completion_only_loss))
        return [next(made if is_talk else others) for is_talk in said]

    return prompts


def _each(items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """`function` of each item, or the error it raised."""
    results: list[Any] = []
    for item in items:
        try:
            results.append(function(item))
        except (BadRow, InputError) as error:
            results.append(error)
    return results


def _for_good(items: Sequence[Any], function: Callable[[list[Any]], Iterable[Any]]) -> list[Any]:
    """`function` of all items that are no errors, at once; the errors stay where they are."""
    good = [item for item in items if not isinstance(item, Exception)]
    results = iter(function(good) if good else ())
    return [item if isinstance(item, Exception) else next(results) for item in items]


# -------------------------------------------------------------------------------------- text, prompt and completion
def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        what = "no" if column not in row else f"a {type(value).__name__} as"
        raise BadRow(f'has {what} "{column}", expected text')
    return sound(value)


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    return list(tokenizer(texts, **options)["input_ids"]) if texts else []


def _texts(rows: Sequence[Row], tokenizer: Any, column: str) -> list[Result]:
    def encode(texts: list[str]) -> Iterable[Encoded]:
        for text, ids in zip(texts, _ids(tokenizer, texts), strict=True):
            ids = _with_eos(ids, tokenizer) if text.strip() else []
            yield Encoded(ids, b"\1" * len(ids))

    return _for_good(_each(rows, lambda row: _string(row, column)), encode)


def _prompts(rows: Sequence[Row], tokenizer: Any, completion_only: bool) -> list[Result]:
    """In use the prompt is tokenised alone, so it keeps its own tokens: where its last would merge with the first of
    the completion, the completion is tokenised alone as well."""

    def encode(pairs: list[tuple[str, str]]) -> Iterable[Encoded]:
        starts = [_without_eos(ids, tokenizer) for ids in _ids(tokenizer, [prompt for prompt, _ in pairs])]
        wholes = _ids(tokenizer, [prompt + completion for prompt, completion in pairs])
        apart = [i for i, (a, b) in enumerate(zip(starts, wholes, strict=True)) if b[: len(a)] != a or len(b) <= len(a)]
        ends = _ids(tokenizer, [pairs[i][1] for i in apart], add_special_tokens=False)
        for index, end in zip(apart, ends, strict=True):
            wholes[index] = starts[index] + end
        for (_, completion), start, ids in zip(pairs, starts, wholes, strict=True):
            if not completion.strip():
                yield Encoded([], b"")
                continue
            ids = _with_eos(ids, tokenizer)
            given = len(start) if completion_only else 0
            yield Encoded(ids, b"\0" * given + b"\1" * (len(ids) - given))

    return _for_good(_each(rows, lambda row: (_string(row, "prompt"), _string(row, "completion"))), encode)


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


# -------------------------------------------------------------------------------------------------------- tokens
def _ready_made(row: Row, vocabulary: int) -> Encoded:
    """`input_ids`, with `labels` (the same or -100) and `attention_mask` (0: left out) if there are."""
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if row.get("labels") is not None else ids
    mask = _integers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise BadRow("has input_ids, labels and attention_mask of different lengths")
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        raise BadRow(f"has an id outside the tokenizer's {vocabulary:,} tokens")
    if any(label not in (token, IGNORED) for token, label in zip(ids, labels, strict=True)):
        raise BadRow(f"has a label that is neither its token nor {IGNORED}")
    kept = [(token, label != IGNORED) for token, label, seen in zip(ids, labels, mask, strict=True) if seen]
    return Encoded([token for token, _ in kept], bytes(learned for _, learned in kept))


def _integers(row: Row, column: str) -> list[int]:
    value = row.get(column)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise BadRow(f'has no "{column}" that is a list of whole numbers')
    return value


# ------------------------------------------------------------------------------------------------- conversations
class _TalkEncoder:
    """Conversations -> tokens. The tokenizer gets a template, if it has none, when the first one comes."""

    def __init__(self, tokenizer: Any, data: DataSpec, warn: Callable[[str], None]) -> None:
        self.tokenizer, self.warn = tokenizer, warn
        self.assistant_only = data.assistant_only_loss
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.ready = False

    def encode(self, talks: Sequence[Any]) -> list[Result]:
        if not self.ready:
            self.ready = True
            if chat.give_template(self.tokenizer):
                self.warn(NO_TEMPLATE)
        marked = self.assistant_only and chat.marks_the_assistant(self.tokenizer)
        return self._marked(talks) if marked else self._spanned(talks)

    def _spanned(self, talks: Sequence[Any]) -> list[Result]:
        def text_of(talk: Any) -> Any:
            if isinstance(talk, Exception):
                raise talk
            if self.assistant_only:
                return talk, chat.rendered(talk, self.tokenizer)
            text = chat.render(talk, self.tokenizer)
            return talk, Rendered(text, [(0, len(text))])

        return _for_good(_each(talks, text_of), self._tokens)

    def _tokens(self, pairs: list[tuple[Conversation, Rendered]]) -> Iterable[Result]:
        """Tokenise the rendered texts as wholes; learned are the tokens with a character inside a span."""
        if not self.fast:
            yield from _each(pairs, lambda pair: _slowly(pair[0], pair[1], self.tokenizer))
            return
        texts = [made.text for _, made in pairs]
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for (talk, made), ids, offsets in zip(pairs, batch["input_ids"], batch["offset_mapping"], strict=True):
            yield Encoded(ids, inside(offsets, made.spans), talk)

    def _marked(self, talks: Sequence[Any]) -> list[Result]:
        """By {% generation %}. One conversation that the template refuses makes it refuse the whole batch."""

        def encode(good: list[Conversation]) -> Iterable[Result]:
            if len(good) > 1 and any(talk.tools for talk in good):
                return [result for talk in good for result in encode([talk])]
            try:
                made = self.tokenizer.apply_chat_template(
                    [talk.messages for talk in good],
                    tools=good[0].tools,
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
            except Exception as error:
                if len(good) == 1:
                    return [chat.refused(error)]
                return [result for talk in good for result in encode([talk])]
            return [
                Encoded(ids, _of_completion(mask, talk), talk)
                for talk, ids, mask in zip(good, made["input_ids"], made["assistant_masks"], strict=True)
            ]

        return _for_good(talks, encode)


def _of_completion(mask: list[int], talk: Conversation) -> bytes:
    """The template's mask without the assistant's turns that belong to the prompt."""
    earlier = sum(message["role"] == ASSISTANT for message in talk.messages[: talk.first])
    flags = bytearray(mask)
    at = 0
    for _ in range(earlier):
        start = flags.find(1, at)
        end = flags.find(0, start) if start >= 0 else -1
        at = end if end >= 0 else len(flags)
        flags[max(start, 0) : at] = bytes(at - max(start, 0))
    return bytes(flags)


def inside(offsets: Sequence[Span], spans: Sequence[Span]) -> bytearray:
    """For each token whether one of its characters lies in a span. Tokens are in the order of the text."""
    flags = bytearray(len(offsets))
    for start, end in spans:
        if start >= end:
            continue
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        after = bisect_left(offsets, end, key=lambda offset: offset[0])
        flags[first:after] = b"\1" * max(after - first, 0)
    return flags


def _slowly(talk: Conversation, made: Rendered, tokenizer: Any) -> Encoded:
    """For tokenizers that do not say where a token is in the text. InputError if they join across a turn's start."""
    ids: list[int] = []
    learned = bytearray()
    edges = sorted({0, len(made.text), *(edge for span in made.spans for edge in span)})
    for a, b in pairwise(edges):
        piece = list(tokenizer(made.text[a:b], add_special_tokens=False)["input_ids"])
        ids += piece
        learned += bytes([(a, b) in made.spans]) * len(piece)
    if ids != list(tokenizer(made.text, add_special_tokens=False)["input_ids"]):
        raise InputError(
            "this tokenizer (a slow one) joins characters across the start of an assistant turn",
            "use the model's fast tokenizer, or prompt and completion columns",
        )
    return Encoded(ids, learned, talk)
