"""Names and amounts in sentences."""

from collections.abc import Iterable

SHOWN = 6
"""Names that a sentence lists."""


def some(names: Iterable[str], shown: int = SHOWN) -> str:
    """`a, b, c`; the first names and the number of the others where there are many: `a, b, c, d, e, f and 2 more`."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 passes`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


def size(number: float) -> str:
    """A number of bytes: `64 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{_short(number)} {unit}"
        number /= 1024
    return f"{_short(number)} TiB"


def seconds(number: float) -> str:
    """A time in seconds: `1.5 s`, `20 ms`, `3 us`."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{_short(number * factor)} {unit}"
    return f"{_short(number * 1e6)} us"


def _short(number: float) -> str:
    """Three digits, or all those before the decimal point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
