"""`python -m inference.bench.pruning`: whether a partial picture tells which one will be best.

    python -m inference.bench.pruning --model out/demo/ml/model --captions captions.txt

Of each caption a group of candidates is drawn to the end, and compared as
`inference.engine.pruning` does it at each of `--shares` of the picture: Spearman's rank correlation
of the partial scores with the final ones, and how often the best would have survived. Then requests
are drawn with and without `prune_at`, in turns: how much of the processor's time it saves, and what
the best picture's score loses. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.errors import UserError
from inference.api.schema import GenerateRequest
from inference.bench import steps as bench_steps
from inference.engine.model_runner import Generator
from inference.engine.pruning import GROUP, kept, partial_merits, prune_rows, spearman

_CAPTIONS = ("big filled orange star", "small violet circle rotated twice")


@dataclass(frozen=True)
class Foresight:
    """What one place tells of the end, means over the captions whose candidates are not all alike;
    None where there is no such caption."""

    share: float
    rows: int
    captions: int
    spearman: float | None
    best_survives: float | None
    """Share of those captions of whose group the better half has the best, or one as good."""


@dataclass(frozen=True)
class Saving:
    """Requests with `prune_at` beside the same without."""

    prune_at: list[float]
    time_share: float
    """Median over the captions of the processor time with pruning by that without."""
    same_best: float
    """Share of captions whose best picture is the same."""
    merit_lost: float
    """Mean of how much lower the best one's merit is."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench.pruning",
        description="Measure what pruning in mid-drawing saves and loses.",
    )
    parser.add_argument("--model", type=Path, required=True, help="an artefact's directory")
    parser.add_argument("--captions", type=Path, help="a file with one caption a line")
    parser.add_argument("--limit", type=int, default=32, help="captions; default %(default)s")
    parser.add_argument(
        "--timed", type=int, default=8, help="of them, drawn with and without; default %(default)s"
    )
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="default %(default)s")
    parser.add_argument("--num-candidates", type=int, default=32, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; default 1")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    captions = list(_CAPTIONS)
    if given.captions:
        captions = [line.strip() for line in given.captions.read_text("utf-8").splitlines()]
    captions = [each for each in captions if each][: given.limit]
    artefact = artefacts.load(given.model)
    if artefact.dvae is None or artefact.transformer is None or artefact.tokenizer is None:
        raise UserError(f"--model {given.model} cannot draw pictures")
    shares = [float(each) for each in given.shares.split(",")]
    result = run(artefact, captions, shares, num_candidates=given.num_candidates, timed=given.timed)
    print(json.dumps(result))


def run(
    artefact: Artefact,
    captions: Sequence[str],
    shares: Sequence[float],
    *,
    num_candidates: int,
    timed: int,
) -> dict[str, Any]:
    """Measure everything, print it as it comes, and return it all. timed: how many of the captions
    are drawn with and without pruning, which takes longest."""
    foresights = foresee(artefact, captions, shares)
    for each in foresights:
        told = "no caption's candidates differ"
        if each.spearman is not None and each.best_survives is not None:
            told = (
                f"Spearman {each.spearman:.3f}, the best of {GROUP} survives for "
                f"{each.best_survives:.0%} of {each.captions} captions whose candidates differ"
            )
        print(f"after {each.rows} rows: {told}", flush=True)
    savings = []
    for prune_at in [*([share] for share in shares), *([list(shares[:2])] if shares[1:] else [])]:
        savings.append(_save(artefact, captions[:timed], prune_at, num_candidates))
        print(
            f"prune_at {prune_at}: {savings[-1].time_share:.2f} times the time, the same best of "
            f"{num_candidates} for {savings[-1].same_best:.0%}, merit {savings[-1].merit_lost:.3f} "
            "lower",
            flush=True,
        )
    return bench_steps.describe_machine(torch.device("cpu")) | {
        "captions": len(captions),
        "timed_captions": len(captions[:timed]),
        "num_candidates": num_candidates,
        "group": GROUP,
        "foresight": [asdict(each) for each in foresights],
        "savings": [asdict(each) for each in savings],
    }


@torch.inference_mode()
def foresee(
    artefact: Artefact, captions: Sequence[str], shares: Sequence[float]
) -> list[Foresight]:
    """Scores of groups on their way, beside those at the end."""
    dvae, clip, transformer = artefact.dvae, artefact.clip, artefact.transformer
    assert dvae is not None
    assert transformer is not None
    assert artefact.tokenizer is not None
    grid_size = dvae.config.grid_size
    rows = prune_rows(shares, grid_size)
    found: dict[int, list[tuple[float, bool]]] = {row: [] for row in rows}
    engine = DecodeEngine(transformer, GROUP)
    for number, caption in enumerate(captions):
        embedding = None if clip is None else clip.encode_captions([caption], artefact.tokenizer)
        generation = engine.submit(
            artefact.tokenizer.encode([caption]),
            candidates=range(GROUP),
            seed=number,
            together=GROUP,
        )
        partial: dict[int, torch.Tensor] = {}
        finished = []
        while not engine.is_idle:
            finished += engine.step()
            drawn = engine.tokens_so_far(generation)
            if drawn and (position := len(drawn[0][1])) in {row * grid_size for row in rows}:
                likelihoods = engine.log_likelihood_so_far(generation)
                partial[position // grid_size] = partial_merits(
                    dvae,
                    clip,
                    embedding,
                    torch.stack([tokens for _, tokens in drawn]),
                    torch.tensor([likelihoods[each] for each, _ in drawn]),
                )
        finished.sort(key=lambda each: each.candidate)
        final = partial_merits(
            dvae,
            clip,
            embedding,
            torch.stack([each.image_tokens for each in finished]),
            torch.tensor([each.log_likelihood for each in finished]),
        )
        if bool((final == final[0]).all()):
            continue  # all alike: there is nothing to tell apart
        for row, merits in partial.items():
            survivors = merits.argsort(descending=True, stable=True)[: kept(GROUP)]
            correlation = spearman(merits, final)
            found[row].append(
                # Those that are all alike so far tell nothing of the end.
                (
                    0.0 if math.isnan(correlation) else correlation,
                    bool(final[survivors].max() == final.max()),
                )
            )
    return [
        Foresight(
            share=row / grid_size,
            rows=row,
            captions=len(measured),
            spearman=statistics.fmean(each for each, _ in measured) if measured else None,
            best_survives=statistics.fmean(each for _, each in measured) if measured else None,
        )
        for row, measured in found.items()
    ]


def _save(
    artefact: Artefact, captions: Sequence[str], prune_at: list[float], num_candidates: int
) -> Saving:
    generator = Generator(artefact, torch.device("cpu"))
    ratios, same, lost = [], [], []
    generator.self_test()  # warms up
    for number, caption in enumerate(captions):
        results, seconds = [], []
        for at in ([], prune_at):
            request = GenerateRequest(
                caption=caption,
                seed=number,
                num_candidates=num_candidates,
                num_images=1,
                prune_at=at,
            )
            began = time.process_time()
            results.append(generator.generate(request))
            seconds.append(time.process_time() - began)
        ratios.append(seconds[1] / seconds[0])
        best, of_pruned = (result.ranked[0] for result in results)
        same.append(best.number == of_pruned.number)
        lost.append(best.merit - of_pruned.merit)
    return Saving(
        prune_at=prune_at,
        time_share=statistics.median(ratios),
        same_best=statistics.fmean(same),
        merit_lost=statistics.fmean(lost),
    )


if __name__ == "__main__":
    main()
