"""Which operators run, to assert that some do not."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Notes each operator that runs, of the backward pass too, and how many values its result has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        size = result.numel() if isinstance(result, torch.Tensor) else 0
        self.calls.append((str(func), size))
        return result

    def named(self, part: str) -> set[str]:
        """The names of the operators whose name contains ``part``."""
        return {name for name, _ in self.calls if part in name}

    def of_size(self, values: int) -> list[str]:
        """The names of the operators whose results have so many values, in order."""
        return [name for name, size in self.calls if size == values]
