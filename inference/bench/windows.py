"""Whole requests by the positions of a candidate that a step samples, in turns in one process.

Every round runs one request (caption's pass, then steps until all candidates are complete) in each
of the engines, in rotated order, and gives the ratio of the first engine's seconds to each of the
others'. The result is the median ratio with its quartiles: other load on the machine affects both
sides of a ratio, and rarely most rounds. All engines must give the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.cpu.step import CpuStep
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.select import most_rows, needs_key_ranges, new_step
from dalle.decoding.validate import measure_key_ranges, sample_reference
from dalle.models.transformer import Dalle
from dalle.types import Precision
from inference.bench.workload import DEFAULT_CAPTIONS
from inference.engine.scheduler import STEP_SECONDS
from inference.engine.window_tuning import measure_windows

Window = int | None
"""Positions of a candidate that a step samples; None: as many as promise most."""


@dataclass(frozen=True)
class WindowFigures:
    """Figures of one engine with one precision and number of candidates."""

    precision: str
    candidates: int
    window: Window
    request_ms: float
    """Median of a whole request."""
    ratio: float
    """Median of the rounds' ratios: the first engine's seconds by this one's."""
    ratio_quartiles: tuple[float, float]
    positions_per_step: float
    outside_step: float | None
    """Share of a request outside the compiled step; None for torch's kernels."""


@dataclass
class _Turns:
    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    positions_per_step: list[float] = field(default_factory=list)


def parse_windows(text: str) -> list[Window]:
    """Parse an option such as 1,8,auto. Raises argparse's error for anything else."""
    windows: list[Window] = []
    for each in text.split(","):
        if each != "auto" and not (each.isdecimal() and int(each) > 0):
            raise argparse.ArgumentTypeError(
                f"must be numbers of at least 1, or auto, like 1,8,auto; got {text!r}"
            )
        windows.append(None if each == "auto" else int(each))
    return windows


@torch.inference_mode()
def measure(
    artefact: Artefact,
    model: Dalle,
    precisions: Sequence[str],
    batches: Sequence[int],
    windows: Sequence[Window],
    *,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure on a CPU, print each engine's figures as they come, and return them all.

    rounds: one more warms up. Raises RuntimeError where two engines give other tokens.
    """
    captions = artefact.manifest.captions or DEFAULT_CAPTIONS
    texts = artefact.require("tokenizer").encode(list(captions[: len(DEFAULT_CAPTIONS)]))
    found = []
    for precision in precisions:
        for candidates in batches:
            for figures in _in_turns(model, texts, precision, candidates, windows, rounds):
                print(_told(figures, windows[0]), flush=True)
                found.append(asdict(figures))
    return found


def _in_turns(
    model: Dalle,
    texts: Tensor,
    precision: str,
    candidates: int,
    windows: Sequence[Window],
    rounds: int,
) -> list[WindowFigures]:
    engines = {window: _engine(model, precision, candidates, window) for window in windows}
    turns = {window: _Turns() for window in engines}
    inside: list[float] = []
    with _compiled_calls_timed(inside):
        for turn in range(rounds + 1):
            text_tokens = texts[turn % len(texts)][None]
            expected = None
            for window in _rotated(windows, turn):
                inside.clear()
                request = _request(engines[window], text_tokens, candidates, turn)
                if expected is None:
                    expected = request.tokens
                if request.tokens != expected:
                    raise RuntimeError(f"window {window} gave other tokens in round {turn}")
                if turn:
                    noted = turns[window]
                    noted.seconds.append(request.seconds)
                    if inside:
                        noted.outside.append(1 - sum(inside) / request.seconds)
                    noted.positions_per_step.append(request.positions_per_step)
    first = turns[windows[0]].seconds
    figures = []
    for window, noted in turns.items():
        ratios = [one / other for one, other in zip(first, noted.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else 3 * ratios
        figures.append(
            WindowFigures(
                precision=precision,
                candidates=candidates,
                window=window,
                request_ms=1000 * statistics.median(noted.seconds),
                ratio=statistics.median(ratios),
                ratio_quartiles=(low, high),
                positions_per_step=statistics.mean(noted.positions_per_step),
                outside_step=statistics.median(noted.outside) if noted.outside else None,
            )
        )
    return figures


@dataclass(frozen=True)
class _Request:
    tokens: dict[int, Any]
    seconds: float
    positions_per_step: float


def _request(engine: DecodeEngine, text_tokens: Tensor, candidates: int, seed: int) -> _Request:
    """Run a request alone, from its caption's pass to its last candidate."""
    began = time.perf_counter()
    request = engine.submit(text_tokens, candidates=range(candidates), seed=seed)
    finished = []
    while not engine.is_idle:
        finished += engine.step(STEP_SECONDS)
    seconds = time.perf_counter() - began
    tokens = {each.number: each.image_tokens.tolist() for each in finished}
    return _Request(tokens, seconds, request.positions_per_step)


def _engine(model: Dalle, precision: str, candidates: int, window: Window) -> DecodeEngine:
    """Build an engine as `serve` does, without comparing its precision with the model."""
    weights: Precision = precision  # type: ignore[assignment]
    ranges = None
    if needs_key_ranges(model, weights):
        ranges = measure_key_ranges(model, sample_reference(model))
    step = new_step(model, candidates, weights, ranges, num_rows=most_rows(candidates))
    engine = DecodeEngine(model, candidates, step=step, window=window)
    if window is None:
        engine.windows.seconds = measure_windows(engine)
    return engine


def _rotated(windows: Sequence[Window], turn: int) -> list[Window]:
    first = turn % len(windows)
    return [*windows[first:], *windows[:first]]


def _told(figures: WindowFigures, first: Window) -> str:
    """Describe figures in a line."""
    low, high = figures.ratio_quartiles
    outside = figures.outside_step
    return (
        f"{figures.precision}, {figures.candidates} candidates, window {_name(figures.window)}: "
        f"{figures.request_ms:.2f} ms a request, {figures.ratio:.2f} times as fast as window "
        f"{_name(first)} (quartiles {low:.2f} and {high:.2f}), "
        f"{figures.positions_per_step:.2f} positions a step"
        + ("" if outside is None else f", {outside:.0%} outside the compiled step")
    )


def _name(window: Window) -> str:
    return "auto" if window is None else str(window)


@contextmanager
def _compiled_calls_timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds of each call of the compiled step, of every engine."""
    call = CpuStep._call

    def timed(self: CpuStep, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        call(self, *arguments, **options)
        seconds.append(time.perf_counter() - began)

    CpuStep._call = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuStep._call = call  # type: ignore[method-assign]
