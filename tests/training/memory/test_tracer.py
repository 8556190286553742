"""training.memory.tracer and training.memory.estimate, against steps that were really run."""

from dataclasses import replace

import pytest
import torch

from dalle.models.clip import ClipConfig
from dalle.models.dvae import DVAEConfig
from dalle.models.transformer import TransformerConfig
from training.config.hyperparameters import parse
from training.config.models import TextSizes, dvae_config, stage_config
from training.engine.devices import peak_bytes
from training.engine.optimizer import Muon, muon_update_elements
from training.engine.torch_engine import TorchEngine
from training.memory.auto_batch import Trial
from training.memory.estimate import Memory, Setting, StageMemory
from training.memory.passes import random_batch, synthetic_stage
from training.memory.tracer import trace_passes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DVAE = DVAEConfig(
    image_size=32, patch_size=4, num_downsamples=0, width=64, num_blocks=1, codebook_size=64
)
TRANSFORMER = TransformerConfig(
    text_vocab_size=200,
    text_length=16,
    grid_size=8,
    codebook_size=64,
    width=96,
    num_layers=3,
    num_heads=4,
    attention_kinds=("axial_row", "axial_col"),
    dropout=0.1,
)
CLIP = ClipConfig(
    embed_size=64,
    image_size=32,
    vision_layers=2,
    vision_width=128,
    patch_size=4,
    text_vocab_size=201,
    text_length=17,
    text_width=64,
    text_heads=2,
    text_layers=2,
)
CONFIGS = {"dvae": DVAE, "transformer": TRANSFORMER, "clip": CLIP}


def measured_peak(stage, config, batch_size, settings):
    """Bytes of torch's allocator at the fullest moment of a third step, by its own record."""
    torch.manual_seed(0)
    engine = TorchEngine(stage, settings, CPU)
    stage.model.train()

    def step(number):
        loss, _ = engine.loss(random_batch(config, batch_size, dvae=DVAE), 0.0)
        engine.backward(loss)
        engine.step(number, 0.0)

    step(0)
    step(1)
    models = [each for each in vars(stage).values() if isinstance(each, torch.nn.Module)]
    tensors = [each for model in models for each in (*model.parameters(), *model.buffers())]
    state = [
        value
        for optimizer in engine.optimizers
        for values in optimizer.state.values()
        for value in values.values()
    ]
    held = sum(each.numel() * each.element_size() for each in tensors + state)
    return held + peak_bytes(lambda: step(2), CPU)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("dvae", "fp32"), ("transformer", "fp32"), ("transformer", "bf16"), ("clip", "fp32")],
)
def test_the_plan_is_within_15_percent_of_what_a_step_was_measured_to_take(name, precision):
    config = CONFIGS[name]
    settings = parse({"precision": precision}).of(name)
    setting = Setting.of(parse({"precision": precision}), name, num_devices=1)
    memory = StageMemory(name, config, dvae=DVAE, device_type="cpu")
    for batch_size in (8, 24):
        planned = memory.at(setting, batch_size)
        stage = synthetic_stage(config, CPU, dvae=DVAE)
        measured = measured_peak(stage, config, batch_size, settings)
        assert planned.device - planned.runtime == pytest.approx(measured, rel=0.15), batch_size


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "checkpoints"), [(name, False) for name in CONFIGS] + [("transformer", True)]
)
def test_the_plan_is_within_15_percent_of_what_a_gpu_takes(name, checkpoints, precision):
    raw = {"size": "base", "precision": precision, f"{name}_batch_size": "32"}
    if checkpoints:
        raw["activation_checkpointing"] = "true"
    hyperparameters = parse(raw)
    dvae, text = dvae_config(hyperparameters), TextSizes(10_000, 64)
    config = stage_config(name, hyperparameters, text, dvae)
    device = torch.device("cuda")
    memory = StageMemory(name, config, dvae=dvae, device_type="cuda")
    planned = memory.at(Setting.of(hyperparameters, name, num_devices=1), 32)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert Trial(memory, hyperparameters.of(name), device)(32)
    measured = torch.cuda.max_memory_allocated() - held
    assert planned.device - planned.runtime == pytest.approx(measured, rel=0.15)


def trace(config, batch_sizes, checkpoints_activations=False, **changes):
    return trace_passes(
        lambda: synthetic_stage(
            config, CPU, dvae=DVAE, checkpoints_activations=checkpoints_activations
        ),
        lambda size: random_batch(config, size, dvae=DVAE),
        batch_sizes,
        **changes,
    )


def test_autocast_of_a_gpu_keeps_what_it_computes_in_fp32():
    bf16 = {"autocast": torch.bfloat16, "checkpoints_activations": True}
    for name in ("dvae", "transformer"):
        on_cpu = trace(CONFIGS[name], (2, 4), autocast=torch.bfloat16).activations(16)
        on_gpu = trace(CONFIGS[name], (2, 4), autocast=torch.bfloat16, is_for_gpu=True)
        assert on_gpu.activations(16) > 1.1 * on_cpu, name
    in_fp32 = trace(TRANSFORMER, (2, 4)).activations(16)
    assert trace(TRANSFORMER, (2, 4), is_for_gpu=True).activations(16) == in_fp32
    # What is computed a second time is computed in the same formats.
    computed_twice = trace(TRANSFORMER, (2, 4), is_for_gpu=True, **bf16).activations(16)
    assert computed_twice > trace(TRANSFORMER, (2, 4), **bf16).activations(16)


def test_a_batch_size_that_was_not_traced_is_predicted_to_the_byte():
    small, large = trace(TRANSFORMER, (2, 4)), trace(TRANSFORMER, (32, 48))
    for size in (2, 7, 32, 100):
        assert small.activations(size) == large.activations(size)
        assert small.with_gradients(size) == large.with_gradients(size)


def test_a_deep_model_is_predicted_from_shallow_ones():
    deep = replace(TRANSFORMER, num_layers=9)
    memory = StageMemory("transformer", deep, dvae=DVAE, device_type="cpu")
    setting = Setting(num_parts=2)  # without gradients in between
    assert memory.at(setting, 32).activations == trace(deep, (2, 4)).activations(32)


def test_checkpointing_keeps_little_of_each_layer():
    deep = replace(TRANSFORMER, num_layers=9)
    kept = trace(deep, (2, 4)).activations(16)
    assert trace(deep, (2, 4), checkpoints_activations=True).activations(16) < kept / 3


def test_muons_step_takes_no_more_than_reckoned():
    shapes = [(64, 64), (64, 64), (192, 64), (64, 256)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    muon = Muon(parameters, learning_rate=0.1)
    for each in parameters:
        each.grad = torch.randn_like(each)
    muon.step()
    most = peak_bytes(muon.step, CPU)
    assert most == pytest.approx(4 * muon_update_elements(parameters), rel=0.15)


@pytest.fixture(scope="module")
def memory():
    return StageMemory("transformer", TRANSFORMER, dvae=DVAE, device_type="cuda")


def with_zero(memory, stage, **changes) -> Memory:
    found: Memory = memory.at(
        Setting(engine="deepspeed", zero_stage=stage, num_devices=8, has_muon=False, **changes), 4
    )
    return found


def test_each_zero_stage_shares_out_one_thing_more(memory):
    zero0, zero1, zero2, zero3 = (with_zero(memory, stage) for stage in range(4))
    P = sum(each.numel() for each in memory._trained)
    assert zero0.optimiser == 8 * P
    assert zero1.optimiser == pytest.approx(12 * P / 8, abs=64)  # with the fp32 copy
    assert zero2.optimiser == zero1.optimiser
    assert (zero0.gradients, zero1.gradients) == (4 * P, 4 * P)
    assert zero2.gradients == pytest.approx(4 * P / 8, abs=64)
    assert zero2.weights == zero1.weights
    assert zero3.weights == pytest.approx(zero2.weights - 4 * P * 7 / 8, abs=64)


def test_offloading_moves_the_optimiser_to_the_host_and_nothing_else_away(memory):
    on_device = with_zero(memory, 2)
    offloaded = with_zero(memory, 2, offload_optimizer=True)
    assert offloaded.optimiser == 0
    assert offloaded.host >= on_device.optimiser
    assert offloaded.weights == on_device.weights
    everything = with_zero(memory, 3, offload_optimizer=True, offload_parameters=True)
    assert everything.weights < with_zero(memory, 3).weights


def test_more_memory_never_fits_fewer_pairs(memory):
    setting = Setting()
    sizes = [memory.largest_part(setting, n << 20, at_most=999) for n in (512, 1040, 1100, 2048)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert (
        memory.at(setting, sizes[2]).device <= 1100 << 20 < memory.at(setting, sizes[2] + 1).device
    )
