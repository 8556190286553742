"""training.engine.optimizer: Muon, the split between it and AdamW, and the schedule."""

import copy

import pytest
import torch
from torch import nn

from training.engine.optimizer import (
    ModelOptimizers,
    Muon,
    learning_rate_share,
    muon_update_elements,
    orthogonalise,
)


class Model(nn.Module):
    """An embedding, a hidden matrix with bias, a convolution, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.convolution = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 10)

    def muon_parameters(self):
        return [self.hidden.weight, self.convolution.weight]


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (1, 32, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = matrices.clone()
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert torch.equal(matrices, before), "the gradient itself must not be changed"


def test_orthogonalising_a_batch_is_orthogonalising_each():
    matrices = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone)


def test_many_equal_matrices_are_orthogonalised_a_few_at_a_time(monkeypatch):
    def stepped():
        parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(5)]
        for seed, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(seed)
            parameter.grad = torch.randn(4, 6, generator=generator)
        Muon(parameters, learning_rate=0.1).step()
        return torch.stack(parameters)

    together, needed = stepped(), muon_update_elements([torch.empty(4, 6)] * 5)
    numbers = []

    def noted(matrices):
        numbers.append(len(matrices))
        return orthogonalise(matrices)

    monkeypatch.setattr("training.engine.optimizer.TOGETHER_ELEMENTS", 2 * 4 * 6)
    monkeypatch.setattr("training.engine.optimizer.orthogonalise", noted)
    torch.testing.assert_close(stepped(), together)
    assert numbers == [2, 2, 1]
    assert muon_update_elements([torch.empty(4, 6)] * 5) < needed


def test_a_zero_gradient_moves_nothing():
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], learning_rate=0.1).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 4))


def test_muon_agrees_with_torchs_own_within_its_bfloat16():
    ours, theirs = (nn.Parameter(torch.ones(8, 16)) for _ in range(2))
    muon = Muon([ours], learning_rate=0.1, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"matrices only, got shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))], learning_rate=0.1)


def test_every_parameter_belongs_to_exactly_one_optimizer():
    model = Model()
    pair = ModelOptimizers(model, learning_rate=0.1, muon_learning_rate=0.1)
    muon, adam = pair.optimizers
    groups = [p for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, groups)) == sorted(map(id, model.parameters()))
    assert {id(p) for p in muon.param_groups[0]["params"]} == set(map(id, model.muon_parameters()))


@pytest.mark.parametrize(("model", "muon_learning_rate"), [(Model(), 0.0), (nn.Linear(3, 3), 0.1)])
def test_without_muon_everything_is_adamws(model, muon_learning_rate):
    pair = ModelOptimizers(model, learning_rate=0.1, muon_learning_rate=muon_learning_rate)
    assert [type(optimizer) for optimizer in pair.optimizers] == [torch.optim.AdamW]


def test_gains_and_biases_are_not_decayed():
    model = Model()
    pair = ModelOptimizers(model, learning_rate=0.1, weight_decay=0.5)
    for group in pair.optimizers[0].param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_frozen_weights_are_nobodys():
    model = Model()
    model.hidden.requires_grad_(False)
    pair = ModelOptimizers(model, learning_rate=0.1, muon_learning_rate=0.1)
    (group,) = pair.optimizers[0].param_groups
    assert len(group["params"]) == 1


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    shares = [learning_rate_share(step, step / 100, warmup_steps=10) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(0.91)
    assert shares.index(max(shares)) == 9
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[100] == 0


def test_the_schedule_keeps_the_ratio_of_both_learning_rates():
    pair = ModelOptimizers(Model(), learning_rate=0.01, muon_learning_rate=0.2)
    assert pair.schedule(step=0, progress=0.75) == 0.25
    assert [o.param_groups[0]["lr"] for o in pair.optimizers] == [0.05, 0.0025]


def test_a_pair_goes_on_where_its_state_was_saved():
    settings = {"learning_rate": 0.01, "muon_learning_rate": 0.02, "weight_decay": 0.1}
    first = Model()
    second = Model()
    pair = ModelOptimizers(first, **settings)
    for seed in range(2):
        give_gradients(first, seed)
        for optimizer in pair.optimizers:
            optimizer.step()
    second.load_state_dict(first.state_dict())
    resumed = ModelOptimizers(second, **settings)
    resumed.load_state_dict(copy.deepcopy(pair.state_dict()))
    for model, optimizers in ((first, pair), (second, resumed)):
        give_gradients(model, seed=9)
        for optimizer in optimizers.optimizers:
            optimizer.step()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
