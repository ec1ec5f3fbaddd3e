"""The layers of a network, wherever they are: finding them, naming them, replacing them.

A path names a layer by its place in the composites: `layers[1].branch.layers[0]`. A scanned
composite runs many copies of one layer: they have one path for `walk`, and one each for `copies`.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jbackprop.factored import PyTree
from jbackprop.sweep import Composite, Layer, Node, no_layer


def walk(net: Node, tree: PyTree = None, path: str = "") -> Iterator[tuple[str, Layer, PyTree]]:
    """Every layer of a network in forward order: its path, the layer, its part of `tree`."""
    if not isinstance(net, Composite):
        assert isinstance(net, Layer)
        yield path or "net", net, tree
        return
    for (name, child), part in zip(net.children().items(), net.split(tree), strict=True):
        yield from walk(child, part, f"{path}.{name}" if path else name)


def copies(
    net: Node, path: str = "", shown: str = "", index: tuple[int, ...] = ()
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every copy of every layer in forward order: its own path, that of `walk`, its place there.

    The third is the index of the copy in arrays that scanned composites have stacked; () for a
    layer that nothing repeats.
    """
    if not isinstance(net, Composite):
        yield shown or "net", path or "net", index
        return
    dot, shown_dot = (f"{p}." if p else "" for p in (path, shown))
    for name, child in net.children().items():
        if net.copies is None:
            yield from copies(child, dot + name, shown_dot + name, index)
        for i in range(net.copies or 0):
            yield from copies(child, dot + name, f"{shown_dot}{name}[{i}]", (*index, i))


def by_copy(net: Node, found: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """What was found by path, in forward order, the stacks of copies taken apart."""
    return OrderedDict(
        (shown, jax.tree.map(operator.itemgetter(index), found[path]) if index else found[path])
        for shown, path, index in copies(net)
        if path in found
    )


def layers_by_copy(net: Node) -> dict[str, Layer]:
    """The layer at every path, as `by_copy` names them."""
    layers = {path: layer for path, layer, _ in walk(net)}
    return {shown: layers[path] for shown, path, _ in copies(net)}


def stack_axes(net: Node) -> dict[str, int]:
    """By path, how many axes of copies are in front of what is seen of a layer."""
    return {path: len(index) for _, path, index in copies(net)}


def parameter_paths(net: Node, tree: PyTree) -> list[str]:
    """The path of every leaf of a tree like params, in the order of `jax.tree.leaves`.

    "layers[0].w": that of the layer, and what `suffix` adds. Where a composite has parameters of
    its own, or two layers share one, so that these do not tell them apart: places in the tree.
    """
    leaves, form = jax.tree.flatten(tree)
    names: dict[int, str] = {}
    for path, _, part in walk(net, jax.tree.unflatten(form, range(len(leaves)))):
        for where, number in jax.tree_util.tree_flatten_with_path(part)[0]:
            names[number] = path + suffix(where)
    if len(set(names.values())) < len(leaves):
        places, _ = jax.tree_util.tree_flatten_with_path(tree)
        return [f"params{jax.tree_util.keystr(where)}" for where, _ in places]
    return [names[number] for number in range(len(leaves))]


def suffix(where: Any) -> str:
    """What the way to a leaf in a layer's own tree adds to the layer's path: ".w", "[0]"."""
    return "".join(map(_step, where))


def _step(key: Any) -> str:
    name = getattr(key, "key", None)
    if isinstance(name, str) and name.isidentifier():
        return f".{name}"
    return jax.tree_util.keystr((key,))


def opened(net: Node) -> Node:
    """The network whose forward sweep saves all that its layers save, wherever they are."""
    if not isinstance(net, Composite):
        return net
    return net.with_children([opened(child) for child in net.children().values()]).opened()


def untied(net: Node, params: PyTree) -> tuple[Node, PyTree]:
    """The network with parameters that no two layers share, and these."""
    if not isinstance(net, Composite):
        return net, params
    parts = zip(net.children().values(), net.split(params), strict=True)
    layers, own = zip(*(untied(child, part) for child, part in parts), strict=True)
    return net.with_children(layers).untied(net.join(own))


def rebuild(
    net: Node, tree: PyTree, change: Callable[[str, Layer, PyTree], tuple[Node, PyTree]]
) -> tuple[Node, PyTree]:
    """The network and the tree in which `change` has replaced every layer and its part."""
    changed = iter([change(*at) for at in walk(net, tree)])

    def assemble(node: Node) -> tuple[Node, PyTree]:
        if not isinstance(node, Composite):
            return next(changed)
        layers, parts = zip(*map(assemble, node.children().values()), strict=True)
        return node.with_children(layers), node.join(parts)

    return assemble(net)


def trainable_mask(net: Node, params: PyTree) -> PyTree:
    """Which parameters learn: a tree like params of bools, False inside `Frozen`.

    For `optax.masked`, so that weight decay leaves frozen parameters alone too.

    Args:
        net: a layer or a composite.
        params: its parameters, or their shapes.

    Raises:
        ValueError: params of another structure.
        TypeError: what is no network.
    """
    if not isinstance(net, Node):
        raise no_layer(net)
    if params is None:
        raise ValueError(f"params must be those of {net}, not None: they are made with init")
    if not net.learns or not isinstance(net, Composite):
        return jax.tree.map(lambda _: net.learns, params)
    parts = zip(net.children().values(), net.split(params), strict=True)
    return net.join([trainable_mask(child, part) for child, part in parts])
