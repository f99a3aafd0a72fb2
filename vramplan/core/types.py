"""Every value that crosses a door. Read this page first.

All are frozen, slotted, keyword-only dataclasses. Memory is `int` bytes in fields that end in `_bytes`; rates are
per second. "Could not" is `None` or an exception, never a made-up number. A door is a function that takes and
returns only these types: `sources` reads the world into them, `core` computes with them, `report` draws them, and
the training child writes one (`Measurement`) back.
"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field
from operator import attrgetter

SCHEMA_VERSION = 1

# The values a field may take, in one place, so that the command line, the JSON codec and the arithmetic agree.
UPCASTS = ("all", "norms", "none")
LOSSES = ("full", "fused")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
ALLOCATORS = ("native", "expandable")
KERNELS = ("fused", "stock")
OPTIMIZERS = (
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "lion_32bit",
    "paged_lion_32bit",
    "adafactor",
    "sgd",
)
LR_SCHEDULERS = (  # transformers.SchedulerType
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
INTERVALS = ("no", "steps", "epoch")  # when to evaluate
SAVE_STRATEGIES = (*INTERVALS, "best")
REPORTERS = ("tensorboard", "wandb", "trackio")
MERGE_DTYPES = ("bfloat16", "float16", "float32")
MERGE_BASES = ("original", "nf4")  # the base's own weights, or as NF4 rounded them
ON_NAN = ("stop", "skip")
DATA_KINDS = ("auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "tokens")
TRUNCATIONS = ("cut", "split", "drop", "error")
SAMPLINGS = ("random", "sequential", "group_by_length")
PARALLELS = ("none", "ddp", "fsdp")
CONFIG_TOOLS = ("vramplan", "transformers", "trl", "axolotl", "llama-factory", "model")  # who reads a configuration
OBJECTIVES = ("speed", "memory", "context")  # of a plan
SEARCHED = ("checkpointing", "checkpoint_offload")  # levers that a plan turns unless they are given
VERDICTS = ("fits", "tight", "does_not_fit")
BASES = ("exact", "modelled", "measured")
THROTTLES = ("power cap", "heat", "hardware slowdown", "power brake")  # why a card's clocks are held down


class Unplannable(ValueError):
    """A question without an exact answer: an unknown architecture, a target that matches no module, rank 0.

    `hint` says what to do instead. The command line ends with exit code 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


_GETTERS: dict[type, Callable[[object], tuple[object, ...]]] = {}  # of a class's fields


class Value:
    """What the dataclasses below have in common: frozen, equal and hashed by their fields.

    Written once here: letting `dataclass` generate it for every class (`frozen=True, eq=True`) triples the time this
    module takes to import, a tenth of a whole `vramplan estimate`.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):  # a slot is empty until __init__ fills it, and then for good
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def _fields(self) -> tuple[object, ...]:
        found = _GETTERS.get(self.__class__)
        if found is None:  # one call for all fields, as searches hash many values; with two it returns a tuple
            names = tuple(self.__dataclass_fields__)  # type: ignore[attr-defined]
            found = _GETTERS[self.__class__] = attrgetter("__class__", *names)
        return found(self)

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        assert isinstance(other, Value)
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        names = self.__dataclass_fields__  # type: ignore[attr-defined]
        return f"{self.__class__.__qualname__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


# --------------------------------------------------------------------------------------------------- the model
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class ModelSpec(Value):
    """What a `config.json` says of a causal language model: enough to know every parameter's shape.

    `architecture` is `config.architectures[0]`, `model_type` picks the block (`core/architecture.py`). Widths are in
    elements. Fields below `dtype` have the value that the Llama family has, so that a spec states only what differs.
    """

    name: str
    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu2 ...
    gated_mlp: bool = True  # gate and up projections, against one up projection
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    norm: str = "rmsnorm"  # rmsnorm | gemma_rmsnorm | layernorm | cohere_layernorm | plain_layernorm (no parameters)
    norm_bias: bool = False
    norm_placement: str = "pre"  # pre | post (OLMo-2) | sandwich (Gemma 2, 3) | parallel (one norm feeds both)
    qk_norm: str = "none"  # none | head (per head, Qwen3) | full (over all heads, OLMo-2)
    clip_qkv: bool = False  # OLMo clamps q, k and v
    parallel_residual: bool = False
    partial_rotary_factor: float = 1.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    residual_multiplier: float | None = None  # Granite
    logits_scaling: float | None = None  # Granite
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()  # full_attention | sliding_attention per layer; empty: all full
    rope_layers: tuple[int, ...] = ()  # 1 where the layer has rotary embeddings (SmolLM3); empty: all
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # the router divides the chosen weights by their sum
    source: str = ""  # where the numbers come from: a path, a Hub id, "built-in"


# ----------------------------------------------------------------------------------------------------- the run
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Lora(Value):
    """The adapter. `targets` are PEFT's `target_modules`: names, or the one name "all-linear"."""

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    dtype: str = "float32"  # PEFT's autocast_adapter_dtype makes A and B float32 also under bf16


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Levers(Value):
    """What may be turned to trade memory for time. The defaults are the `lean` recipe.

    `checkpointing` is "none", "all" or "every-K": every K-th layer is checkpointed.
    """

    upcast: str = "none"  # which unquantised parameters become float32: see UPCASTS
    loss: str = "fused"
    checkpointing: str = "all"
    checkpoint_offload: bool = False
    optimizer: str = "paged_adamw_8bit"
    attention: str = "sdpa"
    allocator: str = "expandable"
    kernels: str = "fused"  # layers as `train/fast` computes them, or as transformers and PEFT do
    resident_layers: int | None = None  # for streaming: layers whose weights stay on the card; None: all


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class DataSpec(Value):
    """Training data: a JSONL, Parquet, CSV or text file, or the name of a `datasets` data set.

    `config`, `revision` and `split` (with a slice, as "train[:10%]") are those of a data set. Held out are a share of
    the rows, or rows of their own: `eval_path`, or another split of the same data set. Names that TRL and transformers
    have are theirs.
    """

    path: str
    kind: str = "auto"  # see DATA_KINDS
    split: str = "train"
    text_column: str = "text"
    eval_fraction: float = 0.0
    on_bad_row: str = "fail"  # fail | skip
    config: str | None = None
    revision: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    truncation: str = "cut"  # what a row over seq_len does: see TRUNCATIONS
    assistant_only_loss: bool = True  # of a conversation: learn what the assistant says, or all
    completion_only_loss: bool = True  # of prompt and completion: learn the completion, or both
    train_sampling_strategy: str = "random"  # see SAMPLINGS
    show_samples: int = 0  # rows to show as the model sees them, before training


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Schedule(Value):
    """How long and how fast to train, when to evaluate, save and report.

    Names as in `transformers.TrainingArguments`; each is a flag of `vramplan train`.
    """

    max_steps: int | None = None  # optimizer steps; None: num_train_epochs decides
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: str | None = None  # a JSON object
    warmup_steps: float | None = None  # below 1 a share of all steps; None: warmup_ratio decides
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim_args: str | None = None  # "key=value,key=value"
    seed: int = 42
    data_seed: int | None = None  # None: seed
    full_determinism: bool = False

    logging_steps: int = 1
    save_strategy: str = "steps"
    save_steps: int = 200
    save_total_limit: int = 2  # 0: all are kept
    eval_strategy: str = "no"
    eval_steps: int | None = None  # None: save_steps
    per_device_eval_batch_size: int | None = None  # None: the micro-batch
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None  # evaluations without a better loss
    early_stopping_threshold: float = 0.0
    report_to: tuple[str, ...] = ()  # of REPORTERS, or "all" alone
    run_name: str | None = None
    rehearsal: bool = True  # try the largest batch before the first step
    cuda_graphs: bool = True  # where starting kernels is what takes the time, and memory is to spare
    on_nan: str = "stop"  # stop (after some in a row) | skip: what steps without a finite gradient do


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class RunSpec(Value):
    """What the user asked for. Only what costs memory or time is read by `core`; the rest passes to the trainer.

    `driver` is who plays the step: "trainer" (`transformers.Trainer(bf16=True)`: labels and mask are tensors of their
    own, gradients are clipped) or "loop" (autocast, `loss.backward()`, `optimizer.step()`, as the tutorials write it).

    `gpus` is how many cards train together, on all machines: the effective batch is micro-batch x accumulation x gpus.
    `parallel` says how: "ddp", a whole model on every card, or "fsdp", frozen weights shared out among the cards and
    gathered layer by layer. One card is "none".
    """

    model: str
    model_path: str | None = None  # folder, Hub id or GGUF file the trainer loads; None: `model`
    micro_batch_size: int = 1
    seq_len: int = 2048
    accumulation: int = 1
    lora: Lora = field(default_factory=Lora)
    double_quant: bool = True
    recipe: str = "lean"
    levers: Levers = field(default_factory=Levers)
    driver: str = "trainer"
    padding: bool = False  # batches hold padding, so that attention needs a mask
    packing: bool = False  # rows of exactly seq_len tokens hold several documents, which do not see each other
    trust_remote_code: bool = False
    random_weights: bool = False  # build the model from its config alone: memory and speed, no language
    gpus: int = 1
    parallel: str = "none"  # see PARALLELS
    data: DataSpec | None = None
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class MergeSpec(Value):
    """What `vramplan merge` is asked for. `base` is a folder or a Hub id, `base_name` what the card calls it."""

    adapter: str  # its folder
    base: str
    base_name: str
    output: str
    dtype: str = "bfloat16"
    max_shard_bytes: int = 5 * 10**9
    onto: str = "original"
    double_quant: bool = True  # how the base was quantised, for onto="nf4"


# ----------------------------------------------------------------------------------------------------- the card
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class GpuProcess(Value):
    """Another user of the card. None is what cannot be known: WSL and containers hide sizes, names and numbers.

    `graphics`: it draws and computes nothing, as a desktop does.
    """

    pid: int | None = None
    name: str | None = None
    used_bytes: int | None = None
    graphics: bool = False


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class GpuState(Value):
    """What a live card says of itself beside its memory, at one moment. None: it does not say.

    Links, power, clocks and display are those of the whole card, also for a MIG instance.
    """

    cuda: str | None = None  # the newest CUDA that the driver runs
    order_certain: bool = True  # False: CUDA may give this card another index than it has here
    mig_profile: str | None = None  # of a MIG instance: "1g.10gb"
    mig_instance: int | None = None  # its GPU instance on the card
    mig_uuid: str | None = None
    pcie_generation: int | None = None  # now; a card that sleeps goes down to 1
    pcie_width: int | None = None
    pcie_max_generation: int | None = None  # what card and slot agree on
    pcie_max_width: int | None = None
    ecc: bool | None = None
    display_attached: bool | None = None  # a monitor is plugged in
    display_active: bool | None = None  # a screen is drawn on it, with or without a monitor
    power_watts: int | None = None
    power_limit_watts: int | None = None
    clock_mhz: int | None = None  # of the SMs
    max_clock_mhz: int | None = None
    throttled_by: tuple[str, ...] | None = None  # what holds the clocks down: see THROTTLES
    busy_percent: int | None = None


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class SpeedFactors(Value):
    """How much of its datasheet's rates a card reaches in a training step, and what starting a kernel takes."""

    matmul_share: float = 0.725  # of the dense bf16 rate
    attention_share: float = 0.42  # of the same
    bandwidth_share: float = 0.83
    # Per tensor born. On one core: Python, dispatch and launch, PEFT's wrappers included; nothing where a micro-step of
    # fused layers is started as one CUDA graph. On the card, beside the work itself: its two or three kernels begin and
    # end, and nothing else runs meanwhile.
    launch_seconds: float = 66e-6
    begin_seconds: float = 4.7e-6


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class GpuProfile(Value):
    """One card, live or stored.

    `total_bytes` is NVML's total; `usable_bytes` is what one process may fill, its CUDA context included: CUDA's
    `total_memory` on an idle card, what is free now on a live one. Rates are datasheet peaks, None if unknown.
    `speed`, `reserved_factor` and the context may be a `Calibration`'s. `sources` are (field, where the number was
    read) pairs.
    """

    key: str
    name: str
    total_bytes: int
    usable_bytes: int
    usable_basis: str = "modelled"
    reserved_bytes: int | None = None  # held back by the driver
    used_by_others_bytes: int = 0
    processes: tuple[GpuProcess, ...] = ()
    compute_capability: tuple[int, int] = (8, 9)
    sm_count: int | None = None
    context_bytes: int = 400 * 2**20  # CUDA context of one training process
    context_basis: str = "modelled"
    bandwidth_bytes_per_s: int | None = None
    bf16_flops_per_s: int | None = None  # dense, tensor cores; None before Ampere
    fp16_flops_per_s: int | None = None
    pcie_bytes_per_s: int | None = None
    driver: str | None = None
    state: GpuState | None = None  # of a live card
    source: str = "file"  # file | nvml
    sources: tuple[tuple[str, str], ...] = ()
    speed: SpeedFactors = field(default_factory=SpeedFactors)
    reserved_factor: float = 1.0  # what PyTorch reserves with room to spare, over what the replay of it says


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Calibration(Value):
    """What `vramplan calibrate` has learned of one card under these libraries: overheads and speed, no tensor's bytes.

    `versions` are those of torch, transformers, peft and bitsandbytes, and the driver's major one. `error` is the mean
    by which the modelled tokens/s of the rows it was read from are off; None where the card's rates are not known.
    """

    card: str  # as the driver calls it
    total_bytes: int
    versions: tuple[tuple[str, str], ...]
    context_bytes: int
    reserved_factor: float
    speed: SpeedFactors
    rows: int
    made: str  # the day, ISO 8601
    error: float | None = None


# ------------------------------------------------------------------------------------------------- the prediction
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class TensorKind(Value):
    """Tensors that a step makes alike, in one layer after the other; or one row of what is there before it.

    `key` is the ledger's, `group` the heading there; a row has no shape. `bytes` are those of one of them.
    """

    key: str
    name: str
    group: str
    bytes: int
    rows: int = 0
    columns: int = 0
    dtype: str = ""


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Passage(Value):
    """Births and deaths of one place, in the order in which the libraries do them: +k is the birth of a tensor of
    `Timeline.kinds[k - 1]`, -k a death. `layer` is -1 outside the layers."""

    phase: str  # forward | loss | backward | optimizer
    layer: int
    events: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Timeline(Value):
    """One steady optimizer step on one card, every birth and death; `core/curve.py` reads it.

    `resident` are the kinds (k, as in a passage) that are there all the time, what PyTorch's allocator does not hand
    out among them. `tails` are what the native allocator's blocks have over their tensors, before the first event and
    after each; empty with expandable segments, where nothing changes.
    """

    kinds: tuple[TensorKind, ...]
    resident: tuple[int, ...]
    passages: tuple[Passage, ...]
    tails: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Line(Value):
    """One row of the ledger: what is on the card at the highest point, and why it has that size."""

    key: str  # stable, dotted: "weights.nf4"
    label: str
    bytes: int
    formula: str
    basis: str = "exact"
    group: str = ""


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class PhasePeak(Value):
    name: str  # load | prepare | forward | loss | backward | optimizer
    peak_bytes: int


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Resident(Value):
    """`torch.cuda.memory_allocated()` after loading, after `prepare_model_for_kbit_training`, after LoRA."""

    loaded_bytes: int
    prepared_bytes: int
    with_lora_bytes: int


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Peak(Value):
    """The highest point of a steady step.

    `allocated_bytes` is `max_memory_allocated()`; `reserved_bytes` is `max_memory_reserved()` with room to spare;
    `minimum_bytes` the smallest allocator cap under which the run survives; `device_bytes` that plus the CUDA context.
    """

    allocated_bytes: int
    phase: str
    reserved_bytes: int
    minimum_bytes: int
    device_bytes: int


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Ledger(Value):
    """The answer of `estimate`. The lines add up to `peak.device_bytes`; those of basis exact to the allocated peak."""

    model: ModelSpec
    run: RunSpec
    trainable_parameters: int
    total_parameters: int
    resident: Resident
    peak: Peak
    phases: tuple[PhasePeak, ...]
    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """For notebooks."""
        from .notebook import ledger_html

        return ledger_html(self)


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class GpuVerdict(Value):
    """One card held against a ledger. `max_*` keep everything else as asked; 0 when not even 1 fits,
    None when that was not searched for."""

    gpu: str
    usable_bytes: int
    verdict: str
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    tokens_per_s: int | None = None  # modelled


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Segment(Value):
    """A stretch of a card's memory. `key`: driver | others | context | resident | activations | headroom | free."""

    key: str
    label: str
    bytes: int
    basis: str = "exact"


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Remedy(Value):
    """Something to close on the card, or to change in the run. `verdict` is the run's on this card afterwards."""

    kind: str  # close | change | both
    title: str
    frees_bytes: int
    verdict: str
    changes_training: bool = False
    command: str = ""  # that carries a change out


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class CardCheck(Value):
    """A live card as it is now and, where a run was held against it, what would fill it.

    The segments add up to the card's total and `missing_bytes`. `notes` are sentences about the card.
    """

    card: GpuProfile
    segments: tuple[Segment, ...]
    missing_bytes: int = 0
    notes: tuple[str, ...] = ()
    ledger: Ledger | None = None
    judged: GpuVerdict | None = None
    remedies: tuple[Remedy, ...] = ()


# ------------------------------------------------------------------------------------------------------- the plan
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Candidate(Value):
    """One combination that the search priced."""

    levers: Levers
    micro_batch_size: int
    accumulation: int
    device_bytes: int
    verdict: str
    tokens_per_s: int | None = None


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Lengths(Value):
    """How long the rows of a data set are. `bars` are (tokens, rows) pairs, ascending: so many rows of at most so many
    tokens and more than the pair before. `tokens` are all of them."""

    bars: tuple[tuple[int, int], ...]
    tokens: int

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.bars)

    @property
    def longest(self) -> int:
        return self.bars[-1][0]


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Offer(Value):
    """What one card can do for a run: with which levers it fits, and how much and how fast at most.

    `verdict`, `device_bytes` and `max_batch_size` are those of the run with `levers`: the levers that were asked for
    where it fits with them, else the least change with which it does, else everything that saves memory, of which
    `missing_bytes` then says how much more would be needed. `max_seq_len` is the longest sequence at micro-batch 1 with
    `context_levers`. Both are 0 where not even the smallest fits.
    """

    gpu: str
    memory_gb: int  # the class of card by the memory on its box: 8, 12, 16, 24, ...
    compute_capability: tuple[int, int]
    usable_bytes: int
    verdict: str
    levers: Levers
    as_asked: bool  # it fits with the levers that were asked for
    device_bytes: int
    missing_bytes: int
    max_batch_size: int
    max_seq_len: int
    context_levers: Levers
    fastest: Candidate | None = None  # at this length, of any micro-batch; None: nothing fits, or rates are not known
    tokens_per_s: int | None = None  # of `fastest`, modelled; of all cards where several train together
    hours_per_million_tokens: float | None = None
    price_per_hour: float | None = None  # as it was given, of one card
    cost_per_million_tokens: float | None = None
    cheapest: bool = False  # of those with a price


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Choice(Value):
    """The smallest class of cards, by memory, that holds a run: None where none does.

    `offers` are its cards, `smaller` is that card of the next class down which comes nearest (where no class is large
    enough, the nearest of all), `priced` are the cards with a price that hold the run. `as_asked_gb` is the smallest
    class that holds it with the levers that were asked for.
    """

    memory_gb: int | None
    as_asked_gb: int | None
    offers: tuple[Offer, ...]
    smaller: Offer | None = None
    priced: tuple[Offer, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Probe(Value):
    """What a short run on the real card (`fit --probe`) used, beside what was predicted of it.

    `process_bytes` are all bytes of the process, its CUDA context included. `cap_bytes`: PyTorch was held to this much,
    as on a smaller card. `disturbances` say what other processes did meanwhile: then the numbers prove nothing.
    """

    levers: Levers
    micro_batch_size: int
    accumulation: int
    ended: str  # finished | oom
    fits: bool
    predicted_bytes: int
    predicted_process_bytes: int
    process_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    predicted_tokens_per_s: int | None = None
    tokens_per_s: int | None = None
    cap_bytes: int | None = None
    disturbances: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Plan(Value):
    """A run with everything chosen, and why. `micro_batch_size * accumulation` is the effective batch, exactly."""

    run: RunSpec
    ledger: Ledger
    gpu: GpuProfile
    effective_batch_size: int
    budget_bytes: int
    headroom_bytes: int
    verdict: str
    reason: str
    candidates: tuple[Candidate, ...] = ()
    advice: tuple[str, ...] = ()  # when it does not fit: the smallest changes that would, nearest first
    verified: bool = False  # a probe on the real card ran it
    lengths: Lengths | None = None  # of the data that it was made for
    probes: tuple[Probe, ...] = ()  # in the order in which they were made, of this run and of those before it

    def _repr_html_(self) -> str:
        """For notebooks."""
        from .notebook import plan_html

        return plan_html(self)


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Lock(Value):
    """What a run is expected to need, kept beside it to be held against later.

    `words` are the flags that say it, files included; `versions` are those of vramplan and of the libraries that were
    installed. `groups` are (heading of the ledger, bytes) pairs that add up to the peak's device bytes.
    """

    words: tuple[str, ...]
    run: RunSpec
    versions: tuple[tuple[str, str], ...]
    trainable_parameters: int
    total_parameters: int
    resident: Resident
    peak: Peak
    groups: tuple[tuple[str, int], ...]
    gpu: str | None = None


# ------------------------------------------------------------------------------------------------ what happened
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class MeasuredPhase(Value):
    """Measured bytes of one phase; None where the machine cannot say (a CPU has no device allocator).

    `allocated_bytes` is what was allocated at the phase's end, `peak_bytes` the most during it.
    """

    name: str
    allocated_bytes: int | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Measurement(Value):
    """What a run really used, and how it ended.

    `prediction` (with the model and the run) and `gpu` are there in what `vramplan measure` writes: a row that can be
    played again. Of several GPUs every byte is the most that any of them had; `rank_peak_bytes` are all their peaks.
    """

    device: str  # cpu | cuda
    device_name: str
    versions: tuple[tuple[str, str], ...]
    phases: tuple[MeasuredPhase, ...]
    trainable_parameters: int
    steps: int
    tokens: int
    tokens_per_s: float
    ended: str  # finished | interrupted | oom | error
    alloc_retries: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    lines: tuple[Line, ...] = ()  # resident tensors counted one by one after step 1; keys as in the ledger
    message: str = ""
    prediction: Ledger | None = None
    gpu: GpuProfile | None = None
    oom_events: int = 0  # survived: the micro-batch was split, graphs dropped, or a lever turned
    micro_batch_size: int | None = None  # rows at a time when it ended, of the longest; None: as asked
    skipped_steps: int = 0  # optimizer steps left out because a gradient was not finite
    gpus: int = 1
    rank_peak_bytes: tuple[int, ...] = ()  # the highest step of each rank; empty: one GPU, or none that can be asked


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class OomEvidence(Value):
    """The numbers in an out-of-memory report. None: the report does not say.

    `kind` is who wrote it: torch, cudaMallocAsync, cuda, cublas, cudnn, triton, nccl, bitsandbytes, vllm, or host and
    shm (the computer's memory and /dev/shm, not the card's). `frames` are "file.py:line function", innermost last;
    `signs` are what else the log says: checkpointing_inactive, float32_compute.
    """

    message: str
    kind: str = "torch"
    rank: int | None = None
    requested_bytes: int | None = None
    gpu_index: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    allowed_bytes: int | None = None
    process_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_unallocated_bytes: int | None = None
    private_pools_bytes: int | None = None  # part of the allocated bytes, e.g. CUDA graphs
    others: tuple[GpuProcess, ...] = ()
    frames: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Fix(Value):
    """A changed run, priced in full. `command` can be pasted.

    `tried` is how a short run of it ended on a card ("finished" or "oom", None: not tried), `tried_bytes` the most that
    PyTorch had allocated in it.
    """

    title: str
    run: RunSpec
    device_bytes: int
    saves_bytes: int
    fits: bool | None
    changes_training: bool = False
    command: str = ""
    tried: str | None = None
    tried_bytes: int | None = None


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Held(Value):
    """What one holder has of a snapshot's memory; `key` is a ledger line's where there is one.

    `bytes` at the snapshot's moment, `peak_bytes` at the highest point of its trace; `where` is the frame that holds
    most of it.
    """

    key: str
    label: str
    group: str
    bytes: int
    peak_bytes: int = 0
    tensors: int = 0
    where: str = ""


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Growth(Value):
    """Memory that was more at each start of a step than at the one before. `bytes` per step; `key` holds most of it."""

    steps: int
    bytes: int
    key: str
    where: str


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Holdings(Value):
    """A memory snapshot of PyTorch: who holds what, when memory ran out or, if it did not, when it was taken.

    `layer_bytes` are what each decoder layer has saved in the forward, where that can be told. `largest_free_bytes` is
    the largest piece that the allocator could have handed out. Replayed numbers count each tensor rounded up to 512.
    """

    moment: str  # oom | now
    device: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    private_pools_bytes: int
    holders: tuple[Held, ...]
    layer_bytes: tuple[int, ...] = ()
    events: int = 0
    peak_bytes: int | None = None  # None: no trace was recorded
    peak_where: str = ""
    growth: Growth | None = None


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Diagnosis(Value):
    """What happened, why (likeliest first), what to change (best first).

    `causes` are sentences, `cause_keys` the rule behind each; `more` says what else would help. `predicted_bytes` is
    the ledger's device bytes of the run as it was, `budget_bytes` what `fits` was held against; `holdings` who held the
    memory, from a snapshot.
    """

    evidence: OomEvidence
    causes: tuple[str, ...]
    fixes: tuple[Fix, ...]
    cause_keys: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    predicted_bytes: int | None = None
    budget_bytes: int | None = None
    holdings: Holdings | None = None


# ------------------------------------------------------------------------------------- what would go wrong
@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class TrainerConfig(Value):
    """A configuration file of some trainer, in common words.

    What the file does not say has the trainer's own default; None where that is not known, or where a script decides.
    `run` is what the file comes to, with an empty `model` where it names none; `unplanned` is why it cannot be
    estimated, if it cannot. `assumed` are sentences on what `run` takes for granted, `not_understood` the other keys.
    """

    tool: str  # see CONFIG_TOOLS
    source: str  # the file, or the model's name
    model: str | None = None
    run: RunSpec | None = None
    unplanned: str = ""
    batch_stated: bool = True
    loss_stated: bool = True  # False: whole logits are assumed
    quantised: bool | None = None  # to 4 bits, by bitsandbytes
    compute_dtype: str | None = None  # of the 4-bit layers
    base_dtype: str | None = None  # what is not quantised is loaded in
    quant_storage: str | None = None
    prepared: bool | None = None  # by prepare_model_for_kbit_training, and left in float32
    reentrant: bool = False  # checkpoints that have a backward only if their input needs one
    input_grads: bool | None = None  # enable_input_require_grads is called
    evaluates: bool = False
    eval_batch_size: int | None = None
    pad_to_max: bool = False
    trained_whole: tuple[str, ...] = ()  # PEFT's modules_to_save
    device_map: str | None = None
    sharded: bool = False  # FSDP or ZeRO-3
    assumed: tuple[str, ...] = ()
    not_understood: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class ConfigFinding(Value):
    """Something that costs memory without need, seen before anything runs.

    `cause` is its number in the playbook, None for none of those; `bytes` what the fix would save, None where nothing
    counts it. Not `certain`: the file leaves it to a script, an environment variable, a version or the data.
    """

    cause: int | None
    key: str
    bytes: int | None
    message: str
    fix: str
    certain: bool = True


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class ConfigAudit(Value):
    """What was found, largest first. `device_bytes` is what the run needs as written, `fixed_bytes` with all that is
    certain changed; None without a run and a model. `judged` holds the former against a card."""

    config: TrainerConfig
    findings: tuple[ConfigFinding, ...] = ()
    device_bytes: int | None = None
    fixed_bytes: int | None = None
    judged: GpuVerdict | None = None
