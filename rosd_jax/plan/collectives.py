"""The collectives of a compiled program, read from its text.

    count(text)  -> a Collective for each kind and size, largest first

XLA names loops' bodies and conditions; a loop that counts to a constant is as many turns. Where a loop's
turns depend on data (decoding's steps), its body counts once, and the collective says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64}  # of types whose name does not end in them

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|f16|[fsuc]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BOUND = re.compile(r"s32\[\][^ ]* constant\((\d+)\)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and one size."""

    kind: str
    bytes: int  # of the result on one device
    count: int
    data_loop: bool  # inside a loop whose turns depend on data, counted once

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.bytes * self.count


@dataclass(frozen=True)
class _Call:
    name: str
    turns: int
    data: bool


def count(text: str) -> list[Collective]:
    """Of a program in XLA's text form."""
    bodies = _computations(text)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    found: Counter[tuple[str, int, bool]] = Counter()
    for name, (times, data) in _times(calls, _entry(text)).items():
        for line in bodies[name]:
            operation = _OPERATION.search(line)
            if operation:
                found[operation[1], _result_bytes(line, operation), data] += times
    all_of_them = [Collective(*key[:2], times, key[2]) for key, times in found.items()]
    return sorted(all_of_them, key=lambda c: (-c.total, c.kind))


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and line.endswith("{") and (start := _COMPUTATION.match(line)):
            lines = bodies.setdefault(start[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _entry(text: str) -> str:
    start = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return start[1] if start else ""


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[_Call]:
    """The computations that one calls, and how often."""
    for line in lines:
        called = dict(_CALLED.findall(line))
        if "body" in called:
            turns = _turns(line, bodies.get(called.get("condition", ""), []))
            yield _Call(called["body"], turns or 1, turns is None)
        else:
            yield from (_Call(name, 1, False) for name in called.values())
        if branches := _BRANCHES.search(line):
            yield from (_Call(name.strip(" %"), 1, False) for name in branches[1].split(","))


def _turns(line: str, condition: list[str]) -> int | None:
    """Turns of a loop; None where they depend on data."""
    if known := _TURNS.search(line):
        return int(known[1])
    bounds = {int(n) for text in condition for n in _BOUND.findall(text)}
    return bounds.pop() if len(bounds) == 1 else None


def _times(calls: dict[str, list[_Call]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs, and whether a loop over data is around it."""
    times: dict[str, int] = defaultdict(int)
    data: dict[str, bool] = defaultdict(bool)
    waiting = [_Call(entry, 1, False)] if entry in calls else []
    while waiting:
        call = waiting.pop()
        times[call.name] += call.turns
        data[call.name] |= call.data
        inner = (c for c in calls.get(call.name, []) if c.name in calls)
        waiting += [_Call(c.name, call.turns * c.turns, call.data or c.data) for c in inner]
    return {name: (times[name], data[name]) for name in times}


def _result_bytes(line: str, operation: re.Match[str]) -> int:
    """Of the arrays that the collective gives; an asynchronous start names its operands first."""
    arrays = _ARRAY.findall(line[line.index("=") : operation.start()])
    sizes = [_bits(kind) // 8 * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays]
    if not operation[2]:
        return sum(sizes)
    if operation[1] == "collective-permute":
        return sizes[0]
    return max(sizes, default=0)


def _bits(kind: str) -> int:
    return ITEM_BITS.get(kind) or int(re.sub(r"\D", "", kind))
