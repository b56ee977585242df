"""Dataclasses of counters: sums over rollouts, calls of a tool loop and ranks, read back from a checkpoint."""

from dataclasses import fields
from typing import Any, Self

from trl_selfspec.control.saved_state import checked, positive


MAXIMA = ("_bytes", "history_tokens")  # ends of names whose sum is a maximum


class Counters:
    """A dataclass whose fields are numbers, lists of numbers, other `Counters`, and dicts of these by name.

    Every field has a default. A dict's field names the class of its values as `metadata["values"]`.
    """

    def __iadd__(self, other: Self) -> Self:
        for f in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name.endswith(MAXIMA) else _sum(mine, theirs))
        return self

    def merge(self, other: Self) -> Self:
        """A new sum of both."""
        total = type(self)()
        total += self
        total += other
        return total

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of `dataclasses.asdict`, for values read from a file; a counter that it lacks keeps its default.

        Raises:
            ValueError: `values` are something else.
        """
        if not isinstance(values, dict):
            raise ValueError("it holds no counters")
        counters = cls()
        for f in fields(cls):  # type: ignore[arg-type]
            if f.name in values:
                default = getattr(counters, f.name)
                setattr(counters, f.name, _restored(default, values[f.name], f.metadata.get("values")))
        return counters


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    if isinstance(a, dict):
        both = {name: a[name].merge(b[name]) for name in a.keys() & b.keys()}
        return a | b | both
    return a.merge(b) if isinstance(a, Counters) else a + b


def _restored(default: Any, value: Any, kind: type[Counters] | None) -> Any:
    if isinstance(default, Counters):
        return type(default).from_dict(value)
    if isinstance(default, dict):
        assert kind is not None, "the field says of what class its values are"
        return {str(name): kind.from_dict(one) for name, one in checked(isinstance(value, dict), value).items()}
    if isinstance(default, list):
        checked(isinstance(value, list) and len(value) == len(default), value)
        return [positive(count, or_zero=True) for count in value]
    return type(default)(positive(value, or_zero=True))
