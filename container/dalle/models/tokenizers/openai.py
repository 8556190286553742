"""The discrete VAE of OpenAI's DALL-E.

Source: the package `DALL-E` 0.1 (openai/DALL-E, dall_e/encoder.py, decoder.py and utils.py). The
names of the weights are those of its pickled modules, with `weight` and `bias` for `w` and `b`.
On GPUs the original rounds to half precision, and some images get other tokens than on a CPU; here
it is float32 everywhere.
Letters: B batch, V codebook size, G grid size, N = G·G positions, S image size.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.tokenizers.configs import OpenAIConfig
from dalle.models.tokenizers.published import PublishedTokenizer

_GROUPS = 4
_MARGIN = 0.1  # images are squeezed into [0.1, 0.9], where the Laplace distribution's logit is tame


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class _Block(nn.Module):
    """Four convolutions around a path of identity. sizes: of their kernels."""

    def __init__(
        self, inputs: int, outputs: int, sizes: tuple[int, int, int, int], gain: float
    ) -> None:
        super().__init__()
        hidden = outputs // 4
        widths = (inputs, hidden, hidden, hidden, outputs)
        self.gain = gain
        self.id_path = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, size in enumerate(sizes, start=1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = _conv(widths[number - 1], widths[number], size)
        self.res_path = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.id_path(features) + self.gain * self.res_path(features)
        return output


class _Half(nn.Module):
    """The encoder or the decoder: a convolution, four groups of blocks, a convolution.

    widths: channels of the first feature map and of each group.
    """

    def __init__(
        self,
        config: OpenAIConfig,
        widths: tuple[int, ...],
        between: type[nn.Module],
        first: nn.Conv2d,
        last: nn.Conv2d,
        sizes: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        gain = 1 / (_GROUPS * config.num_blocks) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=first)
        for group in range(_GROUPS):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            inputs, outputs = widths[group], widths[group + 1]
            for number in range(config.num_blocks):
                block = _Block(outputs if number else inputs, outputs, sizes, gain)
                blocks[f"block_{number + 1}"] = block
            if group < _GROUPS - 1:
                blocks["resize"] = between()
            layers[f"group_{group + 1}"] = nn.Sequential(blocks)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.blocks(features)
        return output


class _Halve(nn.MaxPool2d):
    def __init__(self) -> None:
        super().__init__(kernel_size=2)


class _Double(nn.Upsample):
    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")


class OpenAIDVAE(PublishedTokenizer):
    """OpenAI's discrete VAE."""

    config: OpenAIConfig

    def __init__(self, config: OpenAIConfig) -> None:
        super().__init__()
        self.config = config
        V, width, start = config.codebook_size, config.width, config.decoder_input_width
        self.encoder = _Half(
            config,
            (width, width, 2 * width, 4 * width, 8 * width),
            _Halve,
            _conv(3, width, 7),
            _conv(8 * width, V, 1),
            (3, 3, 3, 1),
        )
        self.decoder = _Half(
            config,
            (start, 8 * width, 4 * width, 2 * width, width),
            _Double,
            _conv(V, start, 1),
            _conv(width, 6, 1),  # location and scale of each colour; the scale is for training
            (1, 3, 3, 3),
        )

    def _encode(self, images: Tensor) -> Tensor:
        logits: Tensor = self.encoder((1 - 2 * _MARGIN) * images + _MARGIN)
        return logits.argmax(dim=1).flatten(1).unsqueeze(-1)

    def _decode(self, image_tokens: Tensor) -> Tensor:
        first, *rest = self.decoder.blocks
        assert isinstance(first, nn.Conv2d)
        assert first.bias is not None
        # A 1x1 convolution of one-hot codes takes a column of its weights for each code.
        codes = F.embedding(image_tokens[..., 0], first.weight[:, :, 0, 0].T) + first.bias
        features = self.on_grid(codes)
        for layer in rest:
            features = layer(features)
        return ((features[:, :3].sigmoid() - _MARGIN) / (1 - 2 * _MARGIN)).clamp(0, 1)
