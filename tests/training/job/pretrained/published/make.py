"""Makes the fixtures beside this file by the packages that published the image tokenizers.

In an environment of its own, for a moment (the fixtures here are of torch 2.10 on a CPU):

    uv venv reference && . reference/bin/activate
    uv pip install torch==2.10.0 einops omegaconf attrs axial-positional-embedding \\
        rotary-embedding-torch g-mlp-pytorch ftfy regex tqdm requests pillow packaging numpy \\
        safetensors setuptools\\<81
    uv pip install --no-deps dalle-pytorch==1.6.6 DALL-E==0.1 taming-transformers-rom1504==0.0.6
    python tests/training/job/pretrained/published/make.py VQ_MODEL

VQ_MODEL is tokenizer/tokenizer_image/vq_model.py of github.com/FoundationVision/LlamaGen. Modules
that are imported but not used here (pytorch_lightning, huggingface_hub, youtokentome and others)
are replaced. The weights are those of `seeded_weights`; the files hold their names and shapes, two
images, their tokens, other tokens and their pixels in [0, 1].
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

seeded_weights = importlib.import_module("seeded_weights").seeded_weights

IMAGES, V = 2, 24
LEAST_MARGIN = 1e-4  # between the best and the second logit, so that every machine agrees


def replace_modules() -> None:
    lightning = ModuleType("pytorch_lightning")
    lightning.LightningModule = torch.nn.Module  # type: ignore[attr-defined]
    main = ModuleType("taming.main")
    main.instantiate_from_config = lambda config: torch.nn.Identity()  # type: ignore[attr-defined]
    sys.modules |= {"pytorch_lightning": lightning, "taming.main": main}
    hub: Any = ModuleType("huggingface_hub")
    hub.PyTorchModelHubMixin = type("PyTorchModelHubMixin", (), {})
    sys.modules["huggingface_hub"] = hub
    for name in ("youtokentome", "dalle_pytorch.tokenizer", "dalle_pytorch.distributed_utils"):
        sys.modules[name] = MagicMock()
    sys.modules["dalle_pytorch.distributed_utils"].is_distributed = False  # type: ignore[attr-defined]


def seed(model: torch.nn.Module) -> dict[str, list[int]]:
    shapes = {name: [*value.shape] for name, value in model.state_dict().items()}
    model.load_state_dict(seeded_weights(shapes))
    model.eval().requires_grad_(False)
    return shapes


def pictures(size: int) -> torch.Tensor:
    """Random images uint8: squares of 8 pixels in strong colours, with noise."""
    torch.manual_seed(size)
    squares = (torch.rand(IMAGES, 3, size // 8, size // 8) > 0.5).float()
    images = 0.8 * F.interpolate(squares, size=(size, size)) + 0.2 * torch.rand(
        IMAGES, 3, size, size
    )
    return (images * 255).round().to(torch.uint8)


def check(logits: torch.Tensor) -> torch.Tensor:
    """logits [B, V, positions] -> tokens [B, positions]. Ends where a machine could disagree."""
    best = logits.topk(2, dim=1).values
    margin = float((best[:, 0] - best[:, 1]).min())
    tokens = logits.argmax(dim=1)
    print(f"   margin {margin:.2g}, {len(tokens.unique())} codes used")
    assert margin > LEAST_MARGIN
    assert len(tokens.unique()) > 3
    return tokens


def write(name: str, shapes: object, images: torch.Tensor, logits: Any, decode: Any) -> None:
    print(name)
    tokens = check(logits.flatten(2))
    codes = torch.randint(V, tokens.shape)
    pixels = decode(codes)
    print(f"   pixels {pixels.mean():.3f} +- {pixels.std():.3f}")
    tensors = {"images": images, "tokens": tokens, "codes": codes, "pixels": pixels.contiguous()}
    save_file(tensors, HERE / f"{name}.safetensors", {"shapes": json.dumps(shapes)})


def make_dalle_pytorch(name: str, **sizes: int) -> None:
    package = importlib.import_module("dalle_pytorch.dalle_pytorch")
    vae = package.DiscreteVAE(num_tokens=V, **sizes)
    shapes, images = seed(vae), pictures(sizes["image_size"])
    logits = vae(images / 255, return_logits=True)
    assert torch.equal(logits.argmax(1).flatten(1), vae.get_codebook_indices(images / 255))
    write(name, shapes, images, logits, lambda codes: ((vae.decode(codes) + 1) / 2).clamp(0, 1))


def make_openai() -> None:
    importlib.import_module("attr").set_run_validators(False)  # they want 64 channels and 512 codes
    package = importlib.import_module("dall_e")
    encoder = package.Encoder(n_hid=4, vocab_size=V)
    decoder = package.Decoder(n_hid=4, n_init=8, vocab_size=V)
    shapes = {"encoder": seed(encoder), "decoder": seed(decoder)}
    images = pictures(32)
    logits = encoder(package.map_pixels(images / 255))
    bias = encoder.blocks.output.conv.b
    bias -= logits.mean(dim=(0, 2, 3))  # else one code wins everywhere
    torch.save(encoder, HERE / "encoder.pkl")
    torch.save(decoder, HERE / "decoder.pkl")

    def decode(codes: torch.Tensor) -> torch.Tensor:
        hot = F.one_hot(codes.view(-1, 4, 4), V).permute(0, 3, 1, 2).float()
        pixels: torch.Tensor = package.unmap_pixels(torch.sigmoid(decoder(hot)[:, :3]))
        return pixels

    write("openai", shapes, images, encoder(package.map_pixels(images / 255)), decode)


def make_taming(name: str, *, size: int, embed_dim: int, **sizes: Any) -> None:
    package = importlib.import_module("taming.models.vqgan")
    ddconfig = {"in_channels": 3, "out_ch": 3, "double_z": False, "dropout": 0.0, **sizes}
    if name == "gumbel":
        model = package.GumbelVQ(ddconfig, {}, V, embed_dim, {}, kl_weight=1e-8)
    else:
        model = package.VQModel(ddconfig, {}, V, embed_dim)
    shapes, images = seed(model), pictures(size)
    x = 2 * (images / 255) - 1
    latents = model.quant_conv(model.encoder(x))
    grid_size = latents.shape[-1]
    if name == "gumbel":
        logits, codebook = model.quantize.proj(latents), model.quantize.embed.weight
    else:
        codebook = model.quantize.embedding.weight
        vectors = latents.flatten(2).transpose(1, 2)  # [B, N, D]
        logits = -torch.cdist(vectors, codebook).square().transpose(1, 2)
        tokens = model.encode(x)[2][2].view(IMAGES, -1)
        assert torch.equal(logits.argmax(dim=1), tokens)

    def decode(codes: torch.Tensor) -> torch.Tensor:
        z = codebook[codes].transpose(1, 2).reshape(IMAGES, -1, grid_size, grid_size).contiguous()
        pixels: torch.Tensor = (model.decode(z).clamp(-1, 1) + 1) * 0.5
        return pixels

    write(name, {"weights": shapes, "ddconfig": ddconfig}, images, logits, decode)


def make_llamagen(source: Path, name: str, *, size: int) -> None:
    spec = importlib.util.spec_from_file_location("vq_model", source)
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["vq_model"] = package
    spec.loader.exec_module(package)
    multipliers = {"vq_8": [1, 2, 2, 4], "vq_16": [1, 1, 2, 2, 4]}[name]
    model = package.VQModel(package.ModelArgs(codebook_size=V, z_channels=16))
    model.encoder = package.Encoder(ch=32, ch_mult=multipliers, z_channels=16)
    model.decoder = package.Decoder(ch=32, ch_mult=multipliers, z_channels=16)
    shapes, images = seed(model), pictures(size)
    x = 2 * (images / 255) - 1
    quant, _, (_, _, tokens) = model.encode(x)
    vectors = F.normalize(model.quant_conv(model.encoder(x)).flatten(2).transpose(1, 2), dim=-1)
    logits = (vectors @ F.normalize(model.quantize.embedding.weight, dim=-1).T).transpose(1, 2)
    assert torch.equal(logits.argmax(dim=1), tokens.view(IMAGES, -1))

    def decode(codes: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = model.decode_code(codes.flatten(), quant.shape)
        return (pixels.clamp(-1, 1) + 1) * 0.5

    write(name, shapes, images, logits, decode)


def main() -> None:
    torch.set_num_threads(1)
    replace_modules()
    sizes = {"image_size": 32, "codebook_dim": 12, "num_layers": 2, "hidden_dim": 16}
    make_dalle_pytorch("vae", **sizes, num_resnet_blocks=2)
    make_dalle_pytorch("vae_without_blocks", **sizes, num_resnet_blocks=0)
    make_openai()
    net = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 16}
    # Pictures of half the size it was made for: attention stays at the level that it has there.
    make_taming("vqgan", size=32, embed_dim=8, resolution=64, attn_resolutions=[16], **net)
    make_taming("gumbel", size=32, embed_dim=16, resolution=32, attn_resolutions=[32, 8], **net)
    make_llamagen(Path(sys.argv[1]), "vq_8", size=32)
    make_llamagen(Path(sys.argv[1]), "vq_16", size=64)


if __name__ == "__main__":
    main()
