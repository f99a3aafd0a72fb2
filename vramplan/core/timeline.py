"""Plays one optimizer step: which tensor is born when, and when it dies.

The step is played on a few layers by `tape` (a miniature autograd) and then unrolled to the model's depth: layers of
one kind do the same, so the section of events of a middle layer stands for all of them. Two phases that a user knows
come out, "forward" (with the loss) and "backward" (with recomputation), then "optimizer".

The order of things is that of transformers 5.17 under bf16 autocast: `driver` "loop" is the tutorials' own loop,
"trainer" is `transformers.Trainer(bf16=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

from . import architecture as arch
from .blocks import Adapters, Player, Shared, block
from .fused import FlatLora, HostInputs, adapter_shapes, checkpoint
from .gathering import Gathering
from .head import chunked_loss, full_loss, labelled_rows
from .masks import always_masked, mask_given, mask_kind, padded, pattern_period
from .ops import BF16, FP32, dropout, unary
from .parallel import largest_bucket
from .tables import make_mask, position_ids, rotary_tables
from .tape import DTYPE_BYTES, Leaf, Recorder, Tape, Tensor
from .types import GpuProfile, ModelSpec, RunSpec
from .unroll import Unrolled
from .varlen import borders

# Families whose decoder makes both masks, also where all layers are of one kind.
BOTH_MASKS = ("ministral", "cohere2", "olmo3", "gemma2", "gemma3_text")

ALLOCATING = ("adamw_torch", "adafactor")  # optimizers whose kernels allocate on the way


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

    def __init__(self, spec: ModelSpec, run: RunSpec, gpu: GpuProfile, depth: int = 0) -> None:
        self.spec = spec
        self.depth = depth or spec.num_layers  # of the model, of which `spec.num_layers` are played
        self.first = self.period = 1  # of `Unrolled`
        self.run = run
        self.rec = Recorder()
        self.tape = Tape(self.rec, gpu.compute_capability)
        self.player = Player(self.tape, spec, run, gpu)
        self.positions: Tensor | None = None  # a packed batch brings its own
        self.gathering = Gathering(self.tape, spec, run)
        self.wide = FP32 if run.levers.upcast == "all" else BF16
        lora = run.lora
        fuses = self.player.fuses
        self.flats = [FlatLora(self.tape, spec, lora) for _ in range(spec.num_layers if fuses else 0)]
        offloads = fuses and run.levers.checkpoint_offload
        self.host = HostInputs(self.tape) if offloads else None
        self.adapters: list[Adapters] = [
            {
                x.short: (
                    self.tape.parameter(lora.r, x.in_features, lora.dtype, x.short + " lora_A"),
                    self.tape.parameter(x.out_features, lora.r, lora.dtype, x.short + " lora_B"),
                )
                for x in arch.lora_linears(spec, lora)
            }
            for _ in range(0 if fuses else spec.num_layers)
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
        self.rec.mark("optimizer zero_grad")
        for flat in self.flats:
            flat.grad = None
        for layer in self.adapters:
            for pair in layer.values():
                for weight in pair:
                    assert isinstance(weight.node, Leaf)
                    weight.node.grad = None
        del kept
        self.rec.mark("end")

    def micro_step(self) -> object:
        """Forward, loss and backward of one micro-batch; returns what the loop keeps alive through its `loss`."""
        run, tape = self.run, self.tape
        tokens = self.player.tokens
        self.rec.scope = "activations.inputs"
        ids = tape.new("input_ids", run.micro_batch_size, run.seq_len, "int64")
        batch = self.batch()
        self.positions = batch[1] if run.packing else None
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
        seed = tape.new("gradient of the loss", 1, 1, FP32)  # torch.autograd.backward holds it until it returns
        tape.backward(root, seed)
        del seed
        tape.layer = -1
        self.rec.mark("backward end")
        self.gathering.end_backward()
        self.player.forget()
        tape.in_backward = False
        self.positions = None
        del ids, batch
        return root

    def batch(self) -> list[Tensor]:
        """What comes with the ids: labels, then a mask or the borders of packed documents. The loop's labels are the
        ids themselves, unless some of them must not be learned."""
        run, tape = self.run, self.tape
        names: tuple[str, ...] = ("labels", "attention_mask") if run.driver == "trainer" else ()
        if run.packing:
            names = ("labels",)
        batch = [tape.new(name, run.micro_batch_size, run.seq_len, "int64") for name in names]
        if run.packing:
            batch += borders(tape, run)
        if run.driver == "trainer" and run.levers.loss == "full":
            batch.append(tape.new("num_items_in_batch", 1, 1, "int64"))
        return batch

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
        weight = self.gathering.whole("embed_tokens")
        inputs = tape.new("inputs_embeds", tokens, hidden, self.wide)
        del weight
        if self.spec.model_type.startswith("gemma"):
            scale = tape.new("embed_scale in fp32", 1, 1, FP32) if self.wide == FP32 else None
            inputs = unary(tape, inputs, "inputs_embeds scaled")
            del scale
        if self.run.levers.checkpointing != "none" and not self.player.fuses:
            inputs.node = Leaf(tape, variable=inputs.detach())
        if self.spec.model_type == "granite":
            inputs = unary(tape, inputs, "inputs_embeds scaled")
        return inputs

    def forward(self, tokens: int) -> list[Tensor]:
        """Decoder, final norm, head and loss: [loss] or [loss, logits] as the model returns them."""
        spec = self.spec
        labelled = labelled_rows(self.tape, self.run) if self.run.levers.loss == "fused" else None
        last_hidden_state = self.decoder(tokens)
        self.tape.layer = -1
        self.rec.scope = "loss.logits"
        if labelled is not None:
            head = self.gathering.whole("lm_head")
            loss = chunked_loss(self.tape, spec, last_hidden_state, labelled, self.wide, self.player.fuses)
            del head
            return [loss]
        head = self.gathering.whole("lm_head") or self.tape.constant(spec.vocab_size, spec.hidden_size, self.wide)
        return full_loss(self.tape, spec, self.run, last_hidden_state, head)

    def decoder(self, tokens: int) -> Tensor:
        tape, player, spec = self.tape, self.player, self.spec
        inputs_embeds = self.embed(tokens)
        positions = self.positions or position_ids(tape, self.run)
        masks = {} if self.run.packing else self.masks()
        inputs_embeds = dropout(tape, inputs_embeds, spec.embedding_dropout)
        tables = rotary_tables(tape, spec, self.run, self.wide)
        hidden_states = inputs_embeds
        for index in range(spec.num_layers):
            tape.layer = index
            self.rec.mark(f"forward {index}")
            self.enter(index)
            cos, sin = tables[arch.rotary_kind(spec, index)]
            player.shared = Shared(cos, sin, masks.get(mask_kind(spec, self.run, index)), positions)
            hidden_states = self.gathering.leave(index, self.layer(index, self.gathering.enter(hidden_states)))
        tape.layer = -1
        self.rec.mark("forward head")
        self.rec.scope = "activations.head"
        last_hidden_state = player.norm(hidden_states)
        self.gathering.end_forward()
        player.forget()
        return last_hidden_state

    def masks(self) -> dict[bool, Tensor]:
        """The masks of the forward, one for the global layers and one for the local, where there must be one."""
        run = self.run
        spec = self.spec
        kinds = {mask_kind(spec, run, layer) for layer in range(spec.num_layers)}
        eager = run.levers.attention == "eager"
        if spec.layer_types and spec.model_type in BOTH_MASKS:
            kinds = {False, True}
        elif spec.layer_types:
            kinds = {kind == "sliding_attention" for kind in spec.layer_types[: spec.num_layers]}
        short = spec.sliding_window is None or run.seq_len < spec.sliding_window
        masks = {}
        for local in sorted(kinds):
            if eager or (local and not short) or padded(run) or always_masked(spec, run):
                masks[local] = make_mask(self.tape, run, self.wide, local, mask_given(run))
            elif mask_given(run):  # looked at, and left to `is_causal`
                looked_at = self.tape.new("attention mask as bool", run.micro_batch_size, run.seq_len, "bool")
                del looked_at
        return masks

    def enter(self, index: int) -> None:
        """The adapter of this layer is the one at hand."""
        if self.flats:
            self.player.flat = self.flats[index]
        else:
            self.player.adapters = self.adapters[index]

    def layer(self, index: int, hidden_states: Tensor) -> Tensor:
        player, tape = self.player, self.tape
        if not checkpointed(self.run.levers.checkpointing, index):
            self.rec.scope = "activations.layers"
            return block(player, hidden_states)
        if index and not self.run.levers.checkpoint_offload:
            self.rec.relabel(hidden_states, "activations.checkpoints", "layer input kept")
        shared = player.shared

        def run(hidden_states: Tensor) -> Tensor:
            self.rec.scope = "activations.layers"
            self.enter(index)
            before, player.shared = player.shared, shared
            try:
                return block(player, hidden_states)
            finally:
                player.shared = before  # the checkpoint's closure alone keeps it

        if self.flats:
            return checkpoint(player, index, run, hidden_states, self.host)
        return tape.checkpoint(run, hidden_states, self.run.levers.checkpoint_offload)

    def optimizer(self) -> None:
        """Clipping (small norms) and what the optimizer's kernels allocate on the way."""
        if self.run.driver == "trainer":
            self._sum_over_cards()
            self._clip_gradients()
        if self.run.levers.optimizer == "adamw_torch":  # foreach: the square root of every second moment at once
            self._for_each_weight("sqrt(exp_avg_sq)", whole=True)
        elif self.run.levers.optimizer == "adafactor":
            self._adafactor()

    def _sum_over_cards(self) -> None:
        """`vramplan.train.parallel.sum_gradients`: small gradients side by side in a bucket, one bucket at a time."""
        if self.run.gpus == 1:
            return
        size = DTYPE_BYTES[self.run.lora.dtype]
        bucket = largest_bucket([size * n * m for n, m in adapter_shapes(self.spec, self.run)] * self.depth)
        if bucket:
            flat = self.tape.new("bucket of gradients", 1, bucket // size, self.run.lora.dtype, "optimizer.scratch")
            del flat

    def _adafactor(self) -> None:
        """transformers `Adafactor.step` without relative steps; `update` lives on until the next weight's."""
        tape, update = self.tape, None
        self.rec.scope = "optimizer.scratch"
        for index, layer in enumerate(self.adapters):  # never flat: core.fused.SHAPED
            self.rec.mark(f"optimizer {index}")
            for w in (w for pair in layer.values() for w in pair):
                self._rms()
                power = tape.new("gradient^2", w.rows, w.columns, FP32)
                update = tape.new("gradient^2 + eps", w.rows, w.columns, FP32)
                del power
                for size in (w.rows, w.columns):
                    mean = tape.new("mean of the update", 1, size, FP32)
                    del mean
                mean = tape.new("mean of the row factors", 1, 1, FP32)
                r_factor = tape.new("row factors", 1, w.rows, FP32)
                del mean
                c_factor = tape.new("column factors", 1, w.columns, FP32)
                update = tape.new("update", w.rows, w.columns, FP32)
                del r_factor, c_factor
                self._rms(clipped=True)
                negative = tape.new("- update", w.rows, w.columns, FP32)
                del negative
        self.rec.mark("optimizer step")
        del update

    def _rms(self, clipped: bool = False) -> None:
        norm = self.tape.new("norm", 1, 1, FP32)
        rms = self.tape.new("root mean square", 1, 1, FP32)
        del norm
        if clipped:
            clip = self.tape.new("rms / threshold", 1, 1, FP32)
            del clip
        del rms

    def _clip_gradients(self) -> None:
        """`torch.nn.utils.clip_grad_norm_`: a norm of each gradient, theirs, and what all are multiplied by."""
        norms = self._for_each_weight("gradient norm", whole=False)
        stacked = self.tape.new("norms stacked", 1, len(norms) * self.depth // self.spec.num_layers, FP32)
        total_norm = self.tape.new("total norm", 1, 1, FP32)
        del stacked, norms
        scratch = [self.tape.new(name, 1, 1, FP32) for name in ("norm + eps", "1 / norm")]
        clip_coef = self.tape.new("clip coefficient", 1, 1, FP32)
        del scratch
        clamped = self.tape.new("clip coefficient clamped", 1, 1, FP32)
        del clip_coef, clamped, total_norm

    def _for_each_weight(self, name: str, whole: bool) -> list[Tensor]:
        """One tensor per adapter weight, all alive together."""
        self.rec.scope = "optimizer.scratch"
        held = []
        for index in range(self.spec.num_layers):
            self.rec.mark(f"optimizer {index}")
            for rows, columns in adapter_shapes(self.spec, self.run):
                held.append(self.tape.new(name, rows if whole else 1, columns if whole else 1, FP32))
        self.rec.mark("optimizer step")
        return held


def play(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> Unrolled:
    """The steady optimizer step of `run` on `spec`, at full depth."""
    step = begun(spec, run, gpu)
    step.play()
    return unrolled(step)


def begun(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> Step:
    """The step on as many layers as stand for all."""
    period = lcm(checkpoint_period(run.levers.checkpointing), pattern_period(spec, run))
    # the first and the last layer of each kind differ from the others; what waits to be offloaded spans a period
    first = period + 1 if run.levers.checkpoint_offload else max(period, 2)
    played = min(spec.num_layers, first + 2 * period + (spec.num_layers - first) % period)
    step = Step(replace(spec, num_layers=played), run, gpu, spec.num_layers)
    step.first, step.period = first, period
    return step


def unrolled(step: Step, places: Sequence[int] | None = None, values: Sequence[int] | None = None) -> Unrolled:
    """A step that has been played, at full depth. `places`, `values`: as `Unrolled` has them."""
    return Unrolled(step.rec, step.spec.num_layers, step.depth, step.period, step.first, places, values)
