"""Attention masks of each kind; the key-value cache does not change results."""

import pytest
import torch

from dalle.models.layers import KeyValueCache, SelfAttention, visibility
from dalle.types import ATTENTION_KINDS
from tests.dalle.decoding.reference import copy_prefix

T, G = 3, 4  # text length, grid size
L = T + G * G
KERNEL_SIZES = [1, 3, 5]


def may_see(kind: str, query: int, key: int, kernel_size: int) -> bool:
    """Definition of the masks per pair of inputs: BOS is 0, text 1 to T, then the image."""
    if key > query:
        return False
    if kind == "full" or query <= T or key <= T:
        return True
    row, column = divmod(query - T - 1, G)
    key_row, key_column = divmod(key - T - 1, G)
    if kind == "axial_row":
        return key_row == row
    if kind == "axial_col":
        return key_column == column
    half = kernel_size // 2
    return row - key_row < kernel_size and -half <= key_column - column <= half


def centred(x: torch.Tensor) -> torch.Tensor:
    """Normalise to mean 0 and standard deviation 1 over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_each_kind_sees_what_its_definition_says(kind, kernel_size):
    expected = [[may_see(kind, q, k, kernel_size) for k in range(L)] for q in range(L)]
    assert visibility(kind, T, G, kernel_size).tolist() == expected


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_nothing_sees_the_future_and_everything_sees_itself(kind):
    visible = visibility(kind, T, G, 3)
    assert not visible.triu(1).any()
    assert visible.diagonal().all()


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_text_is_causal_and_the_image_sees_the_whole_text(kind):
    visible = visibility(kind, T, G, 3)
    assert (visible[: T + 1, : T + 1] == torch.ones(T + 1, T + 1).tril().bool()).all()
    assert visible[T + 1 :, : T + 1].all()


def build_attention(kind: str, *, qk_norm: bool = True) -> SelfAttention:
    torch.manual_seed(0)
    visible = None if kind == "full" else visibility(kind, T, G, 3)
    return SelfAttention(8, 2, visible=visible, qk_norm=qk_norm).eval()


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_it_is_the_softmax_over_what_is_visible(kind, qk_norm):
    attention = build_attention(kind, qk_norm=qk_norm)
    x = torch.randn(2, L, 8)
    query, key, value = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in attention.to_qkv(x).chunk(3, dim=-1)
    )
    if qk_norm:
        query, key = (centred(part) for part in (query, key))
    scores = query @ key.mT / 2
    weights = scores.masked_fill(~visibility(kind, T, G, 3), -torch.inf).softmax(dim=-1)
    expected = attention.to_out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, None, 0), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("pieces", [[L], [1] * L, [T + 1, 4, 1, 1, 8, 1], [2, L - 2]])
def test_piece_by_piece_with_a_cache_equals_the_whole_at_once(kind, pieces):
    assert sum(pieces) == L
    attention = build_attention(kind)
    x = torch.randn(3, L, 8)
    cache = KeyValueCache(1, (3, 2, L, 4), x)
    outputs = []
    for piece in x.split(pieces, dim=1):
        outputs.append(attention(piece, cache, 0))
        cache.filled += piece.shape[1]
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, None, 0))


def test_a_cache_begins_with_what_a_cache_of_one_row_holds():
    prefix = KeyValueCache(2, (1, 2, 5, 4), torch.zeros(()))
    keys, values = torch.randn(2, 1, 2, 3, 4)
    for layer in range(2):
        prefix.append(layer, keys + layer, values + layer)
    prefix.filled = 3
    cache = KeyValueCache(2, (4, 2, 5, 4), torch.zeros(()))
    copy_prefix(prefix, cache)
    assert cache.filled == 3
    for layer in range(2):
        one = torch.randn(4, 2, 1, 4)
        all_keys, all_values = cache.append(layer, one, one)
        assert all_keys.shape == (4, 2, 4, 4)
        for row in range(4):
            assert (all_keys[row, :, :3] == keys[0] + layer).all()
            assert (all_values[row, :, :3] == values[0] + layer).all()
        assert (all_keys[:, :, 3:] == one).all()
    assert (prefix.keys[0][:, :, 3:] == 0).all(), "the prefix stays as it was"
