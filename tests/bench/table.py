"""The rows of the benchmarks: what something costs beside what it must not cost more than, in one table.

Each figure is the median of several runs, and is held against a peer of the same run: machines differ, and are shared.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of several runs of ours and of the peer's, and the most that their ratio may be.

    `seconds` is the most that ours may take by itself, where there is such a limit.
    """

    what: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float]
    ratio: float
    seconds: float | None = None

    @property
    def figures(self) -> tuple[float, float]:
        """The medians."""
        return statistics.median(self.ours), statistics.median(self.theirs)

    @property
    def good(self) -> bool:
        """Whether it keeps its limits."""
        ours, theirs = self.figures
        return ours / theirs <= self.ratio and (self.seconds is None or ours <= self.seconds)


def timed(do: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.monotonic()
    do()
    return time.monotonic() - start


def table(rows: Iterable[Row]) -> str:
    """Return the rows for people."""
    lines = [("", "takes", "beside", "", "ratio", "at most", "")]
    for row in rows:
        ours, theirs = row.figures
        limit = f"{row.ratio:.2f}" + (f", {row.seconds:.2f} s" if row.seconds else "")
        verdict = "good" if row.good else "TOO MUCH"
        lines.append((row.what, f"{ours:.2f} s", f"{theirs:.2f} s", row.peer, f"{ours / theirs:.2f}", limit, verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines)
