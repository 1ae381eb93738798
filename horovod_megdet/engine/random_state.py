"""The states of the global random generators of one rank, in a form that ``weights_only`` loading accepts.

Training draws its random numbers from generators seeded per image, so these matter only to code that users add.
"""

import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Returns the states of Python's, NumPy's and torch's generators (CUDA: this rank's device)."""
    numpy_state: Any = np.random.get_state()
    algorithm, keys, position, has_gauss, cached = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Sets the generators to what :func:`capture` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed(number: int) -> None:
    """Seeds all of them."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
