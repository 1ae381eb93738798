"""Names and amounts in sentences."""

from collections.abc import Iterable

SHOWN = 6
"""Names in a sentence."""


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Bytes for people to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{_short(number)} {unit}"
        number /= 1024
    return f"{_short(number)} TiB"


def seconds(number: float) -> str:
    """A time for people to read."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{_short(number * factor)} {unit}"
    return f"{_short(number * 1e6)} us"


def _short(number: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
