"""DALLE-pytorch 1.6.6 in a separate environment, for benchmarks. Standard library only.

The environment uses the torch of this one, so that both sides run the same kernels. Only the
benchmarks `inference.bench.peers` and `training.bench` import this module.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle.platform.threads import SPINS

PACKAGES = (
    "dalle-pytorch==1.6.6",
    "axial_positional_embedding==0.3.12",
    "einops==0.8.2",
    "g-mlp-pytorch==0.1.5",
    "omegaconf==2.4.0",
    "antlr4-python3-runtime==4.13.2",
    "rotary-embedding-torch==0.9.1",
)
_CONTAINER = Path(__file__).resolve().parent.parent


def make_environment(directory: Path) -> Path:
    """Install DALLE-pytorch and its dependencies except torch; return the environment's Python.

    Installs once. Needs a package index and `uv`, which `make setup` installs; exits without `uv`.
    """
    python = directory.resolve() / "bin" / "python"
    stamp = directory / "packages.txt"
    if stamp.is_file() and stamp.read_text() == "\n".join(PACKAGES):
        return python
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv is None:
        sys.exit("uv is missing; run make setup first")
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([uv, "venv", "--python", sys.executable, directory], check=True)  # noqa: S603
    install: list[str | Path] = [uv, "pip", "install", "--python", python, "--no-deps", *PACKAGES]
    subprocess.run(install, check=True)  # noqa: S603
    packages = next((directory / "lib").glob("python*/site-packages"))
    shared = [sysconfig.get_paths()["purelib"], str(_CONTAINER), str(_CONTAINER.parent)]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    stamp.write_text("\n".join(PACKAGES))
    return python


def run_inside(python: Path, module: str, arguments: Sequence[str]) -> int:
    """Run a module of this project in the environment; return its exit status."""
    environment = {"GOMP_SPINCOUNT": SPINS} | os.environ
    command = [str(python), "-m", module, *arguments]
    return subprocess.run(command, check=False, env=environment).returncode  # noqa: S603


def dalle_pytorch(
    *,
    width: int = 512,
    num_layers: int = 12,
    num_heads: int = 8,
    text_length: int = 64,
    grid_size: int = 32,
    text_vocab_size: int = 10_000,
    codebook_size: int = 8192,
) -> Any:
    """Return their DALLE as by default: full attention, GEGLU, rotary positions. Runs inside."""
    # Their module of pretrained VAEs imports a training framework for a VQGAN, unused here.
    for name in ("taming", "taming.models", "taming.models.vqgan"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("VQModel", "GumbelVQ"):
        setattr(sys.modules["taming.models.vqgan"], name, object)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dalle_pytorch import DALLE, DiscreteVAE  # type: ignore[import-not-found]

    vae = DiscreteVAE(
        image_size=8 * grid_size,
        num_layers=3,
        num_tokens=codebook_size,
        codebook_dim=64,
        hidden_dim=8,
    )
    return DALLE(
        dim=width,
        vae=vae,
        num_text_tokens=text_vocab_size,
        text_seq_len=text_length,
        depth=num_layers,
        heads=num_heads,
        dim_head=width // num_heads,
    )
