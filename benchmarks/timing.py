"""Times several calls against each other in one process, and formats the results."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable

import numpy as np

FEWEST = 5  # repetitions of a call that is too slow for more


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    calls: dict[str, Callable[[], object]], *, warmups: int, reps: int, seconds: float = float("inf")
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Wall time of each call in ms, and the calls that raised, with their exception.

    A call must return only once its work is done. After the warm-ups the calls take turns, in the given
    order and in its reverse, so that a drift of the clock affects them all alike. Each gets `reps` turns,
    or as many as fit into `seconds`, but at least `FEWEST`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    turns = dict.fromkeys(calls, reps)

    def run(name: str) -> float | None:
        start = time.perf_counter()
        try:
            calls[name]()
        except Exception as error:  # whatever stops one call must not stop the others
            # Without the traceback, whose frames would keep arrays alive.
            errors[name] = error.with_traceback(None)
            return None
        return 1e3 * (time.perf_counter() - start)

    for _ in range(warmups):
        for name in calls:
            took = None if name in errors else run(name)
            if took is not None:
                turns[name] = int(min(reps, max(FEWEST, 1e3 * seconds / took)))
    for turn in range(reps):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            if name in errors or turn >= turns[name]:
                continue
            took = run(name)
            if took is not None:
                times[name].append(took)
    return times, errors


def summary(times: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in the unit given, and the number of measurements."""
    values = list(times)
    low, median, high = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(low), "p80": float(high), "n": len(values)}


def cells(stats: dict[str, float], digits: int) -> list[str]:
    """A `summary` as three cells of a table: median, spread, number."""
    median, low, high = (f"{stats[key]:.{digits}f}" for key in ("median", "p20", "p80"))
    return [median, f"{low} - {high}", str(stats["n"])]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
