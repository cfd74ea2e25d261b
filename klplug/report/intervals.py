"""What a run ended with, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from klplug.report.runs import Series

SHARE, LEAST = 0.1, 5  # the end of a run: its last tenth, of at least five logged steps

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom, then the normal's.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


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
            return f"{self.mean:.4g} ± {self.half_width:.2g}"
        if self.low == self.high:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.3g} to {self.high:.3g})"


def end(series: Series) -> list[float]:
    """The finite values of the last tenth of a run."""
    steps = sorted(series)[-max(LEAST, math.ceil(SHARE * len(series))) :]
    return [series[step] for step in steps if math.isfinite(series[step])]


def final(seeds: Sequence[Series]) -> Final | None:
    """The final value over ``seeds``; ``None`` where nothing finite was logged."""
    ends = [values for series in seeds if (values := end(series))]
    if not ends:
        return None
    if len(ends) == 1:
        (values,) = ends
        mean = statistics.fmean(values)
        return Final(mean, None, min(values), max(values), "steps", len(values))
    means = [statistics.fmean(values) for values in ends]
    count, mean = len(means), statistics.fmean(means)
    t = _T95[count - 2] if count - 2 < len(_T95) else 1.96
    half_width = t * statistics.stdev(means) / math.sqrt(count)
    return Final(mean, half_width, mean - half_width, mean + half_width, "seeds", count)
