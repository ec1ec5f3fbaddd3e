"""What a network or a loss is, as JSON: written, made again from that, and compared in words.

    None, True, 3, 0.1, "SAME", (1, 2)        themselves; a tuple is a JSON array
    inf, nan, [1, 2], {"a": 1}, {1, 2}        {"float": "inf"}, {"list": ...}, {"dict": ...}, ...
    np.float32(0.1), np.dtype("float32")      {"number": "float32", "bits": "cdcccc3d"}, ...
    Dense(3, 4), and any dataclass            {"class": "jbackprop.Dense", "fields": {"p": 3, ...}}
    Precision.HIGHEST                         {"member": "HIGHEST", "of": "jax.lax.Precision"}
    jax.nn.silu, and any other thing          {"name": "jax.nn.silu"}

Names with a dot are of jbackprop or of JAX, and stand in a table made here: nothing is imported
because a file names it. All others are a user's, who hands in what they stand for.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import itertools
import json
import math
import pkgutil
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jbackprop import compose, layers, losses
from jbackprop.losses import Loss
from jbackprop.sweep import Node

Json = Any
"""What JSON can say: None, bool, int, float, str, list and dict of these."""


class FormatError(ValueError):
    """What was saved cannot be read; the message names the file, what is wrong, and the remedy."""


def configuration(value: Any) -> Json:
    """A network, a loss, a rule or an optimizer as JSON, to be kept, or compared as a text.

    Equal configurations give equal JSON, in every process. Functions and classes of a user's are
    told apart by their names, and by the numbers and texts that they close over, not by their code;
    things that are neither, by the names of their classes.

    Args:
        value: anything; it never fails.

    Returns:
        JSON, as the module's docstring has it.
    """
    return Encoder().encode(value)


class Encoder:
    """Writes configurations; `known` has what is of the user's, by the names that it got."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def encode(self, value: Any) -> Json:
        """See `configuration`."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is tuple:
            return [self.encode(item) for item in value]
        if kind is list:
            return {"list": [self.encode(item) for item in value]}
        if kind is dict:
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if kind in (set, frozenset):
            return {kind.__name__: sorted(map(self.encode, value), key=json.dumps)}
        if kind is complex:
            return {"complex": [self.encode(value.real), self.encode(value.imag)]}
        if isinstance(value, np.dtype):
            return {"dtype": value.name}
        if isinstance(value, np.generic) and value.dtype.kind in "biufcV":
            return {"number": value.dtype.name, "bits": value.tobytes().hex()}
        if isinstance(value, enum.Enum) and value.name in kind.__members__:
            return {"member": value.name, "of": self._name(kind)}
        names = field_names(kind)
        if names is not None:
            fields = {name: self.encode(getattr(value, name, None)) for name in names}
            return {"class": self._name(kind), "fields": fields}
        held = _held(value)
        return {"name": self._name(value)} | ({"holds": held} if held else {})

    def _name(self, value: Any) -> str:
        """One name for one thing: of two lambdas, the second is `<lambda>#2`."""
        if id(value) in _NAMES:
            return _NAMES[id(value)]
        own = own_name(value)
        for number in itertools.count(1):
            name = own if number == 1 else f"{own}#{number}"
            found = self.known.setdefault(name, value)
            if found is value or (isinstance(value, types.MethodType) and found == value):
                return name
        raise AssertionError


def field_names(kind: type) -> list[str] | None:
    """The fields that a dataclass or a NamedTuple is made from; None for any other class."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    return list(getattr(kind, "_fields", ())) if issubclass(kind, tuple) else None


def own_name(value: Any) -> str:
    """What a thing calls itself: the name of a function or a class, else that of its class."""
    return str(getattr(value, "__name__", type(value).__name__)).replace(".", "_")


def _held(value: Any, outer: tuple[int, ...] = ()) -> list[Json]:
    """The numbers, texts and functions that a function closes over or has as arguments."""
    if id(value) in outer or len(outer) > 12 or id(value) in _NAMES:
        return []
    outer = (*outer, id(value))
    parts: tuple[Any, ...] = ()
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *itertools.chain(*sorted(value.keywords.items())))
    elif callable(value) and not isinstance(value, type):
        for cell in getattr(inspect.unwrap(value), "__closure__", None) or ():
            try:
                parts = (*parts, cell.cell_contents)
            except ValueError:  # not assigned yet
                parts = (*parts, None)
    elif isinstance(value, tuple):
        parts = value
    held = []
    for part in parts:
        if part is None or type(part) in (bool, int, float, str, complex, np.dtype):
            held.append(Encoder().encode(part))
        else:
            inner = _held(part, outer)
            name = _NAMES.get(id(part), own_name(part))
            held.append({"name": name} | ({"holds": inner} if inner else {}))
    return held


def construct(config: Json, known: Mapping[str, Any], path: str) -> Any:
    """What a configuration says, made by the constructors of its classes.

    Args:
        config: of `Encoder.encode`.
        known: what the names of the user's stand for.
        path: what this is, for messages.

    Raises:
        FormatError: what cannot be made, and why.
    """
    match config:
        case None | bool() | int() | float() | str():
            return config
        case list():
            return tuple(construct(c, known, f"{path}[{i}]") for i, c in enumerate(config))
        case {"class": str(name), "fields": dict(fields)}:
            cls = _resolved(name, known, path)
            if not isinstance(cls, type) or field_names(cls) is None:
                raise FormatError(f"{path}: {name} must be a dataclass, but {cls!r} was given")
            made = {key: construct(c, known, f"{path}.{key}") for key, c in fields.items()}
            return _guarded(lambda: _called(cls, made), f"{path}: {name} cannot be made of these")
        case {"name": str(name)}:
            return _resolved(name, known, path)
        case {"member": str(member), "of": str(name)}:
            return _guarded(lambda: _member(_resolved(name, known, path), member), path)
        case {"list": list(items)}:
            return list(construct(items, known, path))
        case {"dict": list(items)}:
            return _guarded(lambda: dict(construct(items, known, path)), f"{path}: no dict")
        case {"set": list(items)}:
            return _guarded(lambda: set(construct(items, known, path)), f"{path}: no set")
        case {"frozenset": list(items)}:
            return _guarded(lambda: frozenset(construct(items, known, path)), f"{path}: no set")
        case {"float": str(text)}:
            return _guarded(lambda: float(text), f"{path}: no number")
        case {"complex": list(items)}:
            return _guarded(lambda: complex(*construct(items, known, path)), f"{path}: no number")
        case {"dtype": str(name)}:
            return _guarded(lambda: np.dtype(name), f"{path}: no dtype")
        case {"number": str(name), "bits": str(bits)}:
            return _guarded(
                lambda: np.frombuffer(bytes.fromhex(bits), np.dtype(name))[0], f"{path}: no number"
            )
    raise FormatError(f"{path}: {json.dumps(config)[:80]} is nothing that is known here")


def _guarded(make: Any, what: str) -> Any:
    try:
        return make()
    except FormatError:
        raise
    except Exception as error:  # a constructor may raise anything
        raise FormatError(f"{what}: {error}") from error


def _called(cls: type, fields: dict[str, Any]) -> Any:
    """The class, called with its fields; `Sequential(*layers)` takes those of one of them."""
    args: list[Any] = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args = fields.pop(parameter.name)
    return cls(*args, **fields)


def _member(kind: Any, name: str) -> Any:
    if not isinstance(kind, enum.EnumType) or name not in kind.__members__:
        raise FormatError(f"{kind!r} has no member {name}")
    return kind[name]


def _resolved(name: str, known: Mapping[str, Any], path: str) -> Any:
    found = PUBLIC.get(name, known.get(name))
    if found is None:
        raise FormatError(f"{path}: nobody said what {name} is")
    return found


def unresolved(config: Json, known: Mapping[str, Any], path: str) -> dict[str, str]:
    """The names that stand for nothing, with the first path of each."""
    found: dict[str, str] = {}
    for at, part in _parts(config, path):
        for key in ("class", "name", "of") if isinstance(part, dict) else ():
            name = part.get(key)
            if isinstance(name, str) and name not in PUBLIC and name not in known:
                found.setdefault(name, at)
    return found


def _parts(config: Json, path: str) -> Iterator[tuple[str, Json]]:
    """Every part of a configuration, with its path."""
    yield path, config
    for suffix, child in _children(config):
        if suffix != _HOLDS:  # which is for comparing only
            yield from _parts(child, path + suffix)


_HOLDS = ".holds"


def _children(config: Json) -> list[tuple[str, Json]]:
    """The parts of a configuration, and what they add to its path."""
    if isinstance(config, list):
        return [(f"[{i}]", child) for i, child in enumerate(config)]
    if not isinstance(config, dict):
        return []
    fields = config.get("fields")
    if isinstance(fields, dict):
        return [(f".{name}", child) for name, child in fields.items()]
    kinds = {"list": "", "dict": "", "set": "", "frozenset": "", "holds": _HOLDS}
    return [(suffix, config[kind]) for kind, suffix in kinds.items() if kind in config]


def by_name(known: Mapping[str, Any] | Iterable[Any] | None) -> dict[str, Any]:
    """What a user hands in, by name.

    Raises:
        TypeError: neither a list nor a dict.
        ValueError: two of a list have the same name.
    """
    if isinstance(known, Mapping):
        return dict(known)
    if isinstance(known, type) or not isinstance(known, Iterable | None):
        raise TypeError(f"known must be a list or a dict of functions and classes, not {known!r}")
    found: dict[str, Any] = {}
    for value in known or ():
        name = own_name(value)
        if found.setdefault(name, value) is not value:
            raise ValueError(
                f"known: two are called {name}; give a dict, with the names that load asks for"
            )
    return found


def difference(
    first: Json,
    second: Json,
    where: tuple[str, str] = ("in the first", "in the second"),
    path: str = "net",
) -> str | None:
    """Where two configurations first differ, in words; None where they are equal.

    Args:
        first, second: of `configuration`.
        where: what to call each, as in "net.layers[2].q is 10 in the file, 12 here".
        path: what they are configurations of.
    """
    if _text(first) == _text(second):
        return None
    children, others = _children(first), _children(second)
    named = ("class", "name", "of") if isinstance(first, dict) and isinstance(second, dict) else ()
    alike = type(first) is type(second) and all(first.get(k) == second.get(k) for k in named)
    if alike and [s for s, _ in children] == [s for s, _ in others]:
        for (suffix, one), (_, other) in zip(children, others, strict=True):
            found = difference(one, other, where, path + suffix)
            if found is not None:
                return found
    if alike and isinstance(first, list) and len(first) != len(second):
        shared = min(len(first), len(second))
        found = difference(first[:shared], second[:shared], where, path)
        return found or f"{path} has {len(first)} items {where[0]}, {len(second)} {where[1]}"
    return f"{path} is {_shown(first)} {where[0]}, {_shown(second)} {where[1]}"


def _text(config: Json) -> str:
    return json.dumps(config, sort_keys=True)


def _shown(config: Json, longest: int = 120) -> str:
    """A configuration as one would type it."""
    text = _typed(config)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _typed(config: Json) -> str:
    match config:
        case list():
            return f"({', '.join(map(_typed, config))}{',' if len(config) == 1 else ''})"
        case {"class": str(name), "fields": dict(fields)}:
            inner = ", ".join(f"{key}={_typed(child)}" for key, child in fields.items())
            return f"{name.removeprefix('jbackprop.')}({inner})"
        case {"name": str(name)}:
            held = config.get("holds")
            return name + (f" with {', '.join(map(_typed, held))}" if held else "")
        case {"number": str(name)}:
            return f"{name}({construct(config, {}, '')})"
        case {"member": str(member), "of": str(name)}:
            return f"{name}.{member}"
        case dict():
            return ", ".join(f"{child}" for child in config.values())
    return repr(config)


_INITIALISER = ["key", "shape", "dtype"]


def _is_ours(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value.__module__.startswith("jbackprop.")


def _public() -> dict[str, Any]:
    """What may be named in a file: layers, composites and losses, and functions of JAX."""
    found: dict[str, Any] = {}
    for package in (layers, compose, losses):
        for name, value in vars(package).items():
            if not isinstance(value, type) or not issubclass(value, Node | Loss):
                continue
            if dataclasses.is_dataclass(value) and not inspect.isabstract(value):
                found[f"jbackprop.{name}"] = value
                defaults = (field.default for field in dataclasses.fields(value))
                found |= {f"jbackprop.{f.__name__}": f for f in defaults if _is_ours(f)}
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            for name, value in vars(importlib.import_module(info.name)).items():
                if _is_ours(value) and [*inspect.signature(value).parameters] == _INITIALISER:
                    found[f"jbackprop.{name}"] = value
    for module in (jax.nn, jax.nn.initializers, jax.numpy, jax.lax, jax.scipy.special):
        for name, value in vars(module).items():
            if callable(value) and not name.startswith(("_", "load", "save", "from")):
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = _public()
"""What names with a dot stand for."""

_NAMES = {id(value): name for name, value in reversed(PUBLIC.items())}  # the first name wins
