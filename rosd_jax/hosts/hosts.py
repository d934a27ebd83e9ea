"""How the processes of a run agree, and share the work of a host.

    hosts = Hosts()                       one process: nothing is exchanged
    hosts = Hosts(index, count, store)    as place.py makes it
    hosts.exchange(what, value)           -> every process's value, in their order
    hosts.once(what, work)                -> the result of work(), which only the first process calls
    hosts.share(what, work, items)        -> work(items), of which each process does a part
    hosts.require_same(what, value)       raises if the processes' values differ

These are the only ways for processes to depend on each other, apart from programs on the devices. All
processes must make the same calls in the same order: each call carries its number and `what`, and processes
that do not match end with an error, not with a deadlock.

Values travel, pickled, through the key-value store of JAX's coordination service: the processes of a run
trust each other. The first one collects the values and publishes the list, so N processes make 2N requests.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rosd_jax.errors import UserError
from rosd_jax.train import stopping

T = TypeVar("T")
X = TypeVar("X")
LOST_S = 5.0
WAIT_MS = 60_000  # after which a process says for whom it waits


class Store(Protocol):
    """The part of JAX's coordination service that is used here."""

    def key_value_set_bytes(self, key: str, value: bytes, /) -> Any: ...

    def blocking_key_value_get_bytes(self, key: str, timeout_ms: int, /) -> bytes: ...

    def key_value_delete(self, key: str, /) -> Any: ...


@dataclass(frozen=True)
class Hosts:
    """The processes of a run, one per host, as one of them sees them."""

    index: int = 0  # of this process
    count: int = 1
    store: Store | None = None
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.index == 0

    def exchange(self, what: str, value: T) -> list[T]:
        """Every process's value, in the order of the processes. Values must pickle.

        what: names the place in the program. Raises RuntimeError if the processes are at different places.
        """
        if self.store is None:
            return [value]
        call = next(self._calls)
        mine = pickle.dumps((what, value))
        try:
            parts = self._gather(self.store, call, what, mine)
        except Exception:
            # The first process may have died, and with it the store. Then its supervisor ends this process,
            # and names it, before this one can be blamed.
            time.sleep(LOST_S)
            raise
        found = [pickle.loads(part) for part in parts]
        places = [place for place, _ in found]
        if set(places) != {what}:
            apart = next(i for i, place in enumerate(places) if place != places[0])
            raise RuntimeError(
                f"the processes have diverged: in exchange {call}, process 0 is at {places[0]!r} and process "
                f"{apart} at {places[apart]!r}; this is a bug, please report it"
            )
        return [value for _, value in found]

    def _gather(self, store: Store, call: int, what: str, mine: bytes) -> list[bytes]:
        if not self.first:
            store.key_value_set_bytes(_key(f"{call}/{self.index}"), mine)
            return pickle.loads(self._await(f"{call}/all", what, 0))
        parts = [mine, *(self._await(f"{call}/{i}", what, i) for i in range(1, self.count))]
        store.key_value_set_bytes(_key(f"{call}/all"), pickle.dumps(parts))
        # All have sent their part of this call, so all have read the list of the one before.
        store.key_value_delete(_key(f"{call - 1}/"))
        return parts

    def once(self, what: str, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process calls; it must pickle.

        If it raises, only the first process does: its supervisor ends the others.
        """
        return self.exchange(what, work() if self.first else None)[0]  # type: ignore[return-value]

    def share(self, what: str, work: Callable[[Sequence[X]], Sequence[T]], items: Sequence[X]) -> list[T]:
        """One result per item. Each process calls `work` with a part of the items, neighbours together."""
        start = len(items) * self.index // self.count
        stop = len(items) * (self.index + 1) // self.count
        mine = items[start:stop]
        parts = self.exchange(what, list(work(mine)) if mine else [])
        return [result for part in parts for result in part]

    def require_same(self, what: str, fields: dict[str, Any]) -> None:
        """Raises UserError naming the first process whose fields differ from the first one's, and where."""
        first, *others = self.exchange(what, fields)
        for i, other in enumerate(others, start=1):
            apart = [name for name in first | other if first.get(name) != other.get(name)]
            if apart:
                name = apart[0]
                raise UserError(
                    f"{what} of process {i} differs from that of process 0: {name} is {other.get(name)!r} "
                    f"and {first.get(name)!r}; give all hosts the same command and the same files"
                )

    def _await(self, key: str, what: str, sender: int) -> bytes:
        """A value, however long it takes: a supervisor ends this process if the sender fails."""
        assert self.store is not None
        while True:
            try:
                return self.store.blocking_key_value_get_bytes(_key(key), WAIT_MS)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                whom = f"process {sender}, which has" if self.first else "other processes, which have"
                stopping.tell(f"waits for {whom} not finished {what!r}")


def _key(name: str) -> str:
    return f"rosd_jax/{name}"
