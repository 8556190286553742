"""The discrete VAE: shapes, ranges, refused configs, and training."""

from dataclasses import replace

import pytest
import torch

from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.encoders import _extend_colours
from training import rainbow

TINY = DVAEConfig(
    image_size=16,
    patch_size=4,
    num_downsamples=0,
    width=16,
    num_blocks=1,
    codebook_size=32,
    num_codebooks=2,
    code_width=4,
    encoder_kernel_size=1,
)
CONFIGS = {
    "gumbel": replace(TINY, quantiser="gumbel", kl_weight=0.01),
    "vq": replace(TINY, quantiser="vq"),
    "colour_split": replace(TINY, quantiser="vq", num_codebooks=3, colour_split=True),
    "ground_split": replace(TINY, quantiser="vq", num_codebooks=3, ground_split=True),
    "paper": replace(TINY, patch_size=1, num_downsamples=3, num_codebooks=1, encoder_kernel_size=3),
}


def build(config: DVAEConfig) -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(config).eval()


def random_images(count: int = 5, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_images_become_tokens_of_the_codebook_and_images_again(config):
    dvae, images = build(config), random_images()
    image_tokens = dvae.encode(images)
    assert image_tokens.shape == (5, config.num_positions, config.num_codebooks)
    assert image_tokens.dtype == torch.int64
    assert ((image_tokens >= 0) & (image_tokens < config.codebook_size)).all()
    decoded = dvae.decode(image_tokens)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert ((decoded >= 0) & (decoded <= 1)).all()
    assert not decoded.requires_grad


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_images_tokens_and_pixels_do_not_depend_on_its_batch(config):
    dvae, images = build(config), random_images()
    image_tokens = dvae.encode(images)
    assert (dvae.encode(images[2:3]) == image_tokens[2]).all()
    torch.testing.assert_close(dvae.decode(image_tokens[2:3])[0], dvae.decode(image_tokens)[2])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_black_and_white_images_have_finite_losses(config):
    dvae = build(config).train()
    images = torch.cat([torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    loss = dvae.loss(images, 0.0)
    assert all(value.isfinite() for value in (loss.total, loss.reconstruction, loss.quantiser))
    assert (images == torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).all(), "left as they were"


@pytest.mark.parametrize("reconstruction", ["bce", "l1", "mse"])
def test_the_reconstruction_loss_compares_images_with_what_their_tokens_decode_to(reconstruction):
    dvae, images = build(replace(TINY, reconstruction=reconstruction)), random_images()
    decoded = dvae.decode(dvae.encode(images))
    expected = {
        "bce": -(images * decoded.log() + (1 - images) * (1 - decoded).log()),
        "l1": (images - decoded).abs(),
        "mse": (images - decoded).square(),
    }[reconstruction]
    torch.testing.assert_close(dvae.reconstruction_loss(images), expected.mean())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_learns_to_reconstruct_a_few_images(config):
    config = replace(config, image_size=32, reconstruction="bce")
    everything = rainbow.samples()
    pictures = [everything[index].picture() for index in range(0, len(everything), 1152)]
    images = torch.stack([torch.from_numpy(each) for each in pictures]).permute(0, 3, 1, 2) / 255
    dvae = build(config).train()
    optimizer = torch.optim.AdamW([p for p in dvae.parameters() if p.requires_grad], 1e-2)
    first = dvae.reconstruction_loss(images).item()
    for step in range(50):
        optimizer.zero_grad()
        loss = dvae.loss(images, step / 50)
        torch.testing.assert_close(loss.total, loss.reconstruction + loss.quantiser)
        loss.total.backward()
        optimizer.step()
    assert all(p.grad is not None for p in dvae.parameters() if p.requires_grad)
    assert dvae.eval().reconstruction_loss(images).item() < 0.5 * first


def paint(patterns: torch.Tensor, low: list[float], high: list[float]) -> torch.Tensor:
    """Patterns [B, S, S] of 0 and 1 in two colours -> images [B, 3, S, S]."""
    dark, light = (torch.tensor(colour).float().view(1, 3, 1, 1) for colour in (low, high))
    return torch.where(patterns[:, None], light, dark)


def test_a_pattern_has_the_same_tokens_in_every_colour():
    dvae = build(CONFIGS["colour_split"])
    patterns = torch.rand(20, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    painted = [
        dvae.encode(paint(patterns, low, high))
        for low, high in (
            ([0, 0, 0], [1, 1, 1]),
            ([1, 0, 0], [1, 1, 1]),
            ([1, 1, 0], [1, 1, 1]),  # the lightest of them
            ([0, 0, 1], [0, 1, 1]),
            ([0.1, 0.2, 0.3], [0.4, 0.3, 0.5]),
        )
    ]
    assert len(painted[0][..., 1:].unique()) > 4, "patterns differ"
    for other in painted[1:]:
        assert (other[..., 1:] == painted[0][..., 1:]).all()
    assert len(torch.stack(painted)[..., 0].unique()) > 1, "colours differ"


def test_a_colour_has_the_same_token_in_every_pattern():
    dvae = build(CONFIGS["colour_split"])
    patterns = torch.rand(20, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    image_tokens = dvae.encode(paint(patterns, [1, 0, 0], [1, 1, 1]))
    assert len(image_tokens[..., 0].unique()) == 1
    assert len(image_tokens[..., 1].unique()) > 1


def paint_on(background: list[float], foreground: torch.Tensor, colours: torch.Tensor):
    """Colours [3, S, S] where `foreground` [B, S, S], elsewhere the background -> [B, 3, S, S]."""
    paper = torch.tensor(background).float().view(1, 3, 1, 1)
    return torch.where(foreground[:, None], colours, paper)


STRIPES = torch.rand(3, 16, 1, generator=torch.Generator().manual_seed(3)).expand(3, 16, 16)


def test_with_ground_split_stripes_have_the_pattern_tokens_of_one_colour():
    dvae = build(CONFIGS["ground_split"])
    foreground = torch.rand(20, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    foreground[:, [0, -1]] = foreground[:, :, [0, -1]] = False
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 16, 16)
    painted = [
        dvae.encode(paint_on(background, foreground, colours))
        for background, colours in (
            ([1, 1, 1], red),
            ([1, 1, 1], STRIPES),
            ([1, 1, 1], STRIPES.mT),
            ([0, 0, 0.2], STRIPES),
        )
    ]
    assert len(painted[0][..., :-1].unique()) > 4, "patterns differ"
    for other in painted[1:]:
        assert (other[..., :-1] == painted[0][..., :-1]).all()
    assert len(torch.stack(painted)[..., -1].unique()) > 1, "colours differ"
    assert (painted[1][..., -1] != painted[3][..., -1]).any(), (
        "the background is part of the colours"
    )


@pytest.mark.parametrize("colours", [STRIPES, STRIPES.mT], ids=["rows", "columns"])
def test_the_colours_of_a_patch_do_not_depend_on_its_pattern(colours):
    # As long as each stripe shows somewhere: here in two pixels of the patch, wherever they are.
    patches = colours[None, :, :4, :4].expand(2, -1, -1, -1)
    first = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, dims=0)
    foreground = torch.stack([first, first.roll(2, dims=0)])
    white = torch.ones(2, 3)
    extended = _extend_colours(
        paint_on([1, 1, 1], foreground, colours[:, :4, :4]), foreground, white
    )
    torch.testing.assert_close(extended, patches)


def test_background_pixels_take_the_nearest_colour_and_an_empty_patch_the_backgrounds():
    patches = torch.zeros(2, 3, 4, 4)
    patches[0, :, 1] = 0.3
    patches[0, :, 3] = 0.9
    foreground = torch.zeros(2, 4, 4, dtype=torch.bool)
    foreground[0, 1, 2] = foreground[0, 3, 0] = True
    background = torch.tensor([[1.0, 1, 1], [0.5, 0.6, 0.7]])
    extended = _extend_colours(patches, foreground, background)
    rows = torch.tensor([0.3, 0.3, 0.3, 0.9]).view(1, 4, 1).expand(3, 4, 4)
    torch.testing.assert_close(extended[0], rows)
    torch.testing.assert_close(extended[1], background[1].view(3, 1, 1).expand(3, 4, 4))


def test_the_grid_follows_from_the_sizes():
    config = DVAEConfig(image_size=256, patch_size=2, num_downsamples=2)
    assert (config.stride, config.grid_size, config.num_positions) == (8, 32, 1024)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image_size": 30}, r"image_size must be a multiple of .* = 4, got 30"),
        ({"encoder_kernel_size": 2}, "encoder_kernel_size must be 1 or 3, got 2"),
        ({"decoder_kernel_size": 5}, "decoder_kernel_size must be 1 or 3, got 5"),
        ({"colour_split": True, "num_codebooks": 1}, "colour_split needs .* got 1, 4 and 0"),
        ({"colour_split": True, "patch_size": 1}, "colour_split needs .* got 2, 1 and 0"),
        ({"colour_split": True, "num_downsamples": 1}, "colour_split needs .* got 2, 4 and 1"),
        ({"ground_split": True, "num_codebooks": 1}, "ground_split needs .* got 1, 4 and 0"),
        ({"ground_split": True, "colour_split": True}, "exclude each other"),
    ],
)
def test_a_wrong_config_is_named(fields, says):
    with pytest.raises(ValueError, match=says):
        replace(TINY, **fields)
