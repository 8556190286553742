"""Processes that a signal has stopped, which neither end nor answer."""

import psutil  # type: ignore[import-untyped]


class StopWatch:
    """Tells whether a process is stopped, as by SIGSTOP. A debugger's stop does not count.

    A process counts as stopped when two looks in a row find it so: a terminal's Ctrl-Z and `fg`
    stop and continue all processes of a server, which see each other so for a moment.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._was_stopped = False

    def is_stopped(self) -> bool:
        """Look; return whether this look and the one before found the process stopped."""
        was_stopped, self._was_stopped = self._was_stopped, self._look()
        return was_stopped and self._was_stopped

    def _look(self) -> bool:
        try:
            return bool(psutil.Process(self._pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False
