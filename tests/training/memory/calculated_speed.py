"""A device whose speed is calculated, so that what is chosen for it depends on no clock."""

import math

from dalle.models.configs import ClipConfig, DVAEConfig
from training.memory.sizing import rules


class CalculatedSpeed:
    """So many floating-point operations a second in every step, and `start` seconds a step.

    most_weights: of a transformer's layers that its memory holds. asked: what was measured.
    """

    device = "a calculated device"

    def __init__(self, operations_per_second, start=0.0, most_weights=math.inf, asked=None):
        self.operations_per_second = operations_per_second
        self.start = start
        self.most_weights = most_weights
        self.asked = [] if asked is None else asked

    def step_seconds(self, stage, config, settings, batch_size, dvae):
        self.asked.append((stage, config, batch_size))
        if self._is_too_large(config):
            return math.inf
        return self.start + batch_size * _operations(config) / self.operations_per_second

    def _is_too_large(self, config):
        if isinstance(config, DVAEConfig | ClipConfig):
            return False
        return rules.layer_weights(config.width, config.num_layers) > self.most_weights


def _operations(config):
    """Operations of both passes over one pair, about."""
    if isinstance(config, DVAEConfig):
        return 6 * 4 * config.width**2 * (1 + config.num_blocks) * config.grid_size**2
    if isinstance(config, ClipConfig):
        patches = (config.image_size // config.patch_size) ** 2
        return 6 * 12 * config.vision_width**2 * config.vision_layers * patches
    return rules.pair_operations(config)
