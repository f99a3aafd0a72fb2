"""What is learned of a conversation is held against what the assistant says, for templates as they are met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

from test_train_data import CHAT, PLAIN_TEMPLATE, learned_text, read, write_jsonl

from vramplan.errors import InputError
from vramplan.train import tiny
from vramplan.train.chat import DEFAULT_CHAT_TEMPLATE
from vramplan.train.encode import Encoded
from vramplan.train.kinds import Conversation
from vramplan.train.template_check import FIRST_ROWS, TemplateCheck

# As Qwen3's: thoughts stay in what follows the last question alone, and an empty one is written there if there is none.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's: the system's words stand in the last message, if that is a question; of a whole talk they are left out.
LAST_QUESTION = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# As DeepSeek-R1's: thoughts are never written, but asked for.
ASKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)
MARKED = tiny.CHAT_TEMPLATE
SYSTEM = {"role": "system", "content": "Answer as briefly as you can."}


def learn(path: Path, tokenizer: Any, template: str, talk: list[dict[str, Any]], **changes: Any) -> tuple[str, str]:
    """(what is learned of a conversation, the warnings)."""
    told: list[dict[str, Any]] = []
    tokenizer.chat_template = template
    splits = read(write_jsonl(path / "a.jsonl", [{"messages": talk}]), tokenizer, told, seq_len=256, **changes)
    warnings = " ".join(event["message"] for event in told if event["event"] == "warning")
    return learned_text(splits.train[0], tokenizer), warnings


@pytest.mark.parametrize("template", [MARKED, PLAIN_TEMPLATE, THINKING, DEFAULT_CHAT_TEMPLATE])
def test_good_templates_pass_without_a_word(tmp_path: Path, tokenizer: Any, template: str) -> None:
    learned, warnings = learn(tmp_path, tokenizer, template, [SYSTEM, *CHAT])
    assert warnings == ""
    assert "A sailor." in learned and "His wife." in learned
    assert not any(message["content"] in learned for message in (SYSTEM, CHAT[0], CHAT[2]))


def test_words_that_move_are_followed_and_words_left_out_are_said(tmp_path: Path, tokenizer: Any) -> None:
    learned, warnings = learn(tmp_path, tokenizer, LAST_QUESTION, [SYSTEM, *CHAT])
    assert learned == " A sailor.<eos> His wife.<eos>"
    assert warnings.startswith("the chat template leaves out what the system says (")
    learned, warnings = learn(tmp_path, tokenizer, LAST_QUESTION, CHAT)
    assert (learned, warnings) == (" A sailor.<eos> His wife.<eos>", "")


def test_a_template_that_asks_for_thoughts_but_does_not_write_them(tmp_path: Path, tokenizer: Any) -> None:
    for first in ("A sailor.", "<thin> he was."):
        talk = [CHAT[0], {"role": "assistant", "content": f"<think>hm</think>{first}"}, *CHAT[2:]]
        learned, warnings = learn(tmp_path, tokenizer, ASKING, talk)
        assert (learned, warnings) == (f"{first}<eos>His wife.<eos>", "")


def test_thoughts_are_learned_where_the_template_keeps_them(tmp_path: Path, tokenizer: Any) -> None:
    thinking = [{**m, "content": f"<think>\nhm {i}\n</think>\n\n{m['content']}"} if i % 2 else m
                for i, m in enumerate(CHAT)]  # fmt: skip
    learned, _ = learn(tmp_path, tokenizer, THINKING, thinking)
    assert learned == "A sailor.<|im_end|>\n<think>\nhm 3\n</think>\n\nHis wife.<|im_end|>\n"


MARKS_ALL = "{% generation %}" + PLAIN_TEMPLATE + "{% endgeneration %}"


MARKS_NOTHING = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + PLAIN_TEMPLATE
WITHOUT_FIRST_WORD = MARKED.replace("message['content']", "message['content'].split(' ', 1)[-1]")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (MARKS_ALL, r"line 1: the chat template makes the model learn what the user says \(message 1, «Who was he"),
        (MARKS_NOTHING, "does not teach what the assistant says: message 2 is «A sailor.», but learned is «»"),
        (WITHOUT_FIRST_WORD, "does not teach what the assistant says: message 2 is «A sailor.», but learned is «sail"),
    ],
)
def test_a_template_that_teaches_something_else_is_refused(
    tmp_path: Path, tokenizer: Any, template: str, words: str
) -> None:
    assert template != MARKED
    with pytest.raises(InputError, match=words) as error:
        learn(tmp_path, tokenizer, template, CHAT)
    assert "generation" in error.value.hint
    learned, _ = learn(tmp_path, tokenizer, template, CHAT, assistant_only_loss=False)  # then nobody looks
    assert "sailor." in learned


def test_a_turn_whose_end_is_not_learned_is_said(tmp_path: Path, tokenizer: Any) -> None:
    words = "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    template = MARKED.replace(words, "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert template != MARKED
    learned, warnings = learn(tmp_path, tokenizer, template, CHAT)
    assert learned == "A sailor.His wife."
    assert "the end of the assistant's turns is not learned" in warnings and "line 1" in warnings


def encoded(tokenizer: Any, said: str, learned: str, roles: tuple[str, ...] = ("user", "assistant")) -> Encoded:
    messages = [{"role": role, "content": said if role == "assistant" else "What was it about?"} for role in roles]
    ids = tokenizer(learned)["input_ids"]
    return Encoded(ids, [1] * len(ids), Conversation(messages))


def test_spaces_case_and_forms_of_characters_are_the_tokenizers_business(tokenizer: Any) -> None:
    check = TemplateCheck(tokenizer)
    check.look(encoded(tokenizer, "Ａ  Sailor\n", " a sailor<|im_end|>"), "line 1")
    with pytest.raises(InputError, match="but learned is"):
        check.look(encoded(tokenizer, "A sailor", "a tailor<|im_end|>"), "line 2")


def test_enough_rows_are_enough_but_a_new_order_is_looked_at(tokenizer: Any) -> None:
    check = TemplateCheck(tokenizer)
    for number in range(FIRST_ROWS):
        check.look(encoded(tokenizer, "A sailor", "A sailor<|im_end|>"), f"line {number}")
    check.look(encoded(tokenizer, "A sailor", "a tailor<|im_end|>"), "line 99")
    with pytest.raises(InputError):
        check.look(encoded(tokenizer, "A sailor", "a tailor", ("system", "user", "assistant")), "line 100")
    assert check.endless == ""


def test_tools_that_are_called_must_be_learned(tokenizer: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]}
    talk = Conversation([CHAT[0], call])
    for text, fine in (('{"name": "look_up"}<|im_end|>', True), ("nothing<|im_end|>", False)):
        ids = tokenizer(text)["input_ids"]
        try:
            TemplateCheck(tokenizer).look(Encoded(ids, [1] * len(ids), talk), "line 1")
        except InputError:
            assert not fine
        else:
            assert fine
