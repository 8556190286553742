"""Hyperparameters of a training job: type, range, default and one sentence of each.

The model fields of a stage override its named `size` (see `dalle.models.sizes`) unless they are
None. `training.config.hyperparameters` parses text into these models and renders the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from dalle.models.sizes import SizeName
from dalle.types import (
    AttentionKind,
    FeedForwardKind,
    NormKind,
    QuantiserKind,
    ReconstructionKind,
    StageName,
    TokenizerKind,
)

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=8, le=65_536)]
Heads = Annotated[int, Field(ge=1, le=1_024)]
KernelSize = Literal[1, 3]
Layers = Annotated[int, Field(ge=1, le=1_000)]
Codebook = Annotated[int, Field(ge=2, le=1_048_576)]

BUDGETS = ("epochs", "max_steps", "max_minutes")
SAVES_MEMORY = ("gradient_accumulation_steps", "activation_checkpointing")
DEFAULT_EPOCHS = 20
TrainedOn = Literal["transformer", "clip"]
TRAINING_ON: Mapping[TrainedOn, Mapping[str, float]] = {
    "transformer": {"muon_learning_rate": 0.01},
    "clip": {"learning_rate": 1e-5, "muon_learning_rate": 0.0},
}
"""Defaults of trained weights; the rates for random ones would undo their training."""
AVERAGED_STAGES: tuple[StageName, ...] = ("transformer", "clip")
AVERAGED_SIZES = ("tiny", "small", "base")
EMA_DECAY = 0.995
"""Of these stages and sizes, unless ema_decay is set; an average of larger models takes memory."""
DEFAULT_MAX_BAD_SHARE = 0.05
MAX_BATCH_SIZE = 65_536

EngineName = Literal["torch", "deepspeed"]
AutoSizeName = Literal[SizeName, "auto"]


class _Fields(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class FitHyperparameters(_Fields):
    """Training of one stage, whatever its model."""

    epochs: Positive | None = None
    """Passes of each stage over the training pairs; 20 when neither max_steps nor max_minutes is
    given."""
    max_steps: Positive | None = None
    """Budget of each stage in steps, instead of epochs."""
    max_minutes: Annotated[float, Field(gt=0, le=40_320)] | None = None
    """Budget in minutes, instead of epochs; those before an interruption count. With size=auto it
    is the whole job's and shared among its stages; otherwise, and with a stage's name before it,
    each stage's."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | Literal["auto"] = 64
    """Pairs in one step, on all devices together; auto: as many as fit a GPU, or as are still worth
    it on a CPU."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Parts that each device computes its share of a batch in, one after another: less memory, the
    same losses."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """AdamW's learning rate."""
    muon_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Muon's learning rate for hidden matrices; 0 gives them to AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Pull of the weights towards zero."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """Steps over which the learning rate rises from zero."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; fp16 needs a GPU."""
    activation_checkpointing: bool = False
    """Compute each block's activations anew in the backward pass instead of keeping them: less
    memory, a third more work."""
    gradient_clipping: Annotated[float, Field(ge=0, le=1_000_000)] = 1.0
    """Largest norm of all gradients together; 0 for none."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the weights' running average, which is saved; 0 off. Unless it is set, 0.995 for a
    new transformer and CLIP of the sizes up to base."""
    keep: Literal["best", "last"] = "best"
    """The weights that go into the artefact: those with the lowest validation loss, of the
    transformer the image tokens', or the last ones. Without validation pairs the last."""

    @property
    def pairs_per_step(self) -> int:
        """batch_size as a number, once `auto` has been replaced."""
        assert self.batch_size != "auto", "the trainer replaces it before it builds a stage"
        return self.batch_size

    def identity(self) -> dict[str, Any]:
        """Return the values that decide the numbers of a run.

        Without the budget, so that a finished run can be prolonged, and without the settings that
        save memory, which only change rounding and may differ on other machines. `keep` chooses
        among weights and changes none.
        """
        return self.model_dump(mode="json", exclude={*BUDGETS, *SAVES_MEMORY, "keep"})


class StageHyperparameters(FitHyperparameters):
    """Training of one stage and its model: a named size and changes to it."""

    not_for_authors: ClassVar[frozenset[str]] = frozenset()
    """Fields with a single value in this stage, which are not hyperparameters of it."""

    size: AutoSizeName = "auto"
    """Named model size that the fields below start from; auto: chosen by the pictures, by this
    device's speed and by max_minutes, and small without max_minutes."""

    augment: Literal["auto", "none"] = "auto"
    """From the sixth epoch on, mirror half of the pictures, where captions and pictures of a data
    set of at most 5,000 pairs allow it; none: never."""

    not_of_config: ClassVar[frozenset[str]] = frozenset()
    """Further fields that are none of the model's config."""

    @property
    def base_size(self) -> SizeName:
        """The named size that the fields start from; what `auto` chooses are changes to it."""
        return "small" if self.size == "auto" else self.size

    def identity(self) -> dict[str, Any]:
        # By the size that the fields start from, which earlier versions had as the default.
        identity = super().identity() | {"size": self.base_size}
        if identity.get("augment") == "none":  # as in earlier versions, which had no such field
            del identity["augment"]
        return identity

    def overrides(self) -> dict[str, Any]:
        """Return config field -> value of the model fields that were given."""
        others = {*StageHyperparameters.model_fields, *self.not_of_config}
        return self.model_dump(exclude_none=True, exclude=others)


class DVAEHyperparameters(StageHyperparameters):
    """The stage `dvae`."""

    # Its codebook is updated in each forward pass, so that micro-batches would change it.
    not_for_authors: ClassVar[frozenset[str]] = frozenset(
        {"muon_learning_rate", "augment", *SAVES_MEMORY}
    )
    augment: Literal["none"] = "none"
    muon_learning_rate: float = Field(default=0.0, ge=0, le=0)  # AdamW has all of its weights

    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Side of the square images, in pixels."""
    codebook_size: Codebook | None = None
    """Codes there are to choose from."""
    num_codebooks: Annotated[int, Field(ge=1, le=16)] | None = None
    """Codes per grid position."""
    quantiser: QuantiserKind | None = None
    """Gumbel-softmax relaxation, or nearest neighbour."""
    colour_split: bool | None = None
    """First codebook for a patch's end colours, the others for its pattern; for pictures of few
    flat colours."""
    ground_split: bool | None = None
    """Last codebook for a patch's colours, the others for which pixels are drawn; for drawings on
    an even ground, instead of colour_split."""
    width: Width | None = None
    """Width of the model's layers."""
    num_blocks: Layers | None = None
    """Residual blocks per resolution."""
    patch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """Side of the squares that the model takes as one."""
    num_downsamples: Annotated[int, Field(ge=0, le=6)] | None = None
    """How often the side is halved after that."""
    code_width: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of one code's embedding."""
    encoder_kernel_size: KernelSize | None = None
    """1 makes a code a function of its own patch; 3 is the usual."""
    decoder_kernel_size: KernelSize | None = None
    """3 lets neighbouring codes decide a pixel; 1 does not."""
    reconstruction: ReconstructionKind | None = None
    """Loss per pixel; bce suits flat graphics, the others photographs."""
    kl_weight: Annotated[float, Field(ge=0, le=1_000)] | None = None
    """Weight of the KL to a uniform code, gumbel only."""
    commitment_weight: Annotated[float, Field(ge=0, le=100)] | None = None
    """Weight of the distance to the code, vq only."""


class TransformerHyperparameters(StageHyperparameters):
    """The stage `transformer`."""

    width: Width | None = None
    """Width of the model's layers."""
    num_layers: Layers | None = None
    """Layers of the model."""
    num_heads: Heads | None = None
    """Attention heads per layer."""
    attention_kinds: Annotated[tuple[AttentionKind, ...], Field(min_length=1)] | None = None
    """Attention by layer, repeated in turn."""
    conv_kernel_size: Annotated[int, Field(ge=1, le=63)] | None = None
    """Window of the attention kind conv_like."""
    qk_norm: bool | None = None
    """Scale queries and keys to unit length before their product."""
    norm: NormKind | None = None
    """Normalisation before each branch."""
    feed_forward: FeedForwardKind | None = None
    """Activation of the feed-forward branch."""
    feed_forward_ratio: Annotated[int, Field(ge=1, le=16)] | None = None
    """Inner width of the feed-forward branch, in widths."""
    layer_scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """Start value of a learned factor on each branch."""
    target_position: bool | None = None
    """Tell each input the position that it is to predict."""
    dropout: Dropout | None = None
    """Share of channels dropped in training."""
    caption_dropout: Dropout | None = None
    """Share of captions blanked whole, so that guidance has something to compare."""
    word_dropout: Dropout | None = None
    """Share of text tokens hidden one by one in training."""
    token_noise: Dropout | None = None
    """Share of input image tokens replaced at random in training."""
    text_loss_weight: Annotated[float, Field(ge=0, le=100)] | None = None
    """Weight of the text loss beside the image loss."""


class ClipHyperparameters(StageHyperparameters):
    """The stage `clip`."""

    # Its loss compares all pairs of a batch; a micro-batch has only some of them.
    not_for_authors: ClassVar[frozenset[str]] = frozenset(SAVES_MEMORY)
    not_of_config: ClassVar[frozenset[str]] = frozenset({"fine_tune"})

    fine_tune: bool = False
    """The same as train_on=clip."""
    embed_size: Width | None = None
    """Length of the vectors that images and captions are compared by."""
    patch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """Side of the squares that the model takes as one."""
    vision_width: Width | None = None
    """Width of the image encoder."""
    vision_layers: Layers | None = None
    """Layers of the image encoder."""
    text_width: Width | None = None
    """Width of the text encoder."""
    text_heads: Heads | None = None
    """Heads of the text encoder."""
    text_layers: Layers | None = None
    """Layers of the text encoder."""
    likelihood_weight: Annotated[float, Field(ge=0, le=1_000)] | None = None
    """Weight of the transformer's log-likelihood beside CLIP's logit in ranking; 1 for drawings
    that their caption determines, 0 for photographs."""


class JobHyperparameters(_Fields):
    """Hyperparameters of the whole job."""

    stage: Literal["all", StageName] = "all"
    """What to train; all: what the artefact channel lacks, in that order."""
    train_on: tuple[TrainedOn, ...] = ()
    """Stages that train on from the model that a channel brings, with its sizes and its tokenizer,
    in place of a new one. Their learning rates are then lower, unless they are set: of the
    transformer muon_learning_rate 0.01, of CLIP learning_rate 1e-5 and muon_learning_rate 0."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Start of all random numbers."""
    engine: EngineName = "torch"
    """What computes the transformer's steps: plain torch, or DeepSpeed, which shares out its
    training state among the devices. The other models are torch's."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """With engine=deepspeed, what each device has only its share of: 1 the optimiser's state, 2 the
    gradients too, 3 the weights too; 0 nothing."""
    offload_optimizer: bool = False
    """With zero_stage 1 to 3, keep the optimiser's state in the host's memory and update the
    weights there."""
    offload_parameters: bool = False
    """With zero_stage 3, keep each device's share of the weights in the host's memory."""
    deepspeed_config: Annotated[str, Field(max_length=2_500)] = ""
    """DeepSpeed's own settings as a JSON object, for engine=deepspeed."""
    tokenizer_kind: TokenizerKind = "bpe"
    """Words or byte pairs learned from the captions, or CLIP's byte pairs."""
    tokenizer_vocab_size: Annotated[int, Field(ge=16, le=1_000_000)] = 8192
    """Largest number of different text tokens; at least 258 with bpe."""
    text_length: Annotated[int, Field(ge=1, le=4_096)] = 64
    """Text tokens that the models read; see long_captions."""
    long_captions: Literal["fail", "cut", "skip"] = "fail"
    """What becomes of a training caption of more than text_length tokens: the job fails, the
    caption is cut to its first words, or it is left out; counted and named."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = DEFAULT_MAX_BAD_SHARE
    """The job fails when more than this share of the pairs cannot be used."""
    caption_key: Annotated[str, Field(max_length=256)] = ""
    """Column or JSON key of the captions, in Parquet files, tables, COCO files and JSON of images;
    if unset, it is found by its name, and txt goes before json."""
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes that load images; chosen by the machine if unset."""
    num_validations: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Validations in each stage, evenly over its budget."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=40_320)] = 5.0
    """Minutes between two checkpoints."""
    checkpoints_kept: Annotated[int, Field(ge=1, le=1_000)] = 2
    """Newest checkpoints kept of each stage."""
    log_every: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Steps between two lines of metrics."""
    licence: Annotated[str, Field(max_length=256)] = ""
    """Licence text for the manifest."""


class Hyperparameters(JobHyperparameters):
    """All hyperparameters of one job; given: the flat names that its author set."""

    dvae: DVAEHyperparameters = DVAEHyperparameters()
    transformer: TransformerHyperparameters = TransformerHyperparameters()
    clip: ClipHyperparameters = ClipHyperparameters()
    given: frozenset[str] = frozenset()
    job_minutes: float | None = None
    """Minutes of the whole job, for size=auto to share among its stages; None where each stage has
    a budget of its own."""

    def of(self, stage: StageName) -> StageHyperparameters:
        """Return the settings of one stage."""
        settings: StageHyperparameters = getattr(self, stage)
        return settings

    def auto_stages(self) -> list[StageName]:
        """Return the stages whose sizes are to be chosen, in order."""
        return [stage for stage in STAGE_FIELDS if self.of(stage).size == "auto"]

    def trains_on(self, stage: str) -> bool:
        """Return whether a stage begins with the weights that a channel brings."""
        return stage in self.train_on


STAGE_FIELDS: dict[StageName, type[StageHyperparameters]] = {
    "dvae": DVAEHyperparameters,
    "transformer": TransformerHyperparameters,
    "clip": ClipHyperparameters,
}
