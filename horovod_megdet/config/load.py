"""From YAML files and overrides to a validated :class:`Config`, or to a sentence about what is wrong in which file.

A configuration is a YAML file with the sections of :class:`Config`. It may name one ``base`` file, whose values it
overrides key by key: a path, or ``demo`` for the configuration of the demo. ``--set section.key=value`` overrides both.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from horovod_megdet.config.schema import Config, section_type
from horovod_megdet.errors import UserError

DEMO = Path(__file__).with_name("demo.yaml")
"""The configuration of the demo, which every installation has."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, its bases and the ``section.key=value`` overrides into a validated :class:`Config`.

    Raises :class:`UserError` naming the file, the key's path and the nearest valid key.
    """
    values, sources = _read_with_bases(Path(path), ())
    return _validate(values, overrides or [], sources, str(path))


def as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """The configuration of a file, or of a dict of sections, whose values override those of its ``base`` if it has one.

    A ``base`` is the path of a YAML file, from the working directory, or ``demo``. Raises like :func:`load_config`.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    values = dict(config)
    base = values.pop("base", None)
    return merge(Config() if base is None else load_config(_base_path(base, Path(), "the configuration")), values)


def merge(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the configuration with the values of these sections in the place of its own; raises like above."""
    merged = _merge(config.model_dump(mode="json"), _without_paths(dict(values)))
    return _validate(merged, [], dict.fromkeys(_key_paths(merged), "the configuration"), "the configuration")


def _read_with_bases(path: Path, based_on_it: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file over those of its ``base``, which may have one, too; and the file that each key is from."""
    values = _read_yaml(path)
    sources = dict.fromkeys(_key_paths(values), str(path))
    base = values.pop("base", None)
    if base is None:
        return values, sources
    files, base_path = (*based_on_it, path), _base_path(base, path.parent, str(path))
    if base_path.resolve() in [file.resolve() for file in files]:
        raise UserError(f"{path}: its base is {base_path}, which is based on this file.")
    base_values, base_sources = _read_with_bases(base_path, files)
    return _merge(base_values, values), base_sources | sources


def _base_path(base: object, folder: Path, where: str) -> Path:
    if not isinstance(base, str | Path):
        raise UserError(f"{where}: base must be the path of a YAML file, not {base!r}.")
    return DEMO if base == "demo" else folder / base


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Strings in the place of paths, as in a YAML file."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else str(value) if isinstance(value, Path) else value
        for key, value in values.items()
    }


def override(config: Config, overrides: list[str]) -> Config:
    """Returns the configuration with ``section.key=value`` overrides applied; raises like :func:`load_config`."""
    return _validate(config.model_dump(mode="json"), overrides, {}, "the configuration")


def _validate(values: dict[str, Any], overrides: list[str], sources: dict[str, str], where: str) -> Config:
    for text in overrides:
        override_values = _parse_override(text)
        sources = sources | dict.fromkeys(_key_paths(override_values), f"--set {text}")
        values = _merge(values, override_values)
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, sources, where)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        repeated = _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if repeated:
        key, line = repeated.value, repeated.start_mark.line + 1
        raise UserError(f"{path}, line {line}: duplicate key `{key}`: remove one of the two.")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: the top level must be sections such as `solver:` with keys below them.")
    # A section whose keys are all commented out.
    return {key: {} if value is None and key in Config.model_fields else value for key, value in values.items()}


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The first key that a mapping has twice; YAML's loader would silently take the later value."""
    if not isinstance(node, yaml.MappingNode):
        return None
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            return key
        seen.add(str(key.value))
        if repeated := _repeated_key(value):
            return repeated
    return None


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise UserError(f"--set {override}: write section.key=value, for example --set solver.base_lr=0.01.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a valid YAML value.") from None
    for name in reversed(names):
        value = {name: value}
    return value


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _key_paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in values.items():
        paths.append(prefix + str(key))
        if isinstance(value, dict):
            paths += _key_paths(value, f"{prefix}{key}.")
    return paths


def _explain(error: pydantic.ValidationError, sources: dict[str, str], default: str) -> str:
    sentences = []
    for item in error.errors():
        names = [str(part) for part in item["loc"]]
        key = _existing_key(names, sources)
        where = sources.get(key, default)
        if item["type"] == "extra_forbidden":
            sentences.append(f"{where}: unknown key `{key}`{_nearest(names)}")
        elif item["type"] in ("model_type", "tuple_type"):
            kind = "a section with keys below it" if item["type"] == "model_type" else "a list such as [8, 10]"
            sentences.append(f"{where}: `{key}`: should be {kind}, not {item['input']!r}.")
        elif item["type"] == "too_short":
            sentences.append(f"{where}: `{key}`: the list must not be empty.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f", not {item['input']!r}"
            sentences.append(f"{where}: `{key}`: {message[0].lower()}{message[1:]}{given}{_nearest_choice(item)}")
    return "\n".join(dict.fromkeys(sentences))


def _existing_key(names: list[str], sources: dict[str, str]) -> str:
    """The longest prefix of a pydantic location that the user wrote: unions add names of their own at the end."""
    for length in range(len(names), 0, -1):
        if ".".join(names[:length]) in sources:
            return ".".join(names[:length])
    return ".".join(names)


def _nearest_choice(item: ErrorDetails) -> str:
    """The end of the sentence about a value that is not one of a few: what was meant, if that is clear."""
    choices = re.findall("'(.*?)'", item.get("ctx", {}).get("expected", "")) if item["type"] == "literal_error" else []
    close = difflib.get_close_matches(str(item["input"]), choices, n=1, cutoff=0.7)
    return f"; did you mean `{close[0]}`?" if close else "."


def _nearest(names: list[str]) -> str:
    """The end of the sentence about an unknown key: what was meant, or what is possible."""
    sections = {name: list(section_type(name).model_fields) for name in Config.model_fields}
    valid = list(sections) if len(names) == 1 else sections[names[0]]
    # Without the section's name: a long one in common would make any key look near.
    close = difflib.get_close_matches(names[-1], valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{'.'.join([*names[:-1], close[0]])}`?"
    anywhere = {key: f"{name}.{key}" for name, keys in sections.items() for key in keys}
    elsewhere = difflib.get_close_matches(names[-1], anywhere, n=1, cutoff=0.8)
    if elsewhere:
        return f"; did you mean `{anywhere[elsewhere[0]]}`?"
    return f"; valid keys here are {', '.join(valid)}."
