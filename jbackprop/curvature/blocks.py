"""Block-diagonal matrices of a network's parameters: Kronecker products, and diagonals.

With the weights of one group as a matrix W (i, o), rows the inputs, a Kronecker-factored block is

    (A (x) G) W = A W G,    A (i, i), G (o, o) symmetric

A bias that is part of it is a further row of W, for an input that is always 1. With eigenvectors
A = U diag(alpha) U^T and G = V diag(gamma) V^T, any function f of the block is

    f(A (x) G) W = U (f(alpha gamma^T) * (U^T W V)) V^T

so that in its eigenbasis a block is an array of eigenvalues (i, o), and inverting it with a damping
that is added to it, (A (x) G + lambda I)^-1, is exact and costs no more than a product.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.curvature.products import check_vector
from jbackprop.factored import Place, PyTree, promoted_sum
from jbackprop.mesh import like, on_mesh

Function = Callable[[Array], Array]
_B = TypeVar("_B")


@dataclasses.dataclass(frozen=True)
class Where:
    """Which parameters a block is of: a matrix and perhaps its bias, or one of any shape.

    Attributes:
        leaves: their numbers among the leaves of params.
        places: of each, the way to the canonical form.
        features: (i, o) of the matrix; (o,) of a bias; none for a diagonal.
    """

    leaves: tuple[int, ...]
    places: tuple[Place, ...]
    features: tuple[int, ...] = ()

    def canonical(self, parts: Sequence[Array]) -> Array:
        """(G, i, o), with the bias as last row; a bias alone is (G, 1, o)."""
        first = self.places[0].canonical(parts[0], self.features)
        if len(self.features) == 1:
            return first[:, None]
        if len(parts) == 1:
            return first
        bias = self.places[1].canonical(parts[1], self.features[1:])
        return jnp.concatenate([first, bias[:, None].astype(first.dtype)], axis=1)

    def restored(self, w: Array) -> list[Array]:
        """The inverse."""
        if len(self.features) == 1:
            return [self.places[0].restore(w[:, 0])]
        if len(self.places) == 1:
            return [self.places[0].restore(w)]
        return [self.places[0].restore(w[:, :-1]), self.places[1].restore(w[:, -1])]


class Block(abc.ABC):
    """One block: a symmetric, positive semi-definite matrix over some parameters."""

    where: Where

    @abc.abstractmethod
    def apply(self, f: Function, parts: Sequence[Array]) -> list[Array]:
        """f of the block, times a vector; f is given eigenvalues."""

    @abc.abstractmethod
    def eigenvalues(self) -> Array:
        """All of them, in an array of any shape."""

    def product(self, parts: Sequence[Array]) -> list[Array]:
        """The block times a vector."""
        return self.apply(lambda e: e, parts)

    def trace(self) -> Array:
        """The sum of its eigenvalues."""
        return jnp.sum(self.eigenvalues())

    def decomposed(self) -> Block:
        """The same in its eigenbasis."""
        return self


@dataclass_transform(frozen_default=True)
def _block(*data: str) -> Callable[[type[_B]], type[_B]]:
    """Make a class a frozen dataclass and a pytree: these are arrays, `where` is static."""

    def decorate(cls: type[_B]) -> type[_B]:
        frozen = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(frozen, list(data), ["where"])
        return frozen

    return decorate


@_block("diagonal")
class Diagonal(Block):
    """A diagonal block.

    Attributes:
        diagonal: like the parameter.
        where: which.
    """

    diagonal: Array
    where: Where

    def apply(self, f: Function, parts: Sequence[Array]) -> list[Array]:
        return [f(self.diagonal) * parts[0].astype(self.diagonal.dtype)]

    def eigenvalues(self) -> Array:
        return self.diagonal

    def with_eigenvalues(self, values: Array) -> Diagonal:
        """Another diagonal."""
        return dataclasses.replace(self, diagonal=values)


@_block("a", "g")
class Kronecker(Block):
    """A (x) G for each group.

    Attributes:
        a: of the activations, (G, i, i); (G, i) where A is diagonal, as for an embedding.
        g: of the deltas, (G, o, o).
        where: which parameters.
    """

    a: Array
    g: Array
    where: Where

    def product(self, parts: Sequence[Array]) -> list[Array]:
        w = self.where.canonical(parts).astype(self.a.dtype)
        left = self.a[:, :, None] * w if self.a.ndim == 2 else self.a @ w
        return self.where.restored(left @ self.g)

    def apply(self, f: Function, parts: Sequence[Array]) -> list[Array]:
        return self.decomposed().apply(f, parts)

    def eigenvalues(self) -> Array:
        return self.decomposed().eigenvalues()

    def trace(self) -> Array:
        a = jnp.sum(self.a, axis=1) if self.a.ndim == 2 else jnp.trace(self.a, axis1=1, axis2=2)
        return jnp.sum(a * jnp.trace(self.g, axis1=1, axis2=2))

    def decomposed(self) -> Eigen:
        alpha, u = (self.a, None) if self.a.ndim == 2 else eigh(self.a)
        gamma, v = eigh(self.g)
        alpha, gamma = (jnp.maximum(v, 0) for v in (alpha, gamma))  # below 0 by rounding
        return Eigen(alpha[:, :, None] * gamma[:, None, :], u, v, self.where)


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of symmetric matrices (n, f, f), one after the other.

    Several at once are spread over XLA's threads on a CPU; and where two such calls wait for each
    other's threads, for ever, on machines of few cores (seen with jaxlib 0.10.2).
    """

    def one(matrix: Array) -> tuple[Array, Array]:
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors

    if matrices.shape[0] == 1:
        return jax.tree.map(lambda v: v[None], one(matrices[0]))
    return lax.map(one, matrices)


@_block("values", "u", "v")
class Eigen(Block):
    """(U (x) V) diag(values) (U (x) V)^T for each group.

    Attributes:
        values: the eigenvalues, (G, i, o).
        u: the eigenvectors of the activations' side, (G, i, i); None for unit vectors.
        v: those of the deltas' side, (G, o, o).
        where: which parameters.
    """

    values: Array
    u: Array | None
    v: Array
    where: Where

    def apply(self, f: Function, parts: Sequence[Array]) -> list[Array]:
        w = self.where.canonical(parts).astype(self.values.dtype)
        turned = (w if self.u is None else jnp.matrix_transpose(self.u) @ w) @ self.v
        turned = (f(self.values) * turned) @ jnp.matrix_transpose(self.v)
        return self.where.restored(turned if self.u is None else self.u @ turned)

    def eigenvalues(self) -> Array:
        return self.values

    def with_eigenvalues(self, values: Array) -> Eigen:
        """The same eigenvectors with other eigenvalues."""
        return dataclasses.replace(self, values=values)


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal matrix over all parameters; made by `kfac` and `ekfac`.

    Vectors are trees like params. What is frozen, or has no part in the outputs, is no part of it:
    whatever it is asked to give is 0 there. A pytree: averages of two of them, of one network, are
    made by `jax.tree.map`, which for `Kronecker` blocks averages factors.

    Attributes:
        blocks: by the layer's name, in forward order; a parameter beside others of its layer that
            has a block of its own has its name behind a dot.
        tree, shapes: the structure of params, and the shapes of their leaves.
    """

    blocks: OrderedDict[str, Any]
    tree: Any
    shapes: tuple[tuple[int, ...], ...]

    @on_mesh(lambda self, vector: like(vector))
    def product(self, vector: PyTree) -> PyTree:
        """The matrix times a vector."""
        return self._of_each(lambda block, parts: block.product(parts), vector)

    @on_mesh(lambda self, f, vector: like(vector), compiled=False)
    def apply(self, f: Function, vector: PyTree) -> PyTree:
        """f of the matrix, times a vector: f is given arrays of eigenvalues."""
        return self._of_each(lambda block, parts: block.apply(f, parts), vector)

    @on_mesh(lambda self, vector, damping: like(vector))
    def solve(self, vector: PyTree, damping: Any) -> PyTree:
        """(matrix + damping I)^-1 times a vector, exactly; decomposes `Kronecker` blocks anew.

        Args:
            vector: one, or several with an axis in front.
            damping: a number.
        """
        if jnp.ndim(damping):
            raise ValueError(f"damping must be one number, not an array {jnp.shape(damping)}")
        return self.apply(lambda e: 1 / (e + jnp.asarray(damping, e.dtype)), vector)

    def trace(self) -> Array:
        """The sum of all eigenvalues."""
        return _sum([block.trace() for block in self.blocks.values()])

    def log_determinant(self, damping: Any) -> Array:
        """log det(matrix + damping I)."""
        every = [block.eigenvalues() for block in self.blocks.values()]
        return _sum([jnp.sum(jnp.log(e + jnp.asarray(damping, e.dtype))) for e in every])

    def decomposed(self) -> BlockDiagonal:
        """The same with `Kronecker` blocks in their eigenbases, for solving many times."""
        found = ((name, block.decomposed()) for name, block in self.blocks.items())
        return dataclasses.replace(self, blocks=OrderedDict(found))

    def _of_each(self, f: Callable[[Any, Any], Sequence[Array]], vector: PyTree) -> PyTree:
        if check_vector(self.tree, self.shapes, vector):
            return jax.vmap(lambda one: self._of_each(f, one))(vector)
        leaves, tree = jax.tree.flatten(vector)
        found = [jnp.zeros_like(leaf) for leaf in leaves]
        for block in self.blocks.values():
            parts = f(block, [leaves[k] for k in block.where.leaves])
            for k, part in zip(block.where.leaves, parts, strict=True):
                found[k] = part.astype(leaves[k].dtype)
        return jax.tree.unflatten(tree, found)


jax.tree_util.register_dataclass(BlockDiagonal, ["blocks"], ["tree", "shapes"])


def mix(old: Array, new: Array, share: Any) -> Array:
    """share * old + (1 - share) * new."""
    share = jnp.asarray(share, old.dtype)
    return share * old + (1 - share) * new


def _sum(values: Sequence[Array]) -> Array:
    return promoted_sum(values) if values else jnp.zeros(())
