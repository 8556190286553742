"""Every hyperparameter of a training job: its type, range, default and one sentence.

A stage's model fields are overrides: None leaves what the named `size` says (see
dalle.models.sizes). How flat text becomes these models, and how they become a table, is in
training.config.hyperparameters."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
from training.data.skips import DEFAULT_MAX_BAD_SHARE

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
MAX_BATCH_SIZE = 65_536

EngineName = Literal["torch", "deepspeed"]


class _Fields(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class FitHyperparameters(_Fields):
    """How one stage is trained, whatever its model."""

    epochs: Positive | None = Field(
        default=None,
        description="Passes of each stage over the training pairs; "
        f"{DEFAULT_EPOCHS} when neither max_steps nor max_minutes is given.",
    )
    max_steps: Positive | None = Field(
        default=None, description="Budget of each stage in steps, instead of epochs."
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        le=40_320,
        description="Budget of each stage in minutes, instead of epochs; those before an "
        "interruption count.",
    )
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | Literal["auto"] = Field(
        default=64,
        description="Pairs in one step, on all devices together; auto: as many as fit a GPU, or as "
        "are still worth it on a CPU.",
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=65_536,
        description="Parts that each device computes its share of a batch in, one after another: "
        "less memory, the same losses.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="AdamW's learning rate.")
    muon_learning_rate: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Muon's learning rate for hidden matrices; 0 gives them to AdamW.",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, le=1, description="Pull of the weights towards zero."
    )
    warmup_steps: int = Field(
        default=50,
        ge=0,
        le=1_000_000,
        description="Steps over which the learning rate rises from zero.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Number format of the forward pass; fp16 needs a GPU."
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute each block's activations anew in the backward pass instead of "
        "keeping them: less memory, a third more work.",
    )
    gradient_clipping: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Largest norm of all gradients together; 0 for none.",
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of the weights' running average, which is saved; 0 off.",
    )

    @model_validator(mode="after")
    def _has_one_budget(self) -> FitHyperparameters:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both a budget; give one of them")
        return self

    @property
    def pairs_per_step(self) -> int:
        """batch_size as a number: of a job whose own `auto` has been settled."""
        assert self.batch_size != "auto", "the worker settles it before it builds a stage"
        return self.batch_size

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run.

        Not the budget: a finished run may be prolonged. Nor where memory is saved, which may
        change as the number of hosts may: that only rounds otherwise.
        """
        return self.model_dump(mode="json", exclude={*BUDGETS, *SAVES_MEMORY})


class StageHyperparameters(FitHyperparameters):
    """How one stage is trained, and what it trains: a named size and changes to it."""

    not_for_authors: ClassVar[frozenset[str]] = frozenset()
    """Fields that have one value in this stage, and so are no hyperparameters of it."""

    size: SizeName = Field(
        default="small", description="Named model size that the fields below start from."
    )

    def overrides(self) -> dict[str, Any]:
        """Config field -> value, of the fields that were given for the model."""
        common = StageHyperparameters.model_fields
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in common and getattr(self, name) is not None
        }


class DVAEHyperparameters(StageHyperparameters):
    """The stage `dvae`."""

    # Its codebook takes a step with each forward pass, and it is small.
    not_for_authors: ClassVar[frozenset[str]] = frozenset({"muon_learning_rate", *SAVES_MEMORY})
    muon_learning_rate: float = Field(default=0.0, ge=0, le=0)  # AdamW has all of its weights

    image_size: int | None = Field(
        default=None, ge=8, le=1024, description="Side of the square images, in pixels."
    )
    codebook_size: Codebook | None = Field(
        default=None, description="Codes there are to choose from."
    )
    num_codebooks: int | None = Field(
        default=None, ge=1, le=16, description="Codes per grid position."
    )
    quantiser: QuantiserKind | None = Field(
        default=None, description="Gumbel-softmax relaxation, or nearest neighbour."
    )
    colour_split: bool | None = Field(
        default=None,
        description="First codebook for a patch's end colours, the others for its pattern; "
        "for pictures of few flat colours.",
    )
    ground_split: bool | None = Field(
        default=None,
        description="Last codebook for a patch's colours, the others for which pixels are drawn; "
        "for drawings on an even ground, instead of colour_split.",
    )
    width: Width | None = Field(default=None, description="Width of the model's layers.")
    num_blocks: Layers | None = Field(default=None, description="Residual blocks per resolution.")
    patch_size: int | None = Field(
        default=None, ge=1, le=64, description="Side of the squares that the model takes as one."
    )
    num_downsamples: int | None = Field(
        default=None, ge=0, le=6, description="How often the side is halved after that."
    )
    code_width: int | None = Field(
        default=None, ge=1, le=65_536, description="Width of one code's embedding."
    )
    encoder_kernel_size: KernelSize | None = Field(
        default=None, description="1 makes a code a function of its own patch; 3 is the usual."
    )
    decoder_kernel_size: KernelSize | None = Field(
        default=None, description="3 lets neighbouring codes decide a pixel; 1 does not."
    )
    reconstruction: ReconstructionKind | None = Field(
        default=None, description="Loss per pixel; bce suits flat graphics, the others photographs."
    )
    kl_weight: float | None = Field(
        default=None, ge=0, le=1_000, description="Weight of the KL to a uniform code, gumbel only."
    )
    commitment_weight: float | None = Field(
        default=None, ge=0, le=100, description="Weight of the distance to the code, vq only."
    )


class TransformerHyperparameters(StageHyperparameters):
    """The stage `transformer`."""

    width: Width | None = Field(default=None, description="Width of the model's layers.")
    num_layers: Layers | None = Field(default=None, description="Layers of the model.")
    num_heads: Heads | None = Field(default=None, description="Attention heads per layer.")
    attention_kinds: tuple[AttentionKind, ...] | None = Field(
        default=None, min_length=1, description="Attention by layer, repeated in turn."
    )
    conv_kernel_size: int | None = Field(
        default=None, ge=1, le=63, description="Window of the attention kind conv_like."
    )
    qk_norm: bool | None = Field(
        default=None, description="Scale queries and keys to unit length before their product."
    )
    norm: NormKind | None = Field(default=None, description="Normalisation before each branch.")
    feed_forward: FeedForwardKind | None = Field(
        default=None, description="Activation of the feed-forward branch."
    )
    feed_forward_ratio: int | None = Field(
        default=None, ge=1, le=16, description="Inner width of the feed-forward branch, in widths."
    )
    layer_scale: float | None = Field(
        default=None, gt=0, le=1, description="Start value of a learned factor on each branch."
    )
    target_position: bool | None = Field(
        default=None, description="Tell each input the position that it is to predict."
    )
    dropout: Dropout | None = Field(
        default=None, description="Share of channels dropped in training."
    )
    caption_dropout: Dropout | None = Field(
        default=None,
        description="Share of captions blanked whole, so that guidance has something to compare.",
    )
    word_dropout: Dropout | None = Field(
        default=None, description="Share of text tokens hidden one by one in training."
    )
    token_noise: Dropout | None = Field(
        default=None, description="Share of input image tokens replaced at random in training."
    )
    text_loss_weight: float | None = Field(
        default=None, ge=0, le=100, description="Weight of the text loss beside the image loss."
    )


class ClipHyperparameters(StageHyperparameters):
    """The stage `clip`."""

    # Its loss contrasts all pairs of a batch, which parts of one would not be.
    not_for_authors: ClassVar[frozenset[str]] = frozenset(SAVES_MEMORY)

    embed_size: Width | None = Field(
        default=None,
        description="Length of the vectors that images and captions are compared by.",
    )
    patch_size: int | None = Field(
        default=None, ge=1, le=64, description="Side of the squares that the model takes as one."
    )
    vision_width: Width | None = Field(default=None, description="Width of the image encoder.")
    vision_layers: Layers | None = Field(default=None, description="Layers of the image encoder.")
    text_width: Width | None = Field(default=None, description="Width of the text encoder.")
    text_heads: Heads | None = Field(default=None, description="Heads of the text encoder.")
    text_layers: Layers | None = Field(default=None, description="Layers of the text encoder.")
    likelihood_weight: float | None = Field(
        default=None,
        ge=0,
        le=1_000,
        description="Weight of the transformer's log-likelihood beside CLIP's logit in ranking; "
        "1 for drawings that their caption determines, 0 for photographs.",
    )


class JobHyperparameters(_Fields):
    """What holds for the whole job, whatever it trains."""

    stage: Literal["all", StageName] = Field(
        default="all",
        description="What to train; all: what the artefact channel lacks, in that order.",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Start of all random numbers.")
    engine: EngineName = Field(
        default="torch",
        description="What computes the transformer's steps: plain torch, or DeepSpeed, which "
        "shares out its training state among the devices. The other models are torch's.",
    )
    zero_stage: int = Field(
        default=2,
        ge=0,
        le=3,
        description="With engine=deepspeed, what each device has only its share of: 1 the "
        "optimiser's state, 2 the gradients too, 3 the weights too; 0 nothing.",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="With zero_stage 1 to 3, keep the optimiser's state in the host's memory and "
        "update the weights there.",
    )
    offload_parameters: bool = Field(
        default=False,
        description="With zero_stage 3, keep each device's share of the weights in the host's "
        "memory.",
    )
    deepspeed_config: str = Field(
        default="",
        max_length=2_500,
        description="DeepSpeed's own settings as a JSON object, for engine=deepspeed.",
    )
    tokenizer_kind: TokenizerKind = Field(
        default="bpe",
        description="Words or byte pairs learned from the captions, or CLIP's byte pairs.",
    )
    tokenizer_vocab_size: int = Field(
        default=8192, ge=16, le=1_000_000, description="Largest number of different text tokens."
    )
    text_length: int = Field(
        default=64,
        ge=1,
        le=4_096,
        description="Text tokens that the models read; longer captions fail.",
    )
    max_bad_share: float = Field(
        default=DEFAULT_MAX_BAD_SHARE,
        ge=0,
        le=1,
        description="The job fails when more than this share of the pairs cannot be used.",
    )
    caption_key: str = Field(
        default="",
        max_length=256,
        description="Key of the captions in a shard's json members; if unset, their txt members "
        "are read, or else the key caption.",
    )
    num_workers: int | None = Field(
        default=None,
        ge=0,
        le=256,
        description="Processes that load images; chosen by the machine if unset.",
    )
    num_validations: int = Field(
        default=10,
        ge=0,
        le=10_000,
        description="Validations in each stage, evenly over its budget.",
    )
    checkpoint_minutes: float = Field(
        default=5.0, gt=0, le=40_320, description="Minutes between two checkpoints."
    )
    checkpoints_kept: int = Field(
        default=2, ge=1, le=1_000, description="Newest checkpoints kept of each stage."
    )
    log_every: int = Field(
        default=50, ge=1, le=10_000, description="Steps between two lines of metrics."
    )
    licence: str = Field(default="", max_length=256, description="Licence text for the manifest.")


class Hyperparameters(JobHyperparameters):
    """All hyperparameters of one job: its own fields and one model per stage.

    given: the flat names that the job's author set.
    """

    dvae: DVAEHyperparameters = DVAEHyperparameters()
    transformer: TransformerHyperparameters = TransformerHyperparameters()
    clip: ClipHyperparameters = ClipHyperparameters()
    given: frozenset[str] = frozenset()

    def of(self, stage: StageName) -> StageHyperparameters:
        """The settings of one stage."""
        settings: StageHyperparameters = getattr(self, stage)
        return settings


STAGE_FIELDS: dict[StageName, type[StageHyperparameters]] = {
    "dvae": DVAEHyperparameters,
    "transformer": TransformerHyperparameters,
    "clip": ClipHyperparameters,
}
