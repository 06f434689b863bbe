"""How does a run stop when it is told to, so that nothing is lost?

SIGTERM (a scheduler or launcher), SIGINT (Ctrl-C) and SIGUSR1 (SLURM's warning before the time limit) ask a run to stop. During
training that waits for the next step's end, where a checkpoint is written; at other times it is done at once, as everything
is on the disk. A second signal ends the process on the spot: what is written then is whole or absent all the same.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from bit_mixup.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ECHO_SECONDS = 1.0  # a launcher passes on to its workers what the terminal has sent them already: that is no second signal

_END = b"\0"  # no signal has this number
_AT_ONCE = "nothing was under way that is not on the disk already. Start again with --resume."


class Interruption:
    """A context in which signals ask for a stop.

    Contexts may be nested; the innermost hears the signals. Handlers are set in the main thread only, as Python has it; in any
    other the context does nothing.

    Args:
        deferring: whether the first signal is only noted, in `number`, for the one who asks, and raises Interrupted at the
            latest where the context ends; else it raises at once.
    """

    def __init__(self, *, deferring: bool) -> None:
        self.deferring = deferring
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait for the end of a backward pass, which is one long call; the bytes of this pipe do not.
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._pipe_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
            self._watcher = threading.Thread(target=_exit_on_second, args=(self._reading,), daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._pipe_before)
            os.write(self._writing, _END)  # closing it would not do: processes that were forked meanwhile hold it open
            self._watcher.join()
            os.close(self._writing)
            os.close(self._reading)
        if self.number and error is None:
            raise Interrupted(self.number, f"stopped by {signal.Signals(self.number).name}: {_AT_ONCE}")

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            return
        self.number = number
        name = signal.Signals(number).name
        if not self.deferring:
            raise Interrupted(number, f"stopped by {name}: {_AT_ONCE}")
        _say(f"{name}: stopping at the end of this step. A second signal stops at once.")


def _exit_on_second(pipe: int) -> None:
    """Reads the numbers of signals from a pipe, and ends the process at the second that is not an echo of the first."""
    first = None
    while (number := os.read(pipe, 1)) != _END:
        if number[0] not in SIGNALS:  # of a child that has ended, say
            continue
        now = time.monotonic()
        first = now if first is None else first
        if now - first > ECHO_SECONDS:
            _say(f"{signal.Signals(number[0]).name} again: stopped at once.")
            os._exit(128 + number[0])


def _say(text: str) -> None:
    """Tells people, past Python's buffers: the signal may have come while these were being filled."""
    os.write(2, f"\nbit-mixup: {text}\n".encode())


def ignore_signals(worker: int = 0) -> None:
    """Leaves signals to the process that is asked to stop; for the processes that it has started to decode pictures.

    Args:
        worker: index of the process, which the data loader passes.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
