"""training.evaluate.pixels: error, closeness, PSNR and SSIM against what they are by definition."""

import math

import numpy as np
import pytest
import torch

from training.evaluate.pixels import CLOSE, MOST_PSNR, compare_pixels, structural_similarity


def flat(value, size=16):
    return torch.full((1, 3, size, size), value, dtype=torch.uint8)


def noise(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_equal_images_have_no_error_and_the_greatest_similarity():
    images = noise(3, 32)
    score = compare_pixels(images, images.clone()).mean()
    assert (score.error, score.close, score.psnr) == (0, 1, MOST_PSNR)
    assert score.ssim == pytest.approx(1)


def test_one_value_that_is_off_by_more_is_seen():
    real = flat(100).repeat(3, 1, 1, 1)
    images = real.clone()
    images[1, 2, 5, 5] += CLOSE
    images[2, 2, 5, 5] -= CLOSE + 1
    errors = compare_pixels(images, real)
    assert errors.close.tolist() == [1, 1, 0]
    assert errors.error.tolist() == pytest.approx([0, CLOSE / 768, (CLOSE + 1) / 768])


def test_psnr_is_that_of_the_mean_square():
    assert compare_pixels(flat(90), flat(100)).psnr.item() == pytest.approx(20 * math.log10(25.5))
    assert compare_pixels(flat(0), flat(255)).mean().psnr == 0


def test_ssim_of_flat_images_is_that_of_their_means():
    c1 = 2.55**2
    expected = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)
    assert compare_pixels(flat(50), flat(200)).ssim.item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [5, 11, 14])
def test_ssim_is_the_mean_over_windows(size):
    images, real = noise(2, size).double(), noise(2, size, seed=1).double()
    images[1] = 0.7 * real[1] + 0.3 * images[1]
    window = min(11, size)
    offsets = np.arange(window) - (window - 1) / 2
    gauss = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    gauss /= gauss.sum()
    expected = []
    for ours, theirs in zip(images.numpy(), real.numpy(), strict=True):
        values = []
        for channel in range(3):
            for y in range(size - window + 1):
                for x in range(size - window + 1):
                    a, b = (p[channel, y : y + window, x : x + window] for p in (ours, theirs))
                    ma, mb = (gauss * a).sum(), (gauss * b).sum()
                    va, vb = (gauss * (a - ma) ** 2).sum(), (gauss * (b - mb) ** 2).sum()
                    cov = (gauss * (a - ma) * (b - mb)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    luminance = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
                    values.append(luminance * (2 * cov + c2) / (va + vb + c2))
        expected.append(np.mean(values))
    found = structural_similarity(images, real)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found[1] > 0.5 > found[0]


def test_many_images_are_compared_as_one_by_one():
    images, real = noise(130, 8), noise(130, 8, seed=1)
    together = compare_pixels(images, real)
    alone = compare_pixels(images[100:101], real[100:101])
    torch.testing.assert_close(together.ssim[100:101], alone.ssim, rtol=0, atol=1e-12)
    assert together.of(torch.tensor([3, 100])).error.tolist() == [
        together.error[3].item(),
        together.error[100].item(),
    ]
