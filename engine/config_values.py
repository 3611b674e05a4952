"""From parsed YAML to frozen dataclasses: the one place that checks keys and types. Errors name the key in full."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from engine.errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], data: object, where: str) -> T:
    """Make a dataclass from parsed YAML, with errors that name the key in full."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'configuration'}: expected a mapping, got {show(data)}")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass by contract
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"{path}: unknown key; known: {', '.join(sorted(known))}")
        values[str(key)] = _convert(hints[key], value, path)
    return kind(**values)


def _convert(hint: object, value: object, path: str) -> object:
    """`value` as the annotated type `hint`, or a ConfigError; ints widen to floats, nothing else is coerced."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, got {show(value)}")
        return tuple(_convert(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value, path)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {show(value)}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {show(value)}")
    return value


def apply_override(data: dict[str, object], override: str) -> None:
    """Set the value that `key.path=value` names, in place; the value is YAML. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key=value")
    node: object = data
    *parents, last = key.split(".")
    for part in parents:
        node = _step_into(node, part, key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not valid YAML") from error
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {key}: no such key")


def _step_into(node: object, part: str, key: str) -> object:
    """The child of a mapping or list on the way to an override; `models` and its first entry are made if absent."""
    if isinstance(node, dict):
        return node.setdefault(part, [{}] if part == "models" else {})
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    raise ConfigError(f"--set {key}: there is no {part!r}")


def show(value: object) -> str:
    """A value as an error shows it: its type and itself, cut."""
    return f"{type(value).__name__} {value!r}"[:80]


def find_paths(data: Mapping[str, object], folder: Path) -> None:
    """Make the paths absolute that exist relative to `folder` or its parent; leave all else for later checks."""
    models = data.get("models")
    models = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    for model in models:
        keys = {"draft": "path", "verifier": "head", "diffusion": "drafter"}
        for entry, key in ((model, "path"), *((model.get(section), key) for section, key in keys.items())):
            if not isinstance(entry, dict):
                continue
            path = entry.get(key)
            if not isinstance(path, str) or path in ("", "demo") or "\0" in path:
                continue
            places = (place / path for place in (folder, folder.parent))
            found = next((place for place in places if os.path.lexists(place)), None)
            if found is not None:
                entry[key] = os.path.normpath(found)
