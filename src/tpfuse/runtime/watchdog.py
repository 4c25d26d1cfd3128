"""Ends the process, with a named error, when a kernel has given up on a peer.

Such a kernel has left a record in host memory and trapped: the CUDA context is lost, and whoever waits for the device
gets an error that names nothing.  The watchdog prints what happened and ends the process, so that nobody hangs.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence

EXIT_CODE = 70  # EX_SOFTWARE
_INTERVAL = 0.1
_GRACE = 2.0  # seconds that the main thread has for a traceback of its own


class Watchdog:
    """Calls `look` every 0.1 s; the first message that it returns is printed, then the process ends.

    At the interpreter's own exit `look` is called once more, so that the message is printed whoever is first.
    """

    def __init__(self, look: Callable[[], Sequence[object]], end: Callable[[int], None] = os._exit) -> None:
        self._look = look
        self._end = end
        self._stop = threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._watch, name="tpfuse-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Look a last time and end the thread."""
        self._stop.set()
        self._report()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            if self._report():
                self._stop.wait(_GRACE)
                self._end(EXIT_CODE)
                return

    def _report(self) -> bool:
        found = self._look()
        if found and not self._said:
            self._said = True
            print("\n".join(f"tpfuse: FusionError: {what}" for what in found), file=sys.stderr, flush=True)
        return bool(found)
