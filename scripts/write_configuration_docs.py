#!/usr/bin/env python3
"""Writes docs/configuration.md from the types, defaults and docstrings in horovod_megdet/config/schema.py.

``--check`` writes nothing and fails when the page is not what would be written.
"""

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from horovod_megdet.config import Config, Section, section_type

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/write_configuration_docs.py from horovod_megdet/config/schema.py. Change it there. -->

A configuration is a YAML file with the sections below; what it leaves out has the default. Every amount is in images or
epochs, never in iterations, so that one file is right for any number of ranks that can share its mini-batch and its BN
groups; `megdet plan` says whether they can.

```yaml
base: coco/base.yaml   # optional: a file, relative to this one, or `demo`; this file overrides its values key by key
solver:
  base_lr: 0.01
  milestones: [8, 10]
```

`--set section.key=value` on the command line overrides both, and may be given more than once; the value is YAML:
`--set solver.base_lr=0.01 --set "solver.milestones=[8, 10]"`. A base may have a base, too. Relative paths start from
the working directory, only that of a base from the file that names it. Unknown keys, wrong types and impossible
combinations are errors that name the file and the key. Each run keeps its complete configuration as `config.yaml` in
the run directory.
"""

BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"{PAGE} is not up to date: run python scripts/write_configuration_docs.py\n")
        return 1
    return 0


def page() -> str:
    """The whole page."""
    sections = [section(name, section_type(name)) for name in Config.model_fields]
    return "\n".join([INTRODUCTION, *sections])


def section(name: str, fields: type[Section]) -> str:
    """A heading, the section's docstring and a table of its keys."""
    rows = [
        f"| `{key}` | {allowed(field.annotation, field.metadata)} | {default(field)} | {explanation(field)} |"
        for key, field in fields.model_fields.items()
    ]
    table = "\n".join(["| key | value | default | meaning |", "| --- | --- | --- | --- |", *rows])
    return f"## {name}\n\n{fields.__doc__}\n\n{table}\n"


def allowed(annotation: Any, metadata: list[Any]) -> str:
    """What a value may be, in words: `whole number > 0`, or the choices of a Literal."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, *further = arguments
        return allowed(kind, [bound for field in further for bound in field.metadata])
    if origin is Literal:
        return ", ".join(code(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(argument, []) for argument in arguments)
    if origin is tuple:
        return f"list of {allowed(arguments[0], []).replace('number', 'numbers', 1)}"
    if annotation is bool:
        return "`true`, `false`"
    name = {int: "whole number", float: "number", str: "text", type(None): "`null`"}[annotation]
    bounds = {key: getattr(bound, key) for bound in metadata for key in BOUNDS if hasattr(bound, key)}
    return " ".join([name, ", ".join(BOUNDS[key].format(f"{value:g}") for key, value in bounds.items())]).strip()


def default(field: FieldInfo) -> str:
    """The default as one would write it in YAML."""
    value = field.default
    return code(list(value) if isinstance(value, tuple) else value)


def explanation(field: FieldInfo) -> str:
    """The docstring of the key on one line."""
    return " ".join((field.description or "").split()).replace("|", "\\|")


def code(value: Any) -> str:
    """A value as YAML, between backquotes; plain text needs no quotes."""
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main())
