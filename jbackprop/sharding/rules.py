"""A `Sharding`: rules by the path of a parameter, and the arrays that are split by it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jbackprop.calls import check_net
from jbackprop.checks import check_sizes
from jbackprop.factored import PyTree
from jbackprop.structure import parameter_paths, rebuild, stack_axes, suffix
from jbackprop.sweep import Node

Axes = str | tuple[str, ...] | None
"""One axis of a mesh, several (the first changes slowest), or none."""
Rule = tuple[str, PartitionSpec]
"""A regular expression of paths, and how the parameters there are split."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    r"""How a network's parameters and its mini-batches are split over the axes of a mesh.

    A parameter's path is that of its layer, as `summary` shows it, and its name there:
    ``layers[0].w``, ``layers[2].layer.layers[0].branch.layers[1].b``. Copies that are scanned have
    one path and one array, with the axis of the copies in front.

        Sharding(((r"layers\[0\]\.w$", PartitionSpec(None, "model")),), batch="data")

    A sharding with a rule put in front, which is the way to make an exception:

        dataclasses.replace(sharding, rules=((path, PartitionSpec()), *sharding.rules))

    Attributes:
        rules: pairs of a regular expression, which is searched for in the path, and a
            `PartitionSpec`. The first that is found counts. Its entries belong to the *last* axes
            of the parameter, so that the copies of a scanned stack stay together. What no rule is
            about is whole.
        batch: the axis of the mesh, or a tuple of them, that the examples are split over; None or
            () for none.
        fsdp: an axis, or a tuple of them, that every large parameter is split over in addition,
            along the longest of its axes that is whole yet and divides, the copies' not among them;
            of equal ones the first. Where there is none, and where a rule has used the axis for
            this parameter already, nothing is added.
        smallest: how many entries make a parameter large, with `fsdp`. What is smaller takes longer
            to ask for than to send.

    Raises:
        TypeError: rules that are no pairs of a text and a `PartitionSpec`; axes that are no names.
        ValueError: a rule that is no regular expression; `smallest` below 0.
    """

    rules: tuple[Rule, ...] = ()
    batch: Axes = "data"
    fsdp: Axes = None
    smallest: int = 4096

    def __post_init__(self) -> None:
        check_sizes(self, "smallest", least=0)
        for name in ("batch", "fsdp"):
            check_axes(f"Sharding: {name}", getattr(self, name))
        if not isinstance(self.rules, tuple | list):
            raise TypeError(f"Sharding: rules must be a tuple of pairs, not {self.rules!r}")
        for rule in self.rules:
            of_two = isinstance(rule, tuple | list) and len(rule) == 2
            if not (of_two and isinstance(rule[0], str) and isinstance(rule[1], PartitionSpec)):
                raise TypeError(
                    "Sharding: a rule must be a pair of a regular expression and a "
                    f"PartitionSpec, not {rule!r}"
                )
            try:
                re.compile(rule[0])
            except re.error as error:
                raise ValueError(
                    f"Sharding: the rule {rule[0]!r} is no regular expression: {error}; "
                    "re.escape makes one of a path"
                ) from error
        object.__setattr__(self, "rules", tuple(map(tuple, self.rules)))

    @property
    def examples(self) -> PartitionSpec:
        """How arrays with the examples in front, (B, ...), are split."""
        return PartitionSpec(_names(self.batch) or None)

    def specs(self, net: Node, params: PyTree, mesh: Any) -> PyTree:
        """How every parameter is split: a tree like params of `PartitionSpec`.

        Args:
            net: a layer or a composite.
            params: its parameters, or their shapes (`jax.eval_shape(net.init, key)`).
            mesh: a `Mesh`, or an `AbstractMesh`.

        Raises:
            ValueError: an axis that the mesh does not have; a rule that is about no parameter, has
                more entries than the parameter has axes, or splits an axis that its devices do not
                divide.
        """
        self.check(mesh)
        stacks, found = stack_axes(net), set()

        def of_layer(path: str, layer: Node, own: PyTree) -> tuple[Node, PyTree]:
            def spec(where: Any, leaf: Any) -> PartitionSpec:
                name = path + suffix(where)
                matching = [i for i, (rule, _) in enumerate(self.rules) if re.search(rule, name)]
                found.update(matching)
                rule = self.rules[matching[0]] if matching else None
                axes = self._by_rule(name, jnp.shape(leaf), rule, mesh)
                return PartitionSpec(*self._and_fsdp(axes, jnp.shape(leaf), stacks[path], mesh))

            return layer, jax.tree_util.tree_map_with_path(spec, own)

        specs = rebuild(net, params, of_layer)[1]
        for i, (rule, _) in enumerate(self.rules):
            if i not in found:
                raise ValueError(
                    f"the rule {rule!r} is about no parameter of this network; their paths are "
                    f"{', '.join(paths(net, params))}"
                )
        return specs

    def check(self, mesh: Any) -> None:
        """Raise where an axis is meant that the mesh does not have."""
        used = {"batch": _names(self.batch), "fsdp": _names(self.fsdp)}
        for rule, spec in self.rules:
            used[f"the rule {rule!r}"] = tuple(name for entry in spec for name in _names(entry))
        there = ", ".join(f"{name!r} of {size}" for name, size in mesh.shape.items())
        for what, names in used.items():
            for name in names:
                if name not in mesh.shape:
                    raise ValueError(
                        f"{what} names the axis {name!r}, but the axes of the mesh are {there}"
                    )

    def _by_rule(
        self, name: str, shape: tuple[int, ...], rule: Rule | None, mesh: Any
    ) -> list[Any]:
        """What the rule says of each axis of a parameter."""
        entries = () if rule is None else tuple(rule[1])
        if rule is not None and len(entries) > len(shape):
            raise ValueError(
                f"the rule {rule[0]!r} splits {len(entries)} axes, {rule[1]}, but {name} has the "
                f"shape {shape}; let the rule find other paths, or have fewer entries"
            )
        axes = [None] * (len(shape) - len(entries)) + list(entries)
        for i, entry in enumerate(axes):
            size = _devices(entry, mesh)
            if shape[i] % size:
                assert rule is not None
                raise ValueError(
                    f"{name} has the shape {shape}, and the rule {rule[0]!r} splits its axis {i} "
                    f"over {entry!r}: {shape[i]} is no multiple of {size} devices. Take another "
                    "mesh or size, or leave it whole: a rule of its own in front, "
                    f"({'^' + re.escape(name) + '$'!r}, PartitionSpec())"
                )
        return axes

    def _and_fsdp(
        self, axes: list[Any], shape: tuple[int, ...], stack: int, mesh: Any
    ) -> list[Any]:
        """The same, with `fsdp` put in."""
        names = _names(self.fsdp)
        used = {name for entry in axes for name in _names(entry)}
        if not names or math.prod(shape) < self.smallest or used & set(names):
            return axes
        size = _devices(names, mesh)
        free = [
            i for i in range(stack, len(shape))
            if not _names(axes[i]) and shape[i] and shape[i] % size == 0
        ]  # fmt: skip
        if free:
            axes[max(free, key=lambda i: shape[i])] = names[0] if len(names) == 1 else names
        return axes


def data_parallel(batch: Axes = "data") -> Sharding:
    """The examples are split, the parameters whole on every device."""
    return Sharding(batch=batch)


def fsdp(axis: Axes = "data", smallest: int = 4096) -> Sharding:
    """The examples are split, and over the same devices every large parameter.

    Args:
        axis: of the mesh, or several.
        smallest: how many entries make a parameter large.

    Source: Rajbhandari, Rasley, Ruwase and He, ZeRO: memory optimizations toward training trillion
    parameter models (2020), section 5: stage 3.
    """
    return Sharding(batch=axis, fsdp=axis, smallest=smallest)


def place(net: Node, params: PyTree, mesh: Mesh, sharding: Sharding) -> PyTree:
    """The parameters on the mesh, split as the sharding has it.

    Where the mesh has devices of several processes, every process gives the same whole parameters
    and keeps its own pieces of them.

    Args:
        net: a layer or a composite.
        params: its parameters.
        mesh: a `Mesh` of automatic or explicit axes.
        sharding: what `Sharding.specs` is asked of; it raises.
    """
    check_net(net)
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding must be a Sharding, such as fsdp() gives, not {sharding!r}")
    check_mesh(mesh)
    return put(params, sharding.specs(net, params, mesh), mesh)


def put(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """A tree of arrays on the mesh.

    Args:
        tree: of arrays; of such as lie in this process alone every process has the same.
        specs: a tree like it of `PartitionSpec`, such as from `Sharding.specs` or `specs_like`, or
            one for all: ``put((x, y), sharding.examples, mesh)``.
        mesh: a `Mesh`.

    Raises:
        ValueError: specs that do not go with the tree, or an axis that does not divide.
        TypeError: what is no mesh.
    """
    check_mesh(mesh)

    def one(leaf: Any, spec: PartitionSpec) -> jax.Array:
        where = NamedSharding(mesh, spec)
        here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if where.is_fully_addressable or not here:
            return jax.device_put(leaf, where)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda leaf: one(leaf, specs), tree)
    _check_specs(specs, tree, "the tree")
    return jax.tree.map(one, tree, specs)


def specs_like(state: PyTree, params: PyTree, specs: PyTree) -> PyTree:
    """How the state of an optimizer is split: as the parameters that its parts belong to.

    Args:
        state: any tree of arrays or shapes, such as an Optax state.
        params: the parameters, or their shapes.
        specs: a tree like params of `PartitionSpec`.

    Returns:
        A tree like the state of `PartitionSpec`: a leaf whose path ends with a parameter's, and
        that has its shape, is split as that parameter; all else, such as a count, is whole.

    Raises:
        ValueError: specs that do not go with the parameters.
    """
    _check_specs(specs, params, "params")
    known: dict[Any, tuple[tuple[int, ...], PartitionSpec]] = {}

    def note(where: Any, leaf: Any, spec: PartitionSpec) -> None:
        known[tuple(where)] = jnp.shape(leaf), spec

    jax.tree_util.tree_map_with_path(note, params, specs)

    def spec(where: Any, leaf: Any) -> PartitionSpec:
        for start in range(len(where) + 1):  # the longest path first
            shape, own = known.get(tuple(where[start:]), (None, PartitionSpec()))
            if shape == jnp.shape(leaf):
                return own
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def paths(net: Node, params: PyTree) -> list[str]:
    """The path of every parameter, in the order of `jax.tree.leaves(params)`."""
    check_net(net)
    return parameter_paths(net, params)


def check_mesh(mesh: Any) -> None:
    """Raise where it is none."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, as jax.make_mesh gives: {mesh!r}")


def check_axes(what: str, axes: Any) -> None:
    """Raise unless they are names of axes, or None."""
    names = axes if isinstance(axes, tuple | list) else (axes,)
    if axes is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be the name of an axis of the mesh, or several: {axes!r}")


def _check_specs(specs: Any, tree: PyTree, what: str) -> None:
    leaves, structure = jax.tree.flatten(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    due = jax.tree.structure(tree)
    if str(structure) != str(due) or not all(isinstance(leaf, PartitionSpec) for leaf in leaves):
        raise ValueError(
            f"specs must be a tree of PartitionSpec like {what}, {due}, not {specs!r}; "
            "Sharding.specs and specs_like make them"
        )


def _names(axes: Any) -> tuple[str, ...]:
    """The axes of one entry of a spec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _devices(axes: Any, mesh: Any) -> int:
    """How many pieces an entry of a spec makes."""
    sizes: Mapping[str, int] = mesh.shape
    return math.prod(sizes[name] for name in _names(axes))
