"""Decides whether a group that has ended is started again, and with which places."""

from collections import Counter
from dataclasses import dataclass

from launch.report import Ending, first_failure

# An attempt that lasted this long, and whose heartbeats got further than all before, was progress.
_PROGRESS_S = 60.0
# Restarts that do not count must end too: of a command that always exits 75, for instance.
_FREE_RESTARTS = 3
_LONGEST_DELAY_S = 30.0
# So many first failures without progress and a place is left out.
_STRIKES = 2


@dataclass(frozen=True)
class Restart:
    """What to do next.

    Attributes:
        slots: the places to use.
        delay_s: seconds to wait before.
        release_ports: the workers' servers do not share a port with us (see `launch.ports`).
        why: for the log.
    """

    slots: tuple[int, ...]
    delay_s: float
    release_ports: bool
    why: str


class RestartPolicy:
    """The budget of restarts of one run.

    - A failure costs one of `max_restarts`, and the delay doubles with each: 1, 2, 4 … 30 s.
    - A stop on request that the launcher was not asked for (a preempted worker: exit status 75 or
      143), and a port that somebody else was faster to take, cost nothing up to three times in a
      row. The latter is retried under `max_restarts` 0 too: such a group never ran.
    - A place whose worker is the first failure twice without progress, by an error of its own, is
      left out while more than `min_workers` are left. That costs nothing either.
    - Progress resets all of it, and places that were left out are tried again. It is a minute in
      which a heartbeat told of a step beyond all before; a command that sends no heartbeats is
      never known to make any, so that its budget is for the whole run.

    Attributes:
        slots: the places in use.
    """

    def __init__(self, *, max_workers: int, min_workers: int, max_restarts: int):
        self._all_slots = tuple(range(max_workers))
        self._min_workers = min_workers
        self._max_restarts = max_restarts
        self._furthest_step = -1
        self._reset()

    def _reset(self) -> None:
        self.slots = self._all_slots
        self._counted = 0
        self._free = 0
        self._strikes: Counter[int] = Counter()

    def after(self, ending: Ending) -> Restart | None:
        """What follows on the end of a group; None: nothing, the run is over."""
        workers = [end for end in ending.ended if end.slot is not None]
        if all(end.code == 0 and not end.stall for end in workers):
            return None
        step = -1 if ending.highest_step is None else ending.highest_step
        if ending.lasted_s >= _PROGRESS_S and step > self._furthest_step:
            self._reset()
        self._furthest_step = max(self._furthest_step, step)

        first = first_failure(workers)
        port_taken = first is not None and first.port_taken
        if port_taken and self._free < _FREE_RESTARTS:
            self._free += 1
            return self._restart("a port was taken", release_ports=True)
        if self._max_restarts == 0:
            return None
        if first is None and self._free < _FREE_RESTARTS:
            self._free += 1
            return self._restart("a worker was stopped on request", delay_s=1.0)
        # A host that was lost is looked for at each start: it is left out, or taken back, then.
        is_own = first is not None and not first.lost_a_peer and not first.lost
        if is_own and first is not None and first.slot is not None:
            self._strikes[first.slot] += 1
            if (
                self._strikes[first.slot] >= _STRIKES
                and first.slot in self.slots
                and len(self.slots) > self._min_workers
            ):
                self.slots = tuple(slot for slot in self.slots if slot != first.slot)
                return self._restart(f"place {first.slot} is left out", delay_s=1.0)
        if self._counted == self._max_restarts:
            return None
        self._counted += 1
        delay_s = min(2.0 ** (self._counted - 1), _LONGEST_DELAY_S)
        return self._restart(f"restart {self._counted} of {self._max_restarts}", delay_s=delay_s)

    def _restart(self, why: str, delay_s: float = 0.0, release_ports: bool = False) -> Restart:
        return Restart(self.slots, delay_s, release_ports, why)
