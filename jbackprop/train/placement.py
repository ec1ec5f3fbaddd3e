"""Where a run's arrays live: on one device, or spread over a mesh of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbackprop.factored import PyTree
from jbackprop.mesh import EXPLICIT
from jbackprop.sharding import Sharding, check_mesh, place, specs_like
from jbackprop.sweep import Node

Part = tuple[int, ...]
"""Of a batch: the examples from the first of these two up to the second."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the leaves of a tree are laid out, in order: hashable, so a static part of a step."""

    leaves: tuple[NamedSharding, ...]

    def hold(self, tree: PyTree) -> PyTree:
        """The same arrays, laid out like that."""
        leaves, structure = jax.tree.flatten(tree)
        held = [
            jax.lax.with_sharding_constraint(v, s) for v, s in zip(leaves, self.leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, held)


class Placement:
    """Puts parameters, states and batches where they belong.

    Inside a run the axes of a mesh are automatic, whatever they are outside: the compiler lays out
    what stands between the arrays that are laid out here.

    Args:
        net, params: the network.
        mesh: the devices; None for the one that JAX takes by itself.
        sharding: what is split over which axis.
    """

    def __init__(self, net: Node, params: PyTree, mesh: Mesh | None, sharding: Sharding | None):
        if mesh is None and sharding is not None:
            raise ValueError("sharding says how to split arrays over a mesh: give mesh= too")
        if mesh is not None:
            check_mesh(mesh)
        if sharding is not None and not isinstance(sharding, Sharding):
            raise TypeError(
                f"sharding must be one of jbackprop.sharding, such as sharding.fsdp(): {sharding!r}"
            )
        self._net, self._given, self.mesh = net, mesh, None
        if mesh is None:
            return
        self._sharding = sharding or Sharding()
        automatic = (AxisType.Auto,) * mesh.devices.ndim
        self.mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
        self._specs = self._sharding.specs(net, params, self.mesh)
        named = self._sharding.batch or ()
        self._axes = (named,) if isinstance(named, str) else tuple(named)

    def entered(self) -> AbstractContextManager[Any]:
        """Inside, JAX has this mesh in place of one that is set around."""
        if self.mesh is None or not EXPLICIT:
            return contextlib.nullcontext()
        return jax.set_mesh(self.mesh)

    @property
    def shards(self) -> int:
        """Into how many parts the examples of a batch are split."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in self._axes)

    def params(self, params: PyTree) -> PyTree:
        """The parameters, in their places."""
        if self.mesh is None:
            there = jax.tree.map(jnp.asarray, params)
            many = max((len(p.sharding.device_set) for p in jax.tree.leaves(there)), default=1)
            if many > 1:
                raise ValueError(
                    f"the parameters lie on {many} devices: give the mesh to train on, mesh=, or "
                    "take them to one device by jax.device_get"
                )
            return there
        return place(self._net, params, self.mesh, self._sharding)

    def like(self, params: PyTree, state: PyTree) -> PyTree:
        """The shardings of a state that goes with the parameters: shapes will do for both."""
        assert self.mesh is not None
        specs = specs_like(state, params, self._specs)
        return jax.tree.map(self._named, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

    def state(self, params: PyTree, make: Callable[[PyTree], PyTree]) -> PyTree:
        """A state, made where it belongs."""
        if self.mesh is None:
            return make(params)
        shapes = jax.eval_shape(make, params)
        return jax.jit(make, out_shardings=self.like(params, shapes))(params)

    def layout(self, *trees: PyTree) -> Layout | None:
        """That of trees of arrays which are in their places."""
        if self.mesh is None:
            return None
        return Layout(tuple(leaf.sharding for leaf in jax.tree.leaves(trees)))

    def handed_back(self, tree: PyTree) -> PyTree:
        """The same on the mesh that was given, where its axes are explicit."""
        if self.mesh is None or self.mesh == self._given:
            return tree
        assert self._given is not None
        given = self._given

        def back(v: Any) -> Any:
            if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
                data = back(jax.random.key_data(v))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(v))
            return jax.device_put(v, NamedSharding(given, v.sharding.spec))

        return jax.tree.map(back, tree)

    def parts(self, n: int) -> list[Part]:
        """Which parts of a batch of n examples the devices of this process have."""
        if self.mesh is None:
            return [(0, n)]
        found: Any = self._split(n).addressable_devices_indices_map((n,))
        return sorted({index[0].indices(n)[:2] for index in found.values()})

    def rows(self, n: int, shapes: Any, read: Callable[[Part], Any]) -> Any:
        """A batch of n examples, of which each device gets its own.

        Args:
            n: how many. They are split where that comes out even, else every device has all.
            shapes: a tree of anything with the shape (..., *rest) of what `read` gives.
            read: gives the examples of a part of the batch, as host arrays.
        """
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, read((0, n)))
        sharding = self._split(n)
        once = functools.cache(lambda part: jax.tree.leaves(read(part)))
        leaves, structure = jax.tree.flatten(shapes)

        def make(i: int, shape: tuple[int, ...]) -> Any:
            def own(index: Any) -> np.ndarray:
                return once(index[0].indices(n)[:2])[i][(slice(None), *index[1:])]

            return jax.make_array_from_callback((n, *shape[1:]), sharding, own)

        found = [make(i, np.shape(leaf)) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, found)

    def own_rows(self, tree: Any) -> Any:
        """A batch of which every process brings its part, in the order of the processes."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        n = len(jax.tree.leaves(tree)[0]) * jax.process_count()
        if jax.process_count() == 1 and n % self.shards:
            return self.rows(n, tree, lambda at: jax.tree.map(lambda v: v[slice(*at)], tree))
        if n % self.shards:
            raise ValueError(
                f"the batches of {jax.process_count()} processes have {n} examples together, which "
                f"{self.shards} shards cannot share evenly: drop or fill up the ragged one"
            )
        sharding = self._split(n)
        return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, v), tree)

    def _split(self, n: int) -> NamedSharding:
        return self._named(PartitionSpec(self._axes if n % self.shards == 0 else None))

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)
