"""Work of each rank in test_deepspeed.py, which is a fork."""

import importlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dalle.models.transformer import Dalle, TransformerConfig
from training.config.hyperparameters import parse
from training.distributed.process_group import SINGLE_PROCESS, TorchProcessGroup
from training.engine.select import select_engine

CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    text_vocab_size=11,
    text_length=5,
    grid_size=3,
    codebook_size=7,
    num_codebooks=2,
    width=24,  # so that some parameters cannot be halved evenly
    num_layers=2,
    num_heads=3,
    layer_scale=0.5,
)
NUM_PAIRS, NUM_STEPS = 8, 4
COMMON = {
    "batch_size": str(NUM_PAIRS),
    "learning_rate": "0.01",
    "muon_learning_rate": "0",
    "warmup_steps": "2",
    "gradient_clipping": "0.5",
    "weight_decay": "1",
    "ema_decay": "0",
}
ZERO = {number: {"engine": "deepspeed", "zero_stage": str(number)} for number in range(4)}
SMALLER = {"gradient_accumulation_steps": "2", "activation_checkpointing": "true"}
OFFLOADED = {"offload_optimizer": "true"}
AVERAGED = {"ema_decay": "0.9"}
BF16 = {"precision": "bf16"}

CASES = {
    **{f"zero {number}": ZERO[number] for number in (0, 1, 3)},
    "zero 2 offloaded, in parts, averaged": ZERO[2] | OFFLOADED | SMALLER | AVERAGED,
    "zero 3 offloaded, in parts, averaged": ZERO[3]
    | OFFLOADED
    | SMALLER
    | AVERAGED
    | {"offload_parameters": "true"},
    "zero 2 bf16": ZERO[2] | BF16,
    "zero 1 bf16 in parts": ZERO[1] | BF16 | SMALLER,
    "zero 3 bf16 in parts, averaged": ZERO[3] | BF16 | SMALLER | AVERAGED,
}
RESUMED = [name for name in CASES if "averaged" in name or "in parts" in name or name == "zero 1"]


class Stage:
    """The transformer on pairs that its batches bring along."""

    name = "transformer"

    def __init__(self, settings, ranks):
        torch.manual_seed(3)
        self.model = Dalle(CONFIG)
        self.model.checkpoints_activations = settings.activation_checkpointing
        self.ranks = ranks

    def loss(self, batch, progress):
        text_tokens, image_tokens, step_text_tokens = batch
        loss = self.model.loss(
            text_tokens, image_tokens, self.ranks, step_text_tokens=step_text_tokens
        )
        return loss.total, {"image_loss": loss.image.detach()}


def parts_of(step, ranks, num_parts):
    """A rank's share of the pairs of a step, in parts: always the same ones, in another order.

    Captions differ in length.
    """
    generator = torch.Generator().manual_seed(100)
    text_tokens = torch.randint(1, CONFIG.text_vocab_size, (NUM_PAIRS, 5), generator=generator)
    lengths = torch.randint(1, 6, (NUM_PAIRS, 1), generator=generator)
    text_tokens[torch.arange(5)[None] >= lengths] = 0
    image_tokens = torch.randint(CONFIG.codebook_size, (NUM_PAIRS, 9, 2), generator=generator)
    order = torch.randperm(NUM_PAIRS, generator=torch.Generator().manual_seed(step))
    text_tokens, image_tokens = (
        t[order].chunk(ranks.size)[ranks.rank] for t in (text_tokens, image_tokens)
    )
    chunks = zip(text_tokens.chunk(num_parts), image_tokens.chunk(num_parts), strict=True)
    return [(text, image, text_tokens) for text, image in chunks]


class Run:
    """An engine and the results of its steps."""

    def __init__(self, raw, ranks=SINGLE_PROCESS, state=None):
        hyperparameters = parse(COMMON | raw)
        self.settings = hyperparameters.transformer
        self.ranks = ranks
        self.stage = Stage(self.settings, ranks)
        self.engine = select_engine(self.stage, "transformer", hyperparameters, CPU, ranks)
        self.engine.begin(state)
        self.losses = []
        self.norms = []

    def train(self, first=0, last=NUM_STEPS):
        for step in range(first, last):
            losses = []
            parts = parts_of(step, self.ranks, self.settings.gradient_accumulation_steps)
            for part in parts:
                loss, _ = self.engine.loss(part, step / NUM_STEPS)
                losses.append(loss.detach())
                self.engine.backward(loss)
            self.engine.step(step, step / NUM_STEPS)
            mean = self.ranks.means({"loss": torch.stack(losses).float().mean()})["loss"]
            self.losses.append(mean.item())
            self.norms.append(self.engine.gradient_norm.item())
        return self

    def validated(self):
        """A loss between two steps, by the stage's model, and its weights."""
        with torch.no_grad(), self.engine.whole_model():
            model = self.stage.model.eval()
            total = model.loss(*parts_of(0, SINGLE_PROCESS, 1)[0][:2]).total
            return total.item()

    def finished(self):
        self.engine.finish()
        return {name: value.clone() for name, value in self.stage.model.state_dict().items()}


def outcome(name, ranks):
    """Half of the steps, a validation, a checkpoint, and the rest; perhaps again from there."""
    half = NUM_STEPS // 2
    run = Run(CASES[name], ranks).train(last=half)
    validated = run.validated()
    state = run.engine.state()
    # As a checkpoint on a disk would be, which the steps to come do not change.
    kept = clone(state) if ranks.is_first else None
    run.train(half)
    seen = {
        "losses": run.losses,
        "norms": run.norms,
        "validated": validated,
        "weights": run.finished(),
    }
    if name in RESUMED:
        again = Run(CASES[name], ranks, state=clone(kept)).train(half)
        seen["resumed losses"] = again.losses
        seen["resumed weights"] = again.finished()
    return seen | {"state": kept}


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone(each) for key, each in value.items()}
    if isinstance(value, list):
        return [clone(each) for each in value]
    return value


def work(rank, port):
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, wait_for_workers=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    ranks = TorchProcessGroup()
    seen = {name: outcome(name, ranks) for name in CASES}
    # A checkpoint of ZeRO 1 is gone on from by ZeRO 3.
    again = Run(ZERO[3], ranks, state=seen["zero 1"]["state"])
    seen["from zero 1 to 3"] = again.train(NUM_STEPS // 2).losses
    return seen


def work_into(rank, port, results, printed):
    """Main function of a fork. printed: a file for its standard output alone."""
    assert "deepspeed" not in sys.modules, "it was imported where there is a compiler"
    with printed.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    torch.save(work(rank, port), results)


def imports_deepspeed():
    """Main function of a fork: 1 where the modules that may use it import it at once."""
    for module in ("engine.select", "engine.deepspeed_engine", "job.trainer"):
        importlib.import_module(f"training.{module}")
    return int("deepspeed" in sys.modules)
