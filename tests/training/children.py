"""Run something in a child process that may be killed."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

KILLED = -signal.SIGKILL


def run(work: Callable[[], None]) -> int:
    """Fork, work, and give the exit status: 0, 1 after an exception, -9 if killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Countdown:
    """Counts calls of several functions together, and kills this process before the n-th.

    Args:
        n: which call is not made any more; None only counts.
    """

    def __init__(self, n: int | None = None) -> None:
        self.n, self.calls = n, 0

    def watch(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.calls == self.n:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return original(*args, **kwargs)

        setattr(owner, name, counted)
