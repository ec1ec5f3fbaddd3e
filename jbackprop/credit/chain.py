"""A network as a chain of units, each with its own weights: for rules that sweep in their own way.

A unit is a layer with weights and the activation behind it, as (Dense, Tanh), with whatever is
between them and before them, as (Flatten, Dense, Tanh); what comes behind the last belongs to the
last. The activation of a unit is its output, a^l = f_l(a^{l-1}).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array

from jbackprop.factored import PyTree
from jbackprop.structure import walk
from jbackprop.sweep import (
    Collect,
    Composite,
    Node,
    Trace,
    backward,
    forward,
    inside,
)


@dataclasses.dataclass(frozen=True)
class Link:
    """One link of a chain: a node that is none itself, and its path."""

    path: str
    node: Node


Unit = tuple[Link, ...]
"""Links with one layer with weights among them."""


def links(net: Node, path: str = "") -> tuple[Link, ...]:
    """The links of a network, chains inside chains taken apart."""
    if not (isinstance(net, Composite) and net.chains):
        return (Link(path or "net", net),)
    found: list[Link] = []
    for name, child in net.children().items():
        found += links(child, f"{path}.{name}" if path else name)
    return tuple(found)


def parts(net: Node, tree: PyTree) -> list[PyTree]:
    """Each link's part of a tree like params."""
    if not (isinstance(net, Composite) and net.chains):
        return [tree]
    children = zip(net.children().values(), net.split(tree), strict=True)
    return [part for child, own in children for part in parts(child, own)]


def joined(net: Node, found: list[PyTree]) -> PyTree:
    """The tree like params that has these parts; `found` is used up."""
    if not (isinstance(net, Composite) and net.chains):
        return found.pop(0)
    return net.join([joined(child, found) for child in net.children().values()])


def units(net: Node) -> tuple[Unit, ...]:
    """The links of a network, by unit."""
    found: list[list[Link]] = [[]]
    for link in links(net):
        here = found[-1]
        again = _has_weights(link.node) and any(_has_weights(other.node) for other in here)
        behind = here and activates(here[-1]) and not activates(link)
        if again or behind:
            found.append([])
        found[-1].append(link)
    merged: list[list[Link]] = []
    while found:
        unit = found.pop(0)
        if any(_has_weights(link.node) for link in unit) or not (found or merged):
            merged.append(unit)
        elif found:
            found[0] = unit + found[0]
        else:
            merged[-1] += unit
    return tuple(map(tuple, merged))


def activates(link: Link) -> bool:
    """Whether it is an elementwise activation."""
    return hasattr(link.node, "activate")


def weighted(unit: Unit) -> int:
    """Which link of a unit has the weights."""
    return next(i for i, link in enumerate(unit) if _has_weights(link.node))


def split_units(net: Node, tree: PyTree) -> list[tuple[PyTree, ...]]:
    """Each unit's part of a tree like params: a tuple with one for each of its links."""
    found = iter(parts(net, tree))
    return [tuple(next(found) for _ in unit) for unit in units(net)]


def join_units(net: Node, found: list[tuple[PyTree, ...]]) -> PyTree:
    """The tree like params of the units' parts."""
    return joined(net, [part for unit in found for part in unit])


def check_chain(net: Node, rule: str) -> None:
    """Raise where a rule that works from unit to unit would sweep through weights inside of one."""
    for link in links(net):
        inner = [path for path, layer, _ in walk(link.node) if _has_weights(layer)]
        if isinstance(link.node, Composite) and inner:
            how = "" if link.node.learns else ". Freeze it by the optimizer instead: optax.masked"
            raise ValueError(
                f"{rule} is defined for chains of layers; {link.path}, {link.node}, is a composite "
                f"with weights inside, at {inner[0]}{how}"
            )
    for path, layer, _ in walk(net):
        if layer.couples_examples:
            raise ValueError(
                f"{rule} is not defined for {path}, {layer}: it couples the examples. Fix its "
                "statistics with fold_batch_norm, or use LayerNorm"
            )


def _has_weights(node: Node) -> bool:
    return bool(jax.tree.leaves(jax.eval_shape(node.init, jax.random.key(0))))


def unit_forward(
    unit: Unit, own: tuple[PyTree, ...], x: Any, keys: Any = None
) -> tuple[Any, tuple[Trace, ...]]:
    """The activation of a unit, and the trace of each of its links."""
    traces = []
    for i, (link, params) in enumerate(zip(unit, own, strict=True)):
        with inside(link.path, link.node):
            y, saved = forward(link.node, params, x, keys[i] if keys is not None else None)
        traces.append(link.node.trace(x, y, saved))
        x = y
    return x, tuple(traces)


def unit_backward(
    unit: Unit, own: tuple[PyTree, ...], traces: tuple[Trace, ...], delta: Any, collect: Collect
) -> tuple[Any, tuple[PyTree, ...]]:
    """From the delta of a unit's activation to that of its input, and what was collected."""
    found = []
    for link, params, trace in reversed(list(zip(unit, own, traces, strict=True))):
        with inside(link.path, link.node):
            delta, collected = backward(link.node, params, trace, delta, collect)
        found.append(collected)
    return delta, tuple(reversed(found))


def nothing(factored: PyTree, delta: Any, aux: Any) -> PyTree:
    """Collect nothing."""
    return ()


def unit_keys(net: Node, key: Array | None) -> list[Any]:
    """For each unit, a key for each of its links that draws."""
    found = iter(_keys(net, key))
    return [[next(found) for _ in unit] for unit in units(net)]


def _keys(net: Node, key: Array | None) -> list[Array | None]:
    """The key of each link, as the forward sweep hands them out."""
    if not (isinstance(net, Composite) and net.chains):
        return [key]
    children = zip(net.children().values(), net.keys(key), strict=True)
    return [own for child, part in children for own in _keys(child, part)]
