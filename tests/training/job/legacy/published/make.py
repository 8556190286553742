"""Makes the fixtures beside this file by the true DALLE-pytorch of each version.

With the packages in folders of their own, for a moment (torch 2.10 on a CPU made those here):

    uv venv reference && . reference/bin/activate
    uv pip install torch==2.10.0 einops omegaconf tqdm requests pillow packaging numpy pyyaml \\
        safetensors setuptools\\<81
    uv pip install --no-deps --target old/shared axial_positional_embedding==0.2.1 \\
        rotary-embedding-torch==0.1.1
    for v in 0.1.19 0.2.8 …; do uv pip install --no-deps --target old/$v dalle-pytorch==$v; done
    python tests/training/job/legacy/published/make.py old

The versions are those of CASES. Modules that are imported but not used here (DALL-E, taming,
g_mlp_pytorch and others) are replaced; DeepSpeed's sparse attention, which needs a GPU of 2020, is
replaced by the same sums in dense matrices. Weights are those of `seeded_weights`; a fixture holds
their names and shapes, the buffers, two captions, two images and what the old code makes of them.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
seeded_weights = importlib.import_module("seeded_weights").seeded_weights

T, GRID, V, VOCABULARY = 16, 8, 24, 30
N = GRID * GRID
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
VAE = {"image_size": 32, "num_layers": 2, "num_tokens": V, "codebook_dim": 6, "hidden_dim": 6}
LEAST_MARGIN = 5e-5  # between the best and the second logit, so that every machine agrees
BUFFERS = ("pos_emb", "master_layout")  # those that are not made of the sizes alone

PLAIN = {"rotary_emb": False, "shift_tokens": False}
ALL = {"rotary_emb": True, "shift_tokens": True, "stable": True, "sandwich_norm": True}
FOUR = ["full", "axial_row", "axial_col", "conv_like"]


def case(version: str, *kinds: str, mask: bool = False, **settings: Any) -> dict[str, Any]:
    settings = {"attn_types": list(kinds) or ["full"], **settings}
    return {"version": version, "mask": mask, "settings": settings}


CASES: dict[str, dict[str, Any]] = {
    # Up to 0.1.26 the grid of positions had the image's side.
    "0.1.19-full": case("0.1.19"),
    "0.1.19-reversible": case("0.1.19", reversible=True, mask=True),
    "0.2.8-axial": case("0.2.8", "axial_row", "axial_col", mask=True),
    "0.3.5-four": case("0.3.5", *FOUR, depth=4, mask=True),
    "0.5.1-scale-norm": case("0.5.1", "full", "axial_row", mask=True),
    "0.6.0-rms-norm": case("0.6.0", "axial_col", "full", mask=True, reversible=True),
    "0.7.1-four": case("0.7.1", *FOUR, depth=4, mask=True),
    "0.7.1-no-mask": case("0.7.1", *FOUR, depth=4),
    "0.7.2-head-width": case("0.7.2", *FOUR, depth=4, mask=True, heads=3, dim_head=24),
    "0.8.3-four": case("0.8.3", *FOUR, depth=4, mask=True),
    "0.8.3-reversible": case("0.8.3", "conv_like", "full", mask=True, reversible=True),
    "0.8.3-sparse": case("0.8.3", "sparse", "full", "sparse", depth=3, mask=True),
    "0.9.0-four": case("0.9.0", *FOUR, depth=4),
    "0.9.0-sparse": case("0.9.0", "full", "sparse"),
    "0.12.1-stable": case("0.12.1", "axial_row", "full", stable=True),
    "0.12.1-plain": case("0.12.1", "conv_like", "axial_col"),
    "1.0.3-shift": case("1.0.3", "axial_row", "full", shift_tokens=True),
    "1.0.3-rotary": case("1.0.3", rotary_emb=True, stable=True, shift_tokens=True),
    "1.1.6-plain": case("1.1.6", *FOUR, depth=4, **PLAIN),
    "1.1.6-shift": case("1.1.6", *FOUR, depth=4, **PLAIN | {"shift_tokens": True}),
    "1.1.6-rotary": case("1.1.6", *FOUR, depth=4, **PLAIN | {"rotary_emb": True}),
    "1.1.6-reversible": case("1.1.6", "conv_like", "full", **PLAIN, reversible=True),
    # Later versions call it with arguments that it has not.
    "1.1.6-sparse": case("1.1.6", "axial_col", "sparse", "sparse", depth=3, **PLAIN),
    "1.4.2-all": case("1.4.2", *FOUR, depth=4, **ALL),
    "1.4.2-plain": case("1.4.2", "conv_like", "axial_row", **PLAIN),
    "1.5.0-all": case("1.5.0", *FOUR, depth=4, **ALL),
    "1.5.0-conv": case("1.5.0", "conv_like", **PLAIN),
    "1.6.6-plain": case("1.6.6", *FOUR, depth=4, **PLAIN),
    "1.6.6-all": case("1.6.6", *FOUR, depth=4, **ALL),
    "1.6.6-reversible": case("1.6.6", *FOUR, depth=4, **ALL, reversible=True),
    "1.6.6-head-width": case("1.6.6", "full", "axial_row", **ALL, heads=3, dim_head=24),
    "1.6.6-shared": case(
        "1.6.6", *FOUR[:2], depth=4, **PLAIN, shared_attn_ids=[0, 1, 0, 1], shared_ff_ids=[0]
    ),
    "1.6.6-shared-embedding": case("1.6.6", **ALL, share_input_output_emb=True),
    "1.6.6-for-inference": case("1.6.6", *FOUR[:3], depth=3, **ALL, optimize_for_inference=True),
}


REPLACED = (
    *("DALL_E", "dall_e", "vector_quantize_pytorch", "taming", "taming.models"),
    *("taming.models.vqgan", "youtokentome", "pkg_resources", "dalle_pytorch.tokenizer"),
    *("dalle_pytorch.distributed_utils", "dalle_pytorch.deepspeed_utils"),
    *("deepspeed", "deepspeed.ops"),
)


class Layout:
    """DeepSpeed's VariableSparsityConfig as DALLE-pytorch calls it: blocks of 16, windows of 4."""

    def __init__(self, num_heads: int, block: int, num_random_blocks: int, **_: Any) -> None:
        self.num_heads, self.block, self.num_random = num_heads, block, num_random_blocks

    def make_layout(self, length: int) -> torch.Tensor:
        n = length // self.block
        rows, columns = np.indices((n, n))
        # The columns of the text: of the true package's first 16 blocks here only the first.
        seen = (rows // 4 == columns // 4) & (columns <= rows) | (columns == 0)
        random = np.random.RandomState(Layout.made)
        Layout.made += 1
        for row in range(n):
            seen[row, random.choice(n, self.num_random, replace=False)] = True
        return torch.from_numpy(np.repeat(seen[None].astype(np.int64), self.num_heads, 0))

    made = 0


class DenseSparseAttention(torch.nn.Module):
    """DeepSpeed's SparseSelfAttention in dense matrices, its cache of layouts by length included.

    Windows of 4 blocks hide nothing in 5 blocks but for the row below; see `Layout`.
    """

    by_length: dict[int, torch.Tensor] = {}

    def __init__(self, sparsity_config: Layout, max_seq_length: int, **_: Any) -> None:
        super().__init__()
        self.block = sparsity_config.block
        self.register_buffer("master_layout", sparsity_config.make_layout(max_seq_length))

    def forward(self, q: Any, k: Any, v: Any, attn_mask: Any, key_padding_mask: Any) -> Any:
        length = q.shape[2]
        layout = self.by_length.setdefault(length, self.master_layout)
        n = length // self.block
        seen = layout[:, :n, :n].repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores + attn_mask + key_padding_mask.to(q.dtype)[:, None, None]
        return scores.masked_fill(seen == 0, -torch.inf).softmax(dim=-1) @ v


def replace_modules() -> None:
    for name in REPLACED:
        sys.modules[name] = MagicMock()
    sys.modules["dalle_pytorch.distributed_utils"].is_distributed = False  # type: ignore[attr-defined]
    sparse: Any = ModuleType("deepspeed.ops.sparse_attention")
    sparse.SparseSelfAttention, sparse.VariableSparsityConfig = DenseSparseAttention, Layout
    sys.modules["deepspeed.ops.sparse_attention"] = sparse
    gmlp: Any = ModuleType("g_mlp_pytorch")
    gmlp.gMLPBlock = torch.nn.Module
    sys.modules["g_mlp_pytorch"] = gmlp


def build(settings: dict[str, Any], version: str) -> Any:
    package = importlib.import_module("dalle_pytorch.dalle_pytorch")
    vae = package.DiscreteVAE(**VAE, num_resnet_blocks=0)
    sizes = {"num_text_tokens": VOCABULARY, "text_seq_len": T}
    return package.DALLE(vae=vae, **SIZES | sizes | settings).eval().requires_grad_(False)


def seed(model: Any) -> dict[str, Any]:
    """Fill a model and return what rebuilds its state: shapes, aliases of shared weights."""
    state = model.state_dict()
    owner: dict[int, str] = {}
    aliases = {}
    shapes = {}
    for name, value in state.items():
        if value.dtype != torch.float32 or name.rpartition(".")[2] in BUFFERS:
            continue
        # A shared embedding is a part of a larger matrix, which has its address or not.
        first = owner.setdefault(value.data_ptr(), name)
        if first == name:
            shapes[name] = [*value.shape]
        else:
            aliases[name] = first
    with torch.no_grad():
        for name, value in seeded_weights(shapes).items():
            state[name].copy_(value)
    return {"shapes": shapes, "aliases": aliases}


def greedy(model: Any, text: torch.Tensor, options: dict[str, Any], cached: bool) -> Any:
    """Take the likeliest token of each position; return the tokens and the least margin."""
    tokens = torch.zeros(len(text), 0, dtype=torch.int64)
    margin = float("inf")
    cache: dict[str, Any] = {}
    for _ in range(N):
        extra = options | ({"cache": cache} if cached else {})
        logits = model(text.clone(), tokens, **extra)[:, -1, -V:]
        best = logits.topk(2, dim=1).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
        tokens = torch.cat([tokens, logits.argmax(dim=1, keepdim=True)], dim=1)
    return tokens, margin


def make(name: str) -> None:
    version, settings = CASES[name]["version"], CASES[name]["settings"]
    torch.manual_seed(0)
    DenseSparseAttention.by_length, Layout.made = {}, 0
    model = build(settings, version)
    rebuilt = seed(model)
    random = np.random.RandomState(7)
    text = torch.from_numpy(random.randint(1, VOCABULARY, (2, T)))
    text[0, 13:] = 0
    text[1, 4:] = 0
    image = torch.from_numpy(random.randint(0, V, (2, N)))
    options = {"mask": text != 0} if CASES[name]["mask"] else {}
    logits = model(text.clone(), image, **options)
    tokens, margin = greedy(model, text, options, cached=False)
    # The old cache gives all layers that are not full one entry: it is right for one of them.
    depth, kinds = settings.get("depth", SIZES["depth"]), settings["attn_types"]
    num_sparse = sum(kinds[layer % len(kinds)] != "full" for layer in range(depth))
    is_cached = settings.get("optimize_for_inference") or num_sparse <= 1
    if version in ("1.4.2", "1.5.0", "1.6.6") and is_cached:
        assert torch.equal(tokens, greedy(model, text, options, cached=True)[0])
    spread = float(logits[:, T:, -V:].std())
    print(f"{name}: margin {margin:.1e}, {len(tokens.unique())} codes, logits {spread:.2f}")
    assert margin > LEAST_MARGIN
    buffers = {
        f"buffer.{each}": value.clone()
        for each, value in model.state_dict().items()
        if each.rpartition(".")[2] in BUFFERS
    }
    tensors = {
        "text": text,
        "image": image,
        "text_logits": logits[:, :T, :-V].clone(),
        "image_logits": logits[:, T:, -V:].clone(),
        "greedy": tokens,
        **buffers,
    }
    save_file(tensors, HERE / f"{name}.safetensors", {"content": json.dumps(rebuilt | CASES[name])})
    if name in ("1.6.6-plain", "0.7.1-four"):
        save_original(model, name, version)


def save_original(model: Any, name: str, version: str) -> None:
    """Write the file that train_dalle.py of the version writes."""
    settings = SIZES | CASES[name]["settings"]
    hparams = {"num_text_tokens": VOCABULARY, "text_seq_len": T, "reversible": False, **settings}
    content: dict[str, Any] = {"hparams": hparams, "vae_params": VAE | {"num_resnet_blocks": 0}}
    if version == "1.6.6":
        content |= {"epoch": 1, "version": version, "vae_class_name": "DiscreteVAE"}
        content |= {"opt_state": {}, "scheduler_state": None}
    torch.save(content | {"weights": model.state_dict()}, HERE / f"{name}.pt")


def main() -> None:
    if len(sys.argv) == 2:
        for version in dict.fromkeys(each["version"] for each in CASES.values()):
            subprocess.run([sys.executable, __file__, sys.argv[1], version], check=True)
        return
    old, version = Path(sys.argv[1]), sys.argv[2]
    sys.path[:0] = [str(old / version), str(old / "shared")]
    torch.set_num_threads(1)
    replace_modules()
    for name, each in CASES.items():
        if each["version"] == version:
            make(name)


if __name__ == "__main__":
    main()
