"""training.splicing: pictures that begin as one and go on as another."""

import torch

from training.splicing import splice


def draw_tokens(count=12, positions=16, codes=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 5, (count, positions, codes), generator=generator)


def is_joined(joined, first, second):
    """Whether `joined` is the first picture's tokens up to some position, then the second's."""
    seams = range(len(joined) + 1)
    return any(torch.equal(joined, torch.cat([first[:seam], second[seam:]])) for seam in seams)


def test_a_splice_is_one_picture_up_to_a_seam_and_another_behind_it():
    torch.manual_seed(0)
    image_tokens = draw_tokens()
    spliced, is_negative = splice(image_tokens)
    assert is_negative.all()
    own_first = 0
    for number, (own, joined) in enumerate(zip(image_tokens, spliced, strict=True)):
        others = [each for index, each in enumerate(image_tokens) if index != number]
        assert not torch.equal(joined, own)
        begins = any(is_joined(joined, own, other) for other in others)
        assert begins or any(is_joined(joined, other, own) for other in others)
        own_first += begins
    assert 0 < own_first < len(image_tokens)  # both ways round


def test_the_tokens_given_are_left_as_they_were():
    image_tokens = draw_tokens()
    copy = image_tokens.clone()
    splice(image_tokens)
    assert torch.equal(image_tokens, copy)


def test_what_joins_equal_pictures_is_no_negative():
    torch.manual_seed(0)
    image_tokens = draw_tokens(1).expand(4, -1, -1)
    spliced, is_negative = splice(image_tokens)
    assert torch.equal(spliced, image_tokens)
    assert not is_negative.any()


def test_near_pictures_are_joined_more_often_than_others():
    torch.manual_seed(0)
    far = draw_tokens(20)
    twin = far[0].clone()
    twin[5:9] = 4 - twin[5:9]  # differs from the first in a few positions only
    image_tokens = torch.cat([far, twin[None]])
    from_twin = 0
    for _ in range(100):
        spliced, _ = splice(image_tokens)
        changed = (spliced[0] != far[0]).any(dim=1)
        from_twin += bool(changed.any()) and not changed[:5].any() and not changed[9:].any()
    assert 35 < from_twin < 75  # half of the time, and by chance
