"""The rules by which size=auto chooses, with the reasons. No torch, no files, no clock.

Two settings found by hand are what the numbers come from (two cores that reach some 80 to 100
GFLOP/s together in training, see EXPERIMENTS.md): 3,300 emoji of 64 pixels as 8 x 8 positions of 4
codes with a transformer of 3.1 million weights in its layers, 60 minutes; 2,765 rainbow shapes of
32 pixels as 8 x 8 positions of 3 codes with 1.8 million, 9 minutes.

Letters: N positions of the image grid, T text tokens, W width, L layers, P weights of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dalle.models.configs import TransformerConfig
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.types import StageName

SHARES: dict[StageName, float] = {"dvae": 0.25, "transformer": 0.6, "clip": 0.15}
"""Of the time for training. Both settings above have 15 to 25 % for the image tokenizer: what it
loses, no later stage brings back. CLIP only ranks what the transformer draws."""

MIN_STEPS: dict[StageName, int] = {"dvae": 100, "transformer": 100, "clip": 50}
"""Steps below which a stage of the smallest models has learned nothing worth a picture."""

# --- pictures ---

IMAGE_SIZES = (32, 64, 128, 256)
"""Pixels. None beyond the pictures' own: enlarged pictures are work without content."""

WEIGHTS_FOR_SIZE = {32: 1_500_000, 64: 3_000_000, 128: 10_000_000, 256: 30_000_000}
"""Weights of the transformer's layers that pictures of a size deserve: about three times as many
for twice the side. 32 and 64 pixels are the settings above; the others continue them."""

ENOUGH = 0.5
"""Share of those weights that the time has to allow for a size to be chosen."""

GRID_SIDES = {32: 8, 64: 8, 128: 16, 256: 16}
"""Positions on a side. The transformer's work grows with their number, its attention with the
square: 64 pixels take no more than 32, and more codes a position tell what a patch holds."""

NUM_CODEBOOKS = 4
CODEBOOK_SIZE, LARGE_CODEBOOK_SIZE = 256, 1024
PAIRS_FOR_LARGE_CODEBOOK = 50_000
"""Large codebooks need many patches: of 2,048 codes 1,812 died on 2,765 shapes of 32 pixels."""

# --- drawings of few colours on an even ground ---

DRAWING_COLOURS = 16  # of 16 levels a channel, in the median picture; emoji have 108, rainbow 2
DRAWING_EVEN_BORDER = 0.9  # share of the border's pixels that have about its median colour
DRAWINGS: dict[StageName, dict[str, Any]] = {
    "dvae": {"ground_split": True, "num_codebooks": 3},
    "transformer": {"dropout": 0.0, "caption_dropout": 0.0, "text_loss_weight": 0.01},
    "clip": {"likelihood_weight": 1.0},
}
"""As in `recipes/rainbow_bench.json`: a pattern has the same codes in every colour, and what a
caption determines whole needs no regularisation at this length."""

# --- transformer ---

LADDER = (
    *((64, 2), (96, 3), (128, 3), (128, 4), (160, 4), (192, 4), (224, 4), (256, 4), (256, 5)),
    *((320, 5), (384, 5), (384, 6), (448, 7), (512, 8), (512, 12), (640, 12), (768, 12)),
    *((896, 14), (1024, 16), (1280, 20), (1536, 24)),
)
"""(width, layers) of the transformer, by P = 12 W² L. Heads are 32 wide."""

POSITIONS_PER_WEIGHT = 1.5
"""Positions to be seen in training, repeats included, for each weight. The settings above have 0.9
(rainbow) and 1.4 (emoji), of 3 or 4 codes each. Models of text that see everything once have some
20 (Hoffmann et al. 2022); here a picture is seen 10 to 40 times anyway."""

ALMOST = 0.6
"""Share of them that is enough, since widths come in steps."""

WEIGHTS_PER_CODE = 4.0
"""Most weights for each code of the data set, N x codebooks of each picture: both settings above
have 3.5. A larger model would learn the pictures by heart before it learns to compose them."""

SMALLEST_CAP = 400_000
"""The same for a handful of pictures."""

# --- image tokenizer and CLIP ---

DVAE_WIDTHS = (64, 96, 128, 192, 256)
DVAE_STEPS = 1_000
"""The widest is taken that makes so many steps: colours come apart after some 400 of them, and
after 700 to 800 reconstructions of the settings above are nearest to their own pictures."""
WIDE_FROM_SIZE = 128
"""Pixels from which the widest is tried."""

CLIP_SIZES: tuple[dict[str, int], ...] = (
    {"vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 2, "text_heads": 2},
    {"vision_width": 128, "vision_layers": 3, "text_width": 128, "text_layers": 2},
    {"embed_size": 256, "vision_width": 256, "vision_layers": 6, "text_width": 256}
    | {"text_heads": 8, "text_layers": 4},
    {"embed_size": 512, "vision_width": 512, "vision_layers": 8, "text_width": 384}
    | {"text_heads": 8, "text_layers": 6},
)
CLIP_STEPS = 400
"""The largest is taken that makes so many steps; 450 suffice on 2,765 shapes."""
CLIP_PAIRS = (0, 0, 20_000, 200_000)
"""Pairs from which each of CLIP_SIZES is worth its time."""
CLIP_GRID_SIDE = 8

# --- batches and rates ---

BATCHES: dict[str, dict[StageName, int]] = {
    "cpu": {"dvae": 32, "transformer": 16, "clip": 64},
    "cuda": {"dvae": 64, "transformer": 64, "clip": 256},
}
"""Smallest ones. A CPU computes small batches as quickly as large ones, pair by pair, and more
steps learn more; a GPU idles in small ones. CLIP compares the pairs of a batch."""
LARGEST_TRANSFORMER_BATCH = {"cpu": 64, "cuda": 512}
TRANSFORMER_STEPS = 4_000
"""The transformer's batch is doubled until about so many steps are left."""
BATCHES_PER_EPOCH = 8
"""Least batches in an epoch."""

NUM_VALIDATIONS = (4, 10)
VALIDATION_SHARE = 0.05
"""Of a stage's time, for its validations."""

TEXT_LENGTH_MULTIPLE = 4
LARGEST_TEXT_LENGTH = 256


def learning_rates(stage: StageName, width: int) -> dict[str, Any]:
    """Return the rates for a model of random weights. Wider models take smaller steps by AdamW;
    Muon's are of one size for all widths."""
    if stage == "dvae":
        return {"learning_rate": 0.005 if width <= 192 else 0.003, "weight_decay": 0.0}
    if stage == "clip":
        return {"learning_rate": 0.002 if width <= 128 else 0.001}
    return {"learning_rate": max(0.001, min(0.004, 0.004 * 192 / width)), "weight_decay": 0.0}


def warmup_steps(num_steps: float) -> int:
    """Return the steps of rising rates: 50, and fewer where a stage has few steps."""
    return max(1, min(50, int(num_steps / 20)))


def layer_weights(width: int, num_layers: int) -> int:
    """Return P: the weights of attention and feed-forward branches."""
    return 12 * width**2 * num_layers


def pair_operations(config: TransformerConfig | LegacyTransformerConfig) -> float:
    """Return the floating-point operations of both passes of the transformer over one pair."""
    length = config.text_length + config.grid_size**2
    per_token = layer_weights(config.width, config.num_layers) * length
    heads = config.width * (
        config.num_codebooks * config.codebook_size * config.grid_size**2
        + config.text_vocab_size * config.text_length
    )
    attention = 2 * config.num_layers * config.width * length**2
    return 6.0 * (per_token + heads + attention)


def data_weights(num_pairs: int, num_codes: int) -> float:
    """Return the most weights of the transformer's layers that a data set bears.

    num_codes: of a picture, over all its positions and codebooks.
    """
    return max(SMALLEST_CAP, WEIGHTS_PER_CODE * num_pairs * num_codes)


def patch_sizes(image_size: int, num_downsamples: int = 0) -> Iterator[int]:
    """Yield the patch sizes that divide a picture, that of its grid first, then the nearest."""
    side = GRID_SIDES.get(image_size, 8 if image_size <= 64 else 16)
    wanted = max(1.0, image_size / side / 2**num_downsamples)
    units = image_size // 2**num_downsamples
    divisors = [size for size in range(1, min(64, units) + 1) if units % size == 0]
    yield from sorted(divisors, key=lambda size: abs(size - wanted))


def clip_patch_size(image_size: int) -> int:
    """Return the patch size of CLIP's image encoder, which divides the picture."""
    divisors = [size for size in range(1, 65) if image_size % size == 0]
    return min(divisors, key=lambda size: abs(size - image_size / CLIP_GRID_SIDE))


def rounded_text_length(longest: int) -> int:
    """Return the text tokens that the models read, for captions of up to so many."""
    multiple = TEXT_LENGTH_MULTIPLE
    return min(LARGEST_TEXT_LENGTH, max(multiple, -(-longest // multiple) * multiple))
