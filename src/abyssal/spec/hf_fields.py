"""Reading a JSON object field by field, so that nothing in it is overlooked.

A Hugging Face ``config.json`` says what a model computes, and a field that is skipped is a model that computes
something else.  :class:`Fields` hands out each field once, with its type checked, and :meth:`Fields.finish` refuses
whatever nobody asked for.  The alternative, taking known keys and ignoring the rest, is how a reader runs a checkpoint
with the wrong attention and never says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final


class _Required:
    """The default of a field that has none."""


REQUIRED: Final = _Required()


class FieldError(ValueError):
    """A field that cannot be accepted; the message names the file, the field, its value, and what to do."""


class Fields:
    """The fields of one JSON object; ``source`` names it in messages ("DIR/config.json")."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = ""):
        self.source = source
        self._values = values
        self._prefix = prefix
        self._taken: set[str] = set()

    def error(self, name: str, problem: str) -> FieldError:
        """An error about field ``name``: where it is, its value, and ``problem`` (what is wrong and what to do)."""
        shown = "is missing" if name not in self._values else f"is {self._values[name]!r}"
        return FieldError(f"{self.source}: {self._prefix}{name} {shown}: {problem}")

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The field's value as it stands; null and absent give ``default``."""
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise self.error(name, "the model needs it, take it from the model's published config.json")
        return default

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """An integer (True and 3.0 are none)."""
        value = self.take(name, default)
        if self.given(name) and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(name, "it must be an integer")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number, as a float."""
        value = self.take(name, default)
        if not self.given(name):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, "it must be a finite number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        value = self.take(name, default)
        if self.given(name) and not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def nullable_integer(self, name: str) -> int | None:
        """An integer or null; the field itself must be there, since readers disagree about its default."""
        if name not in self._values:
            raise self.error(name, "state it, as an integer or null")
        return self.integer(name, None)

    def only(self, name: str, supported: Any, why: str) -> None:
        """Take a field that may be absent, null or ``supported`` and nothing else."""
        value = self.take(name, supported)
        same_kind = isinstance(value, bool) == isinstance(supported, bool)
        if not same_kind or value != supported:
            raise self.error(name, f"{why}; only {supported!r} is supported")

    def nested(self, name: str) -> Fields | None:
        """The object in field ``name``, or None when null or absent."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "it must be an object or null")
        return Fields(value, self.source, f"{self._prefix}{name}.")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuse every field that was not taken, is not null, and is not in ``harmless``."""
        for name, value in self._values.items():
            if value is not None and name not in self._taken and name not in harmless:
                raise self.error(
                    name,
                    "this field is unknown and may change what the model computes; remove it if the model does not "
                    "depend on it, otherwise the model is not supported",
                )
