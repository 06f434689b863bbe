"""Is each field of a request what its annotation says?"""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import typeguard

from bit_mixup.errors import ConfigError, did_you_mean


def check_fields(request: Any) -> None:
    """Sees whether each field of a dataclass is what its annotation says, and not out of all proportion.

    Raises:
        ConfigError: one is not.
    """
    hints = get_type_hints(type(request))
    for field in fields(request):
        check_value(field.name, getattr(request, field.name), hints[field.name])
        _check_extent(field.name, getattr(request, field.name))


def check_value(name: str, value: Any, hint: Any) -> None:
    """Sees whether a value is what a field's annotation says.

    Raises:
        ConfigError: it is not.
    """
    try:
        typeguard.check_type(value, hint)
    except typeguard.TypeCheckError as error:
        choices = [choice for choice in getattr(hint, "__args__", ()) if isinstance(choice, str)]
        if choices and isinstance(value, str):
            raise ConfigError(f'{name} "{value}"{did_you_mean(value, choices)}: expected one of {", ".join(choices)}.') from error
        raise ConfigError(f"{name} is {value!r}; expected {str(hint).replace('typing.', '')}.") from error


# Whole numbers beyond these are slips of the hand that would fill the memory or overflow before anybody is told.
_LARGEST = {"batch_size": 2**20, "crop_size": 2**14, "resize_size": 2**14, "num_workers": 2**10, "threads": 2**10}
_LARGEST_OTHER = 2**32


def _check_extent(name: str, value: Any) -> None:
    """Raises ConfigError where a whole number is too large for anything, or a text can not be written into a run's files."""
    largest = _LARGEST.get(name, _LARGEST_OTHER)
    if any(isinstance(number, int) and abs(number) > largest for number in (value if isinstance(value, tuple) else (value,))):
        raise ConfigError(f"{name} is out of all proportion; it must not be above {largest:,}.")
    if isinstance(value, str | Path) and not _can_be_written(str(value)):
        raise ConfigError(f"{name} is {value!a}: it holds a character that UTF-8 lacks, or a zero byte. Rename what it names.")


def _can_be_written(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
