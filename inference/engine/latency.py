"""How fast this device draws, and so how many candidates may be drawn together before a deadline.

Plain numbers; knows nothing of models.
"""

from __future__ import annotations

_NEWEST = 0.5  # weight of the newest measurement: chunks are few and speeds steady


class Pace:
    """Speeds measured so far. Used by the model's thread only.

    max_chunk_size: candidates drawn together when time does not matter.
    """

    def __init__(self, max_chunk_size: int) -> None:
        self.max_chunk_size = max_chunk_size
        self._sample: dict[tuple[int, bool], float] = {}  # (size, guided) -> seconds per position
        self._finish = 0.0  # decoding and scoring, seconds per candidate

    def note_sampling(self, size: int, guided: bool, positions: int, seconds: float) -> None:
        """A chunk of `size` candidates took `seconds` for `positions` image-token positions."""
        newest = seconds / max(1, positions)
        mean = self._sample.get((size, guided), newest)
        self._sample[size, guided] = mean + _NEWEST * (newest - mean)

    def note_finishing(self, size: int, seconds: float) -> None:
        """Decoding and scoring `size` candidates took `seconds`."""
        self._finish = (self._finish or seconds / size) * (1 - _NEWEST) + seconds / size * _NEWEST

    def finishing_seconds(self, size: int) -> float:
        """What decoding and scoring `size` candidates will probably take."""
        return self._finish * size

    def chunk_size(
        self,
        remaining: int,
        guided: bool,
        positions: int,
        seconds: float,
        *,
        decodes: int = 1,
        beside: int = 0,
    ) -> int:
        """How many of the `remaining` candidates to draw next, with `seconds` left.

        decodes: how often each is decoded, more than once where previews are wanted.
        beside: candidates of other requests that are drawn with them.
        The largest of 1, 2, 4, … up to the maximum that should be finished in time, at least 1.
        """
        size = min(remaining, self.max_chunk_size)
        while size > 1:
            expected = self._seconds_per_position(size + beside, guided) * positions
            if expected + decodes * self.finishing_seconds(size) <= seconds:
                break
            size = (size + 1) // 2
        return size

    def _seconds_per_position(self, size: int, guided: bool) -> float:
        """Measured, or at worst: as the next larger size, or in proportion to the next smaller."""
        known = {
            size: each for (size, is_guided), each in self._sample.items() if is_guided == guided
        }
        if not known and guided:  # two passes instead of one
            return 2 * self._seconds_per_position(size, False)
        larger = [each for each in known if each >= size]
        if larger:
            return known[min(larger)]
        return known[max(known)] * size / max(known) if known else 0.0
