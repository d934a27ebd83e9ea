"""Counts the collectives of a compiled program, from its text.

    count(text)  -> a Collective for each kind and size, largest total first

The collectives in a loop count once per iteration if the loop's trip count is a constant. If it depends on
data, as that of decoding does, they count once, and `data_loop` says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64}  # other types' names end in their bits

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|f16|[fsuc]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BOUND = re.compile(r"s32\[\][^ ]* constant\((\d+)\)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and one size."""

    kind: str
    bytes: int  # of one result on one device
    count: int
    data_loop: bool  # inside a loop whose trip count depends on data; counted once

    @property
    def total(self) -> int:
        """Bytes of all of them together."""
        return self.bytes * self.count


@dataclass(frozen=True)
class _Call:
    """One call of a computation, repeated if it is the body of a loop."""

    name: str
    times: int
    data: bool  # in a loop whose trip count depends on data


def count(text: str) -> list[Collective]:
    """The collectives of a program in XLA's text form."""
    bodies = _computations(text)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    found: Counter[tuple[str, int, bool]] = Counter()
    for name, (times, data) in _times(calls, _entry(text)).items():
        for line in bodies[name]:
            operation = _OPERATION.search(line)
            if operation:
                found[operation[1], _result_bytes(line, operation), data] += times
    collectives = [Collective(kind, size, times, data) for (kind, size, data), times in found.items()]
    return sorted(collectives, key=lambda c: (-c.total, c.kind))


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and line.endswith("{") and (start := _COMPUTATION.match(line)):
            lines = bodies.setdefault(start[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _entry(text: str) -> str:
    """Name of the computation that the program starts with; empty if there is none."""
    start = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return start[1] if start else ""


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[_Call]:
    """The calls in one computation."""
    for line in lines:
        called = dict(_CALLED.findall(line))
        if "body" in called:
            trips = _trip_count(line, bodies.get(called.get("condition", ""), []))
            yield _Call(called["body"], trips or 1, trips is None)
        else:
            yield from (_Call(name, 1, False) for name in called.values())
        if branches := _BRANCHES.search(line):
            yield from (_Call(name.strip(" %"), 1, False) for name in branches[1].split(","))


def _trip_count(line: str, condition: list[str]) -> int | None:
    """Iterations of a loop; None if they depend on data."""
    if known := _TRIP_COUNT.search(line):
        return int(known[1])
    # XLA does not annotate every loop with a constant trip count, which is then in the loop's condition.
    bounds = {int(n) for text in condition for n in _BOUND.findall(text)}
    return bounds.pop() if len(bounds) == 1 else None


def _times(calls: dict[str, list[_Call]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs, and whether it is in a loop whose trip count depends on data."""
    times: dict[str, int] = defaultdict(int)
    data: dict[str, bool] = defaultdict(bool)
    waiting = [_Call(entry, 1, False)] if entry in calls else []
    while waiting:
        call = waiting.pop()
        times[call.name] += call.times
        data[call.name] |= call.data
        inner = (c for c in calls.get(call.name, []) if c.name in calls)
        waiting += [_Call(c.name, call.times * c.times, call.data or c.data) for c in inner]
    return {name: (times[name], data[name]) for name in times}


def _result_bytes(line: str, operation: re.Match[str]) -> int:
    """Bytes of the arrays that the collective returns on one device."""
    arrays = _ARRAY.findall(line[line.index("=") : operation.start()])
    sizes = [_bits(kind) // 8 * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays]
    if not operation[2]:
        return sum(sizes)
    # An asynchronous start returns its operands too, before the results.
    if operation[1] == "collective-permute":
        return sizes[0]
    return max(sizes, default=0)


def _bits(kind: str) -> int:
    return ITEM_BITS.get(kind) or int(re.sub(r"\D", "", kind))
