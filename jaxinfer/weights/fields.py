"""Reading typed fields out of an untrusted mapping (config.json, GGUF metadata), strictly.

A bool is not an integer, "64" is not 64, NaN is not a number: each is a ConfigError that names the
file, the field, the value and the rule.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxinfer.errors import ConfigError

REQUIRED: Any = object()


class Fields:
    """The fields of one mapping; `path` and `prefix` only serve the messages.

    A field that is absent, or null, takes the default; with default REQUIRED it is an error.
    """

    def __init__(self, values: Mapping[str, Any], path: object = None, prefix: str = ""):
        self.values = values
        self.path = path
        self.prefix = prefix

    def fail(self, name: str, rule: str) -> NoReturn:
        """Raise ConfigError: field `name` with the value it has breaks `rule`."""
        given = _shown(self.values[name]) if name in self.values else "it is missing"
        where = f"{self.path}: " if self.path is not None else ""
        raise ConfigError(
            f"{where}{self.prefix}{name} must be {rule}; got {given}",
            path=self.path,
            field=self.prefix + name,
        )

    def get(self, name: str, default: Any, rule: str) -> Any:
        """Return the raw value, `default` where absent or null; `rule` words the error."""
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                self.fail(name, rule)
            return default
        return value

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1) -> Any:
        rule = f"an integer >= {minimum}"
        value = self.get(name, default, rule)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(name, rule)
        return value

    def number(self, name: str, default: Any = REQUIRED, *, zero: bool = False) -> Any:
        """A finite float > 0 (>= 0 with `zero`); JSON integers count as numbers."""
        rule = f"a finite number {'>=' if zero else '>'} 0"
        value = self.get(name, default, rule)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, rule)
        try:
            number = float(value)
        except OverflowError:
            self.fail(name, rule)
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            self.fail(name, rule)
        return number

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default, "true or false")
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default, "a string")
        if value is not default and not isinstance(value, str):
            self.fail(name, "a string")
        return value

    def table(self, name: str) -> "Fields | None":
        """The nested object `name`, None where absent or null."""
        value = self.get(name, None, "an object")
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return Fields(value, self.path, f"{self.prefix}{name}.")

    def texts(self, name: str) -> list[str] | None:
        """The list of strings `name`, None where absent or null."""
        value = self.get(name, None, "a list of strings")
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, "a list of strings")
        return value


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return f"{text if len(text) <= 120 else text[:117] + '...'} ({type(value).__name__})"
