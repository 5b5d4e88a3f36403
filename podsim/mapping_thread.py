"""Maps and unmaps in a background thread, in the order in which changes are handed in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from podsim.vattention import Change


class MappingThread:
    """A thread that applies changes while the caller does something else.

    An error of the thread is raised in the caller, by the next `wait` or `submit`.
    """

    def __init__(
        self,
        apply: Callable[[Sequence[Change]], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`apply` does changes, `prepare` runs first in the thread."""
        self._apply = apply
        self._prepare = prepare
        self._changes: deque[Change] = deque()
        self._num_submitted = self._num_done = 0
        self._last: dict[int, int] = {}
        """Of each slot: the number of its latest change."""
        self._error: BaseException | None = None
        self._closing = False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, changes: Iterable[Change]) -> None:
        with self._moved:
            self._raise()
            for change in changes:
                self._changes.append(change)
                self._num_submitted += 1
                self._last[change.slot] = self._num_submitted
            if self._changes:  # a thread that wakes for nothing takes turns with the caller
                self._moved.notify_all()

    def wait(self, slots: Iterable[int] | None = None) -> None:
        """Until the changes of these slots, or all changes, are done."""
        with self._moved:
            number = self._num_submitted
            if slots is not None:
                number = max((self._last.get(slot, 0) for slot in slots), default=0)
            self._moved.wait_for(lambda: self._num_done >= number or self._error is not None)
            self._raise()

    def close(self) -> None:
        """End the thread once all is done; an error of it is not raised any more."""
        with self._moved:
            self._closing = True
            self._moved.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        self._prepare()
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._changes or self._closing)
                if not self._changes:
                    return
                change = self._changes.popleft()
            error: BaseException | None = None
            try:
                self._apply([change])
            except BaseException as raised:  # handed to the caller
                error = raised
            with self._moved:
                self._num_done += 1
                self._error = self._error or error
                self._moved.notify_all()
