"""training.engine: precision, clipping and the choice of the device."""

import logging

import pytest
import torch
from torch import nn

from dalle.errors import DeviceError, HyperparameterError
from training.config.hyperparameters import parse
from training.engine import devices
from training.engine.devices import choose_device
from training.engine.torch_engine import TorchEngine

CPU = torch.device("cpu")


class Stage:
    """A model whose loss is the sum of its outputs, to be made small."""

    def __init__(self, model):
        self.model = model

    def loss(self, batch, progress):
        outputs = self.model(batch)
        return outputs.sum(), {"outputs": outputs}


def make_engine(model, **raw):
    return TorchEngine(Stage(model), parse(raw).dvae, CPU)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(HyperparameterError, match="on this CPU it must be fp32 or bf16"):
        make_engine(nn.Linear(2, 2), precision="fp16")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_forward_pass_has_the_precision_asked_for(precision, dtype):
    _, reported = make_engine(nn.Linear(2, 2), precision=precision).loss(torch.ones(1, 2), 0.0)
    assert reported["outputs"].dtype == dtype


@pytest.mark.parametrize(("clipping", "norm"), [("0", 30.0), ("2", 2.0), ("100", 30.0)])
def test_gradients_are_clipped_to_the_norm_allowed(clipping, norm):
    model = nn.Linear(1, 1, bias=False)
    engine = make_engine(model, gradient_clipping=clipping)
    engine.backward(30 * model.weight.sum())
    seen = []
    engine._optimizers.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(model.weight.grad.norm().item())
    )
    engine.step(0, 0.0)
    assert seen == pytest.approx([norm])
    before = engine.gradient_norm
    assert before is None if clipping == "0" else before.item() == pytest.approx(30.0)


def test_gradients_are_forgotten_after_a_step():
    model = nn.Linear(2, 2)
    engine = make_engine(model)
    engine.backward(model(torch.ones(1, 2)).sum())
    engine.step(0, 0.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_lowers_the_loss_and_returns_the_schedules_share():
    model = nn.Linear(2, 1)
    engine = make_engine(model, warmup_steps="4")
    before = model(torch.ones(1, 2)).square()
    engine.backward(before)
    assert engine.step(1, 0.5) == 0.25
    assert model(torch.ones(1, 2)).square() < before


def test_the_cpu_is_chosen_with_its_reason_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_device("cpu") == CPU
    assert "training on the CPU" in caplog.text
    assert "DALLE_DEVICE=cpu" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_or_the_cpu(caplog):
    with pytest.raises(DeviceError, match=r"DALLE_DEVICE=cuda, but torch .+; choose a GPU"):
        choose_device("cuda")
    with caplog.at_level(logging.INFO):
        assert choose_device("auto") == CPU
    assert "torch" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_on_a_gpu(precision):
    device = choose_device("cuda")
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    stage = Stage(model)
    stage.loss = lambda x, progress: ((model(x) - x.sum(1, keepdim=True)).square().mean(), {})
    engine = TorchEngine(stage, parse({"precision": precision, "warmup_steps": "0"}).dvae, device)
    x = torch.randn(64, 8, device=device)
    losses = []
    for step in range(200):  # after half of them the loss of some starts has not halved
        loss, _ = engine.loss(x, 0.0)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(step, 0.0)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("precision", "device", "bf16", "amx", "emulated"),
    [
        ("bf16", "cpu", False, False, True),
        ("bf16", "cpu", True, False, False),
        ("bf16", "cpu", False, True, False),
        ("fp32", "cpu", False, False, False),
        ("bf16", "cuda", False, False, False),
    ],
)
def test_bf16_is_emulated_on_a_cpu_without_instructions_for_it(
    monkeypatch, precision, device, bf16, amx, emulated
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert devices.is_emulated(precision, torch.device(device)) is emulated
