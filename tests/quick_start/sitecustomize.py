"""Halves the time that a rank takes to start and to end, by leaving out torch's compiler.

torchvision asks at import whether ``torch.compile`` works, which imports all of ``torch._dynamo`` and SymPy: seconds of
a core for each of the many processes that the tests start. Here the answer is no, at once. At the end, the garbage
collector does not search all modules twice. Python imports this file because it is in PYTHONPATH, which the launchers
pass on.

Users do not run with it, nor do tests that compare numbers with a reference, and those of training under each launcher.
"""

import atexit
import gc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


def _disable(function: Any = None, *_: object, **__: object) -> Any:
    """As a decorator, with or without arguments."""
    return function if function is not None else lambda decorated: decorated


ANSWERS = {
    "torch._dynamo": {"disable": _disable, "graph_break": lambda *_, **__: None, "__path__": []},
    "torch._dynamo.utils": {"is_compile_supported": lambda device: False},
}


class WithoutCompiler:
    """Finds the modules of :data:`ANSWERS` before the import system does."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, WithoutCompiler) if name in ANSWERS else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__dict__.update(ANSWERS[module.__name__])


atexit.register(gc.freeze)
sys.meta_path.insert(0, WithoutCompiler)  # type: ignore[arg-type]
