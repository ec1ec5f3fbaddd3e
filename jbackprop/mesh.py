"""Calls on arrays that lie on a mesh of explicit axes, where the type of an array says its split.

Of explicit axes JAX asks with every operation how its result is split, and refuses those where
that is not plain, as a contraction of axes that are both split. The rules of this library say
nothing of devices. So a call works on such arrays as on those of automatic axes, where the compiler
decides, and states in the end, in a declaration of its own, how its results are split:

    like(params)        as the parameters are: gradients, and what else is a tree like params
    examples(x)         the leading axis as that of x is: costs, norms, outputs, pairs
    WHOLE               whole on every device: sums over the examples, curvature

Where no argument lies on explicit axes nothing is done at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
_F = TypeVar("_F", bound=Callable[..., Any])

WHOLE: Any = PartitionSpec()
"""On every device all of it."""


def on_mesh(out: Callable[..., PyTree], compiled: bool = True) -> Callable[[_F], _F]:
    """Let a function work on arrays of explicit axes.

    Args:
        out: from the arguments of the function to how its results are split: a tree of
            `PartitionSpec`, or a prefix of it.
        compiled: whether the function is one program, as under `jax.jit`. Not where it is made anew
            for every call.
    """

    def decorate(f: _F) -> _F:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = next(filter(None, map(_explicit_mesh, leaves)), None)
            if mesh is None:
                return f(*args, **kwargs)
            data = [v for v in leaves if isinstance(v, _DATA)]
            rest = tuple(None if isinstance(v, _DATA) else v for v in leaves)
            run = _compiled if compiled else _run
            return run(_Call(f, out, tree, rest), mesh, data)

        return call if EXPLICIT else f  # type: ignore[return-value]

    return decorate


EXPLICIT = jax.__version_info__ >= (0, 7, 0)
"""Whether this JAX has `jax.sharding.auto_axes`. Before it, meshes need automatic axes."""
_DATA = (jax.Array, np.ndarray, np.generic, float)
"""What is an argument of the compiled program; all else is a part of it."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function and its arguments, but for the arrays among them.

    Attributes:
        f: the function.
        out: how its results are split.
        tree: the structure of its arguments.
        rest: their leaves, with None for those that are arrays.
    """

    f: Callable[..., Any]
    out: Callable[..., PyTree]
    tree: Any
    rest: tuple[Any, ...]

    def arguments(self, data: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All of them."""
        left = iter(data)
        return self.tree.unflatten([next(left) if v is None else v for v in self.rest])


def _run(call: _Call, mesh: Any, data: list[Any]) -> Any:
    def automatic(*data: Any) -> Any:
        args, kwargs = call.arguments(list(data))
        return call.f(*args, **kwargs)

    args, kwargs = call.arguments(data)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), call.out(*args, **kwargs))
    return jax.sharding.auto_axes(automatic, out_sharding=where)(*data)


_compiled = jax.jit(_run, static_argnums=(0, 1))


def _explicit_mesh(leaf: Any) -> Any:
    """The mesh of explicit axes that an array lies on; None if there is none."""
    if not isinstance(leaf, jax.Array):
        return None
    if not isinstance(leaf, jax.core.Tracer) and not isinstance(leaf.sharding, NamedSharding):
        return None
    mesh = jax.typeof(leaf).sharding.mesh
    return mesh if jax.sharding.AxisType.Explicit in mesh.axis_types else None


def like(tree: PyTree) -> PyTree:
    """As the arrays of a tree are split; those that are not on explicit axes, whole."""
    return jax.tree.map(_spec, tree)


def examples(tree: PyTree) -> Any:
    """How the leading axis of arrays (B, ...) is split, of the first that is split there."""
    specs = (_spec(leaf) for leaf in jax.tree.leaves(tree))
    return PartitionSpec(next((spec[0] for spec in specs if len(spec) and spec[0]), None))


def stacked(spec: Any, axes: int) -> Any:
    """The same behind so many axes that are whole, such as those of copies."""
    return PartitionSpec(*(None,) * axes, *spec)


def _spec(leaf: Any) -> PartitionSpec:
    return WHOLE if _explicit_mesh(leaf) is None else jax.typeof(leaf).sharding.spec


def shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes of arrays, without where they lie: for `jax.eval_shape`."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, _ARRAYS) else leaf

    return jax.tree.map(shape, tree)


_ARRAYS = (jax.Array, np.ndarray, np.generic)
