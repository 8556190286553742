"""Named sizes: each builds its models; the two large ones are as large as named."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from dalle.models import sizes
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import Dalle, TransformerConfig

NAMES = get_args(sizes.SizeName)


def config_of(size: str) -> TransformerConfig:
    """Config with the text of the DALL-E paper and the grid of the size's dVAE."""
    dvae = DVAEConfig(**sizes.DVAE_SIZES[size])
    return TransformerConfig(
        text_vocab_size=16384,
        text_length=256,
        grid_size=dvae.grid_size,
        codebook_size=dvae.codebook_size,
        num_codebooks=dvae.num_codebooks,
        **sizes.TRANSFORMER_SIZES[size],
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", NAMES)
def test_every_size_can_be_built(size):
    dvae_config, config = DVAEConfig(**sizes.DVAE_SIZES[size]), config_of(size)
    clip_config = ClipConfig(
        image_size=dvae_config.image_size,
        text_vocab_size=16385,
        text_length=257,
        **sizes.CLIP_SIZES[size],
    )
    with torch.device("meta"):
        for model in (DiscreteVAE(dvae_config), Dalle(config), Clip(clip_config)):
            assert all(parameter.is_meta for parameter in model.parameters())


def test_every_model_has_every_size():
    for table in (sizes.DVAE_SIZES, sizes.TRANSFORMER_SIZES, sizes.CLIP_SIZES):
        assert set(table) == set(NAMES)


@pytest.mark.parametrize(
    ("size", "num_layers", "num_heads", "width", "parameters"),
    [("dalle-1.3b", 24, 32, 2048, 1.3e9), ("dalle-12b", 64, 62, 3968, 12e9)],
)
def test_the_large_ones_are_as_large_as_their_names(size, num_layers, num_heads, width, parameters):
    with torch.device("meta"):
        model = Dalle(config_of(size))
    config = model.config
    assert (config.num_layers, config.num_heads, config.width) == (num_layers, num_heads, width)
    assert config.head_width == 64
    assert len(model.blocks) == num_layers
    assert model.blocks[0].attention.function.to_qkv.weight.shape == (3 * width, width)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(parameters, rel=0.05)


def test_the_12b_attends_along_columns_every_fourth_layer_and_ends_with_a_window():
    config = config_of("dalle-12b")
    kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
    assert [layer for layer, kind in enumerate(kinds) if kind == "axial_col"] == [*range(1, 64, 4)]
    assert kinds[-1] == "conv_like"
    assert set(kinds[:-1]) == {"axial_row", "axial_col"}
    assert (config.grid_size, config.length) == (32, 1280)


def test_the_sizes_need_no_torch():
    code = "import sys, dalle.models.sizes; sys.exit('torch' in sys.modules)"
    container = Path(sizes.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(container)})
