"""`python -m vramplan.train.tiny DIR`: a complete little language model and its training data, made on the spot.

For trying the whole of fine-tuning without a download and without a GPU: a Llama of 1.3 million parameters with its
own tokenizer, and paragraphs of a public-domain novel (`text/README.md`) to train on.

An adapter alone can teach a frozen random model little (its loss goes from 7.65 to 7.41), so the model is warmed up for
some seconds on one half of the paragraphs, in lower case and without punctuation. The other half, as printed, is the
data: the adapter has sentences to teach to a model that knows words.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vramplan.errors import InputError, VramplanError

VOCAB_SIZE = 2048
PAD, BOS, EOS, TURN, END_OF_TURN = "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN, END_OF_TURN)  # ids 0 to 4
# Widths are multiples of 64, so that every block of NF4 is whole.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WARM_UP_STEPS = 200
_BATCH, _LENGTH, _LEARNING_RATE = 8, 128, 3e-3


def make(
    directory: Path, *, seed: int = 0, warm_up_steps: int = WARM_UP_STEPS, report: Callable[[str], None] = print
) -> None:
    """Write the model folder, with `train.jsonl` in it, to `directory`, which must be absent or empty.

    The same seed gives the same folder on the same machine and versions. `report` gets a line now and then.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not an empty folder", "name a new folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _fill(draft, seed, warm_up_steps, report)
        draft.chmod(0o755)  # temporary folders are private
        draft.replace(directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    report(f"{directory}: model, tokenizer and train.jsonl")


def paragraphs() -> list[str]:
    """The paragraphs of the packaged text, each as one line, in the novel's order."""
    text = resources.files("vramplan.train").joinpath("text/persuasion.txt").read_text(encoding="ascii")
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _fill(folder: Path, seed: int, warm_up_steps: int, report: Callable[[str], None]) -> None:
    import torch

    texts = paragraphs()
    random.Random(seed).shuffle(texts)
    warm_up, training = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    tokenizer = make_tokenizer(texts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, the same result on any number of cores, no fight for busy ones
    try:
        model = _trained_model(tokenizer, warm_up, seed, warm_up_steps, report)
    finally:
        torch.set_num_threads(threads)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    lines = (json.dumps({"text": text}) + "\n" for text in training)
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def _trained_model(tokenizer: Any, texts: Sequence[str], seed: int, steps: int, report: Callable[[str], None]) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(tokenizer)
        report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
        _warm_up(model, tokenizer, [_bare(text) for text in texts], steps, report)
    return model


def _bare(text: str) -> str:
    """Only the words, in lower case."""
    return " ".join(re.findall("[a-z]+", text.lower()))


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=SIZES["max_position_embeddings"],
        padding_side="right",
    )


def _model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _warm_up(model: Any, tokenizer: Any, texts: Sequence[str], steps: int, report: Callable[[str], None]) -> None:
    """Train all parameters for a few seconds, on random windows of `texts` joined end to end."""
    import torch

    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    stream = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 1))
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(stream) - _LENGTH, (_BATCH,)).tolist()
        batch = torch.stack([stream[start : start + _LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % 25 == 0:
            report(f"warm-up step {step}/{steps}, loss {loss.item():.2f}")
    model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vramplan.train.tiny", description="Makes a tiny model.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to make; absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up-steps", type=int, default=WARM_UP_STEPS, help="0: leave the weights random")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # for one file of 3 MB
    try:
        make(options.directory, seed=options.seed, warm_up_steps=options.warm_up_steps)
    except VramplanError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
