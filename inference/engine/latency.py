"""Latency model: measured seconds of a step, and how many candidates fit before a deadline.

Plain numbers; knows nothing of models.
"""

from __future__ import annotations

_NEWEST = 0.5  # weight of the newest measurement: there are few, and speeds are steady


class LatencyModel:
    """Running means of what sampling and finishing take. Used by the model's thread only.

    max_chunk_size: candidates sampled together when there is no deadline.
    """

    def __init__(self, max_chunk_size: int) -> None:
        self.max_chunk_size = max_chunk_size
        self._sample: dict[tuple[int, bool], float] = {}  # (size, guided) -> seconds per position
        self._finish = 0.0  # decoding and scoring, seconds per candidate

    def record_sampling(self, size: int, guided: bool, positions: int, seconds: float) -> None:
        """Record that `size` candidates took `seconds` for `positions` image-token positions."""
        newest = seconds / max(1, positions)
        mean = self._sample.get((size, guided), newest)
        self._sample[size, guided] = mean + _NEWEST * (newest - mean)

    def record_finishing(self, size: int, seconds: float) -> None:
        """Record that decoding and scoring `size` candidates took `seconds`."""
        self._finish = (self._finish or seconds / size) * (1 - _NEWEST) + seconds / size * _NEWEST

    def finishing_seconds(self, size: int) -> float:
        """Return the expected seconds of decoding and scoring `size` candidates."""
        return self._finish * size

    def chunk_size(
        self,
        remaining: int,
        guided: bool,
        positions: int,
        seconds: float,
        *,
        decodes: int = 1,
        others: int = 0,
    ) -> int:
        """Return how many of the `remaining` candidates to sample together, `seconds` being left.

        decodes: how often each is decoded, more than once with previews.
        others: candidates of other requests that are sampled in the same steps.
        The result is `remaining` or the maximum, halved until it is expected to be finished in
        time, at least 1.
        """
        size = min(remaining, self.max_chunk_size)
        while size > 1:
            expected = self._seconds_per_position(size + others, guided) * positions
            if expected + decodes * self.finishing_seconds(size) <= seconds:
                break
            size = (size + 1) // 2
        return size

    def _seconds_per_position(self, size: int, guided: bool) -> float:
        """Return the measured seconds, else an upper bound.

        The bound is the next larger size that was measured, or in proportion to the largest.
        """
        known = {
            size: each for (size, is_guided), each in self._sample.items() if is_guided == guided
        }
        if not known and guided:  # two passes instead of one
            return 2 * self._seconds_per_position(size, False)
        larger = [each for each in known if each >= size]
        if larger:
            return known[min(larger)]
        return known[max(known)] * size / max(known) if known else 0.0
