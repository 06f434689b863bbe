"""What can go wrong by the user's hand, as a small tree of exceptions.

BitMixupError
├── ConfigError      a flag, keyword or configuration value
├── DataError        a data set, a file or a row in it
├── WeightsError     a model name or a file of weights
├── CheckpointError  the folder of a run
├── PublishError     a model that is to be put on the hub, or the hub that is to take it
├── ProcessError     the processes of a run differ, or one has ended
├── MemoryShortError the least that can be computed at a time does not fit into memory
└── NonFiniteError   training met a loss or weight that is not a finite number

and beside it, as KeyboardInterrupt is beside Exception,

Interrupted          a signal asked the run to stop

Each message names the culprit, says what was expected, and how to mend it. The doors (command line, recipes) print it as one
line without a traceback and exit with status 2. Names in it are as others chose them: what could steer a terminal is escaped.
"""

import difflib
import signal
from collections.abc import Iterable


def shown(name: str, *, keep: str = "") -> str:
    """A name of somebody else's choosing (a class, a file, a column) as a terminal may be given it.

    Control characters, and with them what moves the cursor or sets colours, line breaks, marks that turn the direction of
    writing, and invisible letters become escapes such as \\x1b. Doing it twice changes nothing more.

    Args:
        name: any text.
        keep: letters to leave as they are, such as the line breaks of our own messages.
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode() for letter in name
    )


class BitMixupError(Exception):
    """Base of all errors that bit_mixup raises on purpose."""

    _line_breaks = "\n"  # messages that list something have lines

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, keep=self._line_breaks))


class ConfigError(BitMixupError):
    """A flag, keyword or configuration value can not be used."""


class DataError(BitMixupError):
    """A data set, or one file or row of it, can not be used. Its message is one line, whatever classes and files are called."""

    _line_breaks = ""


class WeightsError(BitMixupError):
    """A model name or file of weights can not be used."""


class PublishError(BitMixupError):
    """A model can not be published, or the hub does not take it."""


class CheckpointError(BitMixupError):
    """A run's folder can not be used, or its checkpoint belongs to another configuration."""


class ProcessError(BitMixupError):
    """The processes of one run were started differently, or one of them has stopped."""


class MemoryShortError(BitMixupError):
    """Not even the smallest micro-batch, with activations computed twice, fits into memory."""


class NonFiniteError(BitMixupError):
    """Training met a loss or a weight that is not a finite number."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop.

    Args:
        number: of the signal.
        message: what is left of the run and how it goes on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells say of a process that a signal has ended: 128 and the signal's number."""
        return 128 + self.number

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.number).name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the known name nearest to `name`, or an empty string if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
