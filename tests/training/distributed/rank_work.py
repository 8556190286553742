"""Work of each rank in test_process_group.py."""

import torch
from torch import nn

from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DVAEConfig
from dalle.models.quantiser import build_quantiser

STATE = {
    "step": 7,
    "note": None,
    "moments": {0: {"exp_avg": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}},
    "pending": [{"loss": torch.tensor(0.5)}, {}],
    "shape": (2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "tokens": torch.tensor([[1, 2], [3, 4]]).T,
    "nothing": torch.empty(0),
}
CLIP = ClipConfig(
    embed_size=8,
    image_size=8,
    vision_layers=1,
    vision_width=64,
    patch_size=4,
    text_vocab_size=6,
    text_length=4,
    text_width=8,
    text_heads=2,
    text_layers=1,
)


def clip_batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(6, 3, 8, 8, generator=generator)
    # The first and the last caption are equal: positives of one another across ranks.
    captions = torch.tensor([[1, 2, 0], [2, 2, 0], [3, 1, 4], [4, 0, 0], [2, 4, 1], [1, 2, 0]])
    return images, captions


def clip_loss_and_gradients(ranks):
    torch.manual_seed(5)
    clip = Clip(CLIP)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = clip

        def forward(self, images, captions):
            return self.clip.loss(images, captions, ranks)

    images, captions = (each.chunk(ranks.size)[ranks.rank] for each in clip_batch())
    module = ranks.parallel(Loss())  # has the reduction, so it must outlive the backward pass
    loss = module(images, captions)
    torch.autograd.backward(loss.total)
    means = ranks.means({"total": loss.total, "accuracy": loss.accuracy})
    gradients = {name: p.grad.clone() for name, p in clip.named_parameters()}
    return means, gradients


def revived(kind, ranks):
    """A quantiser's parameters and buffers before and after half of its codes are restarted."""
    torch.manual_seed(7)
    sizes = {"width": 6, "num_codebooks": 2, "codebook_size": 8, "code_width": 4}
    weights = {"kl_weight": 0.1, "commitment_weight": 0.1}
    quantiser = build_quantiser(DVAEConfig(quantiser=kind, **sizes, **weights))
    quantiser.usage[:, 4:] = 0.0
    quantiser.steps.fill_(quantiser.RESTART_EVERY - 1)
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    torch.manual_seed(100 + ranks.rank)
    quantiser.train()([torch.randn(3, 6, 2, 2)] * 2, 0.1, ranks)
    return before, quantiser.state_dict()


def work(ranks):
    """The results of one of the two processes."""
    rank = ranks.rank
    own = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    rows = own.clone().requires_grad_()
    gathered = ranks.gather(rows)
    (gathered * torch.tensor([[1.0, 1.0], [10.0, 10.0]]) * (rank + 1)).sum().backward()
    copied = own.T.clone().T  # not contiguous
    ranks.copy_first([copied])
    return {
        "first": ranks.is_first,
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "total": ranks.total(own),
        "copied": copied,
        "agreed": ranks.agree(0.25 + rank, rank == 1, rank == 0),
        "any": [ranks.any(flag) for flag in (rank == 0, False)],
        "shared": ranks.share(STATE if rank == 0 else {"step": -1}),
        "nothing": ranks.share(None),
        "revived": {kind: revived(kind, ranks) for kind in ("gumbel", "vq")},
        "clip": clip_loss_and_gradients(ranks),
    }
