"""What a run ended with, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from klplug.report.runs import Series

SHARE = 0.1  # the end of a run: its last tenth, and of most metrics five logged steps at least


@dataclass(frozen=True)
class Final:
    """A mean, with a 95 % interval over seeds, or with the range of one seed's steps.

    Steps of one run depend on each other, and say nothing of another seed: from them an interval
    would be far too narrow, so there is none.

    Attributes:
        mean: over seeds, of each one's mean over the end of its run.
        half_width: of the interval; ``None`` with one seed.
        low, high: the interval's ends; with one seed, the smallest and largest of its last steps.
        over: ``seeds`` or ``steps``.
        count: seeds, or steps.
    """

    mean: float
    half_width: float | None
    low: float
    high: float
    over: str
    count: int

    def __str__(self) -> str:
        if self.half_width is not None:
            return f"{_short(self.mean, 4)} ± {_short(self.half_width, 2)}"
        if self.low == self.high:
            return _short(self.mean, 4)
        return f"{_short(self.mean, 4)} ({_short(self.low, 3)} to {_short(self.high, 3)})"


def _short(value: float, digits: int) -> str:
    """So many digits; a number of up to six places is written out, without an exponent."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"


def end(series: Series, least: int) -> list[float]:
    """The finite values of the last tenth of a run, of ``least`` logged steps at least."""
    steps = sorted(series)[-max(least, math.ceil(SHARE * len(series))) :]
    return [series[step] for step in steps if math.isfinite(series[step])]


def final(seeds: Sequence[Series], least: int) -> Final | None:
    """The final value over ``seeds``; ``None`` where nothing finite was logged."""
    ends = [values for series in seeds if (values := end(series, least))]
    if not ends:
        return None
    if len(ends) == 1:
        (values,) = ends
        mean = statistics.fmean(values)
        return Final(mean, None, min(values), max(values), "steps", len(values))
    from scipy.special import stdtrit  # quantiles of Student's t

    means = [statistics.fmean(values) for values in ends]
    count, mean = len(means), statistics.fmean(means)
    half_width = float(stdtrit(count - 1, 0.975)) * statistics.stdev(means) / math.sqrt(count)
    return Final(mean, half_width, mean - half_width, mean + half_width, "seeds", count)
