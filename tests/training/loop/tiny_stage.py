"""A stage of a handful of weights for the tests of the training loop."""

import threading

import torch
import torch.nn.functional as F
from torch import nn


class TinyModel(nn.Module):
    """Dropout makes its loss depend on the random state."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.dropout(self.hidden(x).relu()))

    def muon_parameters(self):
        return [self.hidden.weight]


class TinyBatches:
    num_per_epoch = 5

    def batch(self, step):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        return x, x.sum(1, keepdim=True)


class TinyStage:
    name = "dvae"

    def __init__(self, fingerprint="abc"):
        torch.manual_seed(11)
        self.model = TinyModel()
        self.batches = TinyBatches()
        self.fingerprint = fingerprint
        self.losses = {}
        self.progress = []
        self.validations = 0
        self.after_step = lambda step: None

    def loss(self, batch, progress):
        x, y = batch
        loss = F.mse_loss(self.model(x), y)
        self.losses[len(self.progress)] = loss.item()
        self.progress.append(progress)
        self.after_step(len(self.progress))
        return loss, {"squared": loss.detach() ** 2}

    def validate(self):
        assert not self.model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)  # must not disturb training
        self.validations += 1
        self.validated = [p.clone() for p in self.model.parameters()]
        return {"validation_loss": sum(p.square().sum().item() for p in self.validated)}

    def identity(self):
        return {"data": self.fingerprint}


def stopping_at(stage, step):
    """An event that is set while `step` is under way."""
    stop = threading.Event()
    stage.after_step = lambda now: stop.set() if now == step else None
    return stop


def weights(stage):
    return [parameter.detach() for parameter in stage.model.parameters()]


def are_equal(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
