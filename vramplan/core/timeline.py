"""Plays one optimizer step: which tensor is born when, and when it dies.

The step is played on a few layers by `tape` (a miniature autograd) and then unrolled to the model's depth: layers of
one kind do the same, so the section of events of a middle layer stands for all of them. Two phases that a user knows
come out, "forward" (with the loss) and "backward" (with recomputation), then "optimizer".

The order of things is that of transformers 5.17 under bf16 autocast: `driver` "loop" is the tutorials' own loop,
"trainer" is `transformers.Trainer(bf16=True)`.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from . import architecture as arch
from .blocks import Player, Shared, block
from .head import chunked_loss, full_loss
from .masks import always_masked, mask_batch, mask_kind, padded, pattern_period
from .ops import BF16, FP32, dropout, unary
from .tape import Leaf, Recorder, Tape, Tensor
from .types import GpuProfile, ModelSpec, RunSpec
from .unroll import Unrolled

# Families whose decoder makes both masks, also where all layers are of one kind.
BOTH_MASKS = ("ministral", "cohere2", "olmo3", "gemma2", "gemma3_text")


def checkpointed(levers_checkpointing: str, layer: int) -> bool:
    """Whether this layer keeps only its input. transformers' every_n_layers=k: layers 0, k, 2k, ..."""
    if levers_checkpointing == "none":
        return False
    return layer % checkpoint_period(levers_checkpointing) == 0


def checkpoint_period(checkpointing: str) -> int:
    """ "all" -> 1, "every-4" -> 4, "none" -> 1 (all layers alike)."""
    return int(checkpointing.removeprefix("every-")) if checkpointing.startswith("every-") else 1


class Step:
    """One optimizer step on the played depth. Adapter gradients and inputs live here, as they do in the trainer."""

    def __init__(self, spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> None:
        self.spec = spec
        self.run = run
        self.rec = Recorder()
        self.tape = Tape(self.rec, gpu.compute_capability)
        self.player = Player(self.tape, spec, run, gpu)
        self.wide = FP32 if run.levers.upcast == "all" else BF16
        lora = run.lora
        self.adapters = [
            {
                x.short: (
                    self.tape.parameter(lora.r, x.in_features, lora.dtype, x.short + " lora_A"),
                    self.tape.parameter(x.out_features, lora.r, lora.dtype, x.short + " lora_B"),
                )
                for x in arch.lora_linears(spec, lora)
            }
            for _ in range(spec.num_layers)
        ]

    # ---------------------------------------------------------------------------------------------------- playing
    def play(self) -> None:
        """Micro-steps (at most two: the second has gradients to add to), then clipping and the optimizer."""
        self.rec.mark("forward batch")
        kept: object = None
        for _ in range(min(self.run.accumulation, 2)):
            kept = None
            kept = self.micro_step()
        self.tape.layer = -1
        if self.run.driver == "trainer":
            kept = None
        self.rec.mark("optimizer start")
        self.optimizer()
        del kept
        self.rec.mark("optimizer zero_grad")
        for layer in self.adapters:
            for pair in layer.values():
                for weight in pair:
                    assert isinstance(weight.node, Leaf)
                    weight.node.grad = None
        self.rec.mark("end")

    def micro_step(self) -> object:
        """Forward, loss and backward of one micro-batch; returns what the loop keeps alive through its `loss`."""
        run, tape = self.run, self.tape
        tokens = self.player.tokens
        self.rec.scope = "activations.inputs"
        ids = tape.new("input_ids", run.micro_batch_size, run.seq_len, "int64")
        batch = []
        if run.driver == "trainer":
            batch = [
                tape.new(name, run.micro_batch_size, run.seq_len, "int64") for name in ("labels", "attention_mask")
            ]
        self.rec.mark("forward embed")
        tape.in_backward = False
        tape.cast_cache = {}
        loss = self.forward(tokens)
        tape.layer = -1
        self.rec.mark("forward autocast exit")
        tape.cast_cache = None
        loss = self.outputs_to_fp32(loss)
        self.rec.mark("backward start")
        tape.in_backward = True
        self.rec.scope = "activations.gradients"
        root = loss[0]
        del loss
        tape.layer = -1
        tape.backward(root, tape.new("gradient of the loss", 1, 1, FP32))
        tape.layer = -1
        self.rec.mark("backward end")
        self.player.forget()
        tape.in_backward = False
        del ids, batch
        return root

    def outputs_to_fp32(self, outputs: list[Tensor]) -> list[Tensor]:
        """accelerate's `convert_outputs_to_fp32` copies the logits once more, though nobody asked for them."""
        if self.run.driver == "trainer" and len(outputs) > 1:
            copy = self.tape.new(
                "logits in fp32 for the caller", outputs[1].rows, outputs[1].columns, FP32, "loss.logits"
            )
            del copy
        return outputs[:1]

    def embed(self, tokens: int) -> Tensor:
        """The embedding's output; checkpointing makes it require a gradient (`enable_input_require_grads`)."""
        tape, hidden = self.tape, self.spec.hidden_size
        inputs = tape.new("inputs_embeds", tokens, hidden, self.wide)
        if self.spec.model_type.startswith("gemma"):
            inputs = unary(tape, inputs, "inputs_embeds scaled")
        if self.run.levers.checkpointing != "none":
            inputs.node = Leaf(tape, variable=inputs.detach())
        if self.spec.model_type == "granite":
            inputs = unary(tape, inputs, "inputs_embeds scaled")
        return dropout(tape, inputs, self.spec.embedding_dropout)

    def forward(self, tokens: int) -> list[Tensor]:
        """Decoder, final norm, head and loss: [loss] or [loss, logits] as the model returns them."""
        last_hidden_state = self.decoder(tokens)
        self.tape.layer = -1
        self.rec.scope = "loss.logits"
        if self.run.levers.loss == "fused":
            return [chunked_loss(self.tape, self.spec, last_hidden_state, self.wide, self.run.micro_batch_size)]
        return full_loss(self.tape, self.spec, last_hidden_state, self.wide)

    def decoder(self, tokens: int) -> Tensor:
        tape, player, spec = self.tape, self.player, self.spec
        inputs_embeds = self.embed(tokens)
        tables = self.rotary_tables()
        masks = self.masks()
        hidden_states = inputs_embeds
        for index in range(spec.num_layers):
            tape.layer = index
            self.rec.mark(f"forward {index}")
            player.adapters = self.adapters[index]
            cos, sin = tables[arch.rotary_kind(spec, index)]
            player.shared = Shared(cos, sin, masks.get(mask_kind(spec, self.run, index)))
            hidden_states = self.layer(index, hidden_states)
        tape.layer = -1
        self.rec.mark("forward head")
        player.forget()
        del tables, masks, cos, sin
        self.rec.scope = "activations.head"
        return player.norm(hidden_states)

    def rotary_tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin for each kind of layer."""
        spec = self.spec
        width = int(spec.head_dim * spec.partial_rotary_factor)
        dtype = FP32 if spec.model_type in ("olmo", "olmo2", "olmo3") else self.wide
        return {
            kind: (
                self.tape.new("cos", self.run.seq_len, width, dtype),
                self.tape.new("sin", self.run.seq_len, width, dtype),
            )
            for kind in arch.rotary_kinds(spec)
        }

    def masks(self) -> dict[bool, Tensor]:
        """The masks of the forward, one for the global layers and one for the local, where there must be one."""
        run, seq = self.run, self.run.seq_len
        kinds = {mask_kind(self.spec, run, layer) for layer in range(self.spec.num_layers)}
        eager = run.levers.attention == "eager"
        if eager and self.spec.layer_types and self.spec.model_type in BOTH_MASKS:
            kinds = {False, True}
        rows = seq * (run.micro_batch_size if eager else mask_batch(run))  # eager's `where` writes every sequence
        dtype = self.wide if eager else "bool"
        return {
            local: self.tape.new("local mask" if local else "causal mask", rows, seq, dtype)
            for local in sorted(kinds)
            if eager or local or padded(run) or always_masked(self.spec, run)
        }

    def layer(self, index: int, hidden_states: Tensor) -> Tensor:
        player, tape = self.player, self.tape
        if not checkpointed(self.run.levers.checkpointing, index):
            self.rec.scope = "activations.layers"
            return block(player, hidden_states)
        if index and not self.run.levers.checkpoint_offload:
            self.rec.relabel(hidden_states, "activations.checkpoints", "layer input kept")
        adapters, shared = self.adapters[index], player.shared

        def run(hidden_states: Tensor) -> Tensor:
            self.rec.scope = "activations.layers"
            player.adapters, player.shared = adapters, shared
            return block(player, hidden_states)

        return tape.checkpoint(run, hidden_states, self.run.levers.checkpoint_offload)

    def optimizer(self) -> None:
        """Clipping (small norms) and what the optimizer's kernels allocate on the way."""
        if self.run.driver == "trainer":
            self._for_each_weight("gradient norm", whole=False)
        if self.run.levers.optimizer == "adamw_torch":  # foreach: the square root of every second moment at once
            self._for_each_weight("sqrt(exp_avg_sq)", whole=True)
        elif self.run.levers.optimizer == "adafactor":
            for layer in self.adapters:
                for pair in layer.values():
                    for w in pair:
                        held = [self.tape.new("adafactor update", w.rows, w.columns, FP32) for _ in range(2)]
                        del held

    def _for_each_weight(self, name: str, whole: bool) -> None:
        """One tensor per adapter weight, all alive together."""
        self.rec.scope = "optimizer.scratch"
        held = []
        for index, layer in enumerate(self.adapters):
            self.rec.mark(f"optimizer {index}")
            for pair in layer.values():
                for w in pair:
                    held.append(self.tape.new(name, w.rows if whole else 1, w.columns if whole else 1, FP32))
        self.rec.mark("optimizer step")
        del held


def play(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> Unrolled:
    """The steady optimizer step of `run` on `spec`, at full depth."""
    period = lcm(checkpoint_period(run.levers.checkpointing), pattern_period(spec, run))
    played = min(spec.num_layers, 4 * period + spec.num_layers % period)
    step = Step(replace(spec, num_layers=played), run, gpu)
    step.play()
    return Unrolled(step.rec, played, spec.num_layers, period)
