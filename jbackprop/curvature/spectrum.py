"""Largest eigenvalues and spectral densities, of the whole matrix and layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.checks import check_key, flag_of, number_of
from jbackprop.curvature.products import ggn_of, hessian_of
from jbackprop.curvature.sweeps import (
    Group,
    Model,
    check_model,
    check_number,
    layers_of,
    pairs_of,
)
from jbackprop.factored import Nothing, PyTree, wide_dtype, widest_dtype
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, on_mesh

Matrix = Literal["ggn", "hessian"]
_DENSE = 64  # sides of a matrix that is written out rather than asked


def top_eigenvalues(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    number: int = 1,
    matrix: Matrix = "ggn",
    *,
    key: Array | None = None,
    per_layer: bool = False,
    vectors: bool = False,
    tolerance: float = 1e-3,
) -> Any:
    """The eigenvalues of largest size of the Gauss-Newton matrix or the Hessian of the mean cost.

    By the implicitly restarted Lanczos method of ARPACK, as it is in SciPy: some tens of products.
    It runs on the host, and so not under `jax.jit`.

    Source: Lehoucq, Sorensen and Yang, ARPACK users' guide (1998).

    Args:
        net, loss, params, x, y: as in `hessian_product`.
        number: how many.
        matrix: "ggn" or "hessian".
        key: for layers that draw, and for where Lanczos begins; by default `jax.random.key(0)`
            serves that.
        per_layer: of the layers' diagonal blocks instead, copies of a scanned layer together.
        vectors: whether to give the eigenvectors too.
        tolerance: relative error that eigenvalues may have.

    Returns:
        (number,) NumPy numbers, the largest by absolute value first; fewer where there are fewer
        parameters. With `vectors` a pair of these and a tree like params with an axis of eigen-
        vectors in front (for a layer's block, 0 outside it). With `per_layer` an `OrderedDict` of
        such by the layer's name. What is frozen has no part.

    Raises:
        ValueError: as `hessian_product`; options out of range.
        scipy.sparse.linalg.ArpackNoConvergence: it did not converge.
    """
    _check_matrix(net, loss, params, x, y, matrix, key, per_layer)
    check_number("number", number)
    flag_of(vectors, "vectors")
    tolerance = number_of(tolerance, "tolerance", least=0)
    start = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
    data = (params, x, y, key)

    def of(group: Group) -> Any:
        block = _Block(net, loss, matrix, group.leaves)
        size = block.size(params)
        v0 = jax.random.normal(start, (size,), block.dtype(params))
        values, found = _largest(lambda v: block.product(*data, v), v0, number, tolerance)
        return (values, block.spread(params, found.T)) if vectors else values

    groups = _blocks(net, params, x, per_layer)
    found = OrderedDict((group.name, of(group)) for group in groups)
    return found if per_layer else found[_ALL]


def _largest(
    product: Callable[[Any], Any], start: Array, number: int, tolerance: float
) -> tuple[Any, Any]:
    """Eigenvalues and eigenvectors (size, number) of largest absolute value."""
    import scipy.sparse.linalg as sparse  # here: it takes long to import

    size, dtype = start.shape[0], start.dtype

    def times(v: Any) -> Any:
        return np.asarray(product(jnp.asarray(v, dtype)))

    if size <= max(_DENSE, 2 * number + 1):
        dense = np.stack([times(row) for row in np.eye(size)])
        values, found = np.linalg.eigh((dense + dense.T) / 2)
    elif not np.any(times(start)):  # a matrix of zeros, which ARPACK refuses
        values, found = np.zeros(number, dtype), np.eye(size, number, dtype=dtype)
    else:
        operator = sparse.LinearOperator(
            (size, size), matvec=lambda v: times(v.reshape(-1)), dtype=dtype
        )
        values, found = sparse.eigsh(
            operator, number, which="LM", v0=np.asarray(start), tol=tolerance
        )
    order = np.argsort(-np.abs(values))[:number]
    return values[order], found[:, order]


class Density(NamedTuple):
    """A spectral density, smoothed.

    Attributes:
        eigenvalues: where, (points,).
        density: how many eigenvalues there are, as a share of all, for each unit of length; its
            integral is 1.
        nodes, weights: what was smoothed, (samples, steps): eigenvalues with shares of 1 / samples.
    """

    eigenvalues: Array
    density: Array
    nodes: Array
    weights: Array


def spectral_density(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    matrix: Matrix = "ggn",
    *,
    key: Array,
    steps: int = 64,
    samples: int = 4,
    per_layer: bool = False,
    points: int = 512,
    width: float = 0.01,
) -> Any:
    """The density of the eigenvalues of the Gauss-Newton matrix or the Hessian of the mean cost.

    Stochastic Lanczos quadrature: the eigenvalues of the tridiagonal matrix that `steps` of Lanczos
    from a random vector make, and the squares of the first entries of its eigenvectors, are nodes
    and weights of a quadrature of the spectrum as that vector sees it; the mean over vectors is the
    spectrum. Lanczos, with full reorthogonalisation, is that of the package matfree.

    Source: Lin, Saad and Yang, Approximating spectral densities of large matrices (2016); Ghorbani,
    Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density
    (2019).

    Args:
        net, loss, params, x, y, matrix, per_layer: as in `top_eigenvalues`.
        key: for the vectors, and for layers that draw.
        steps: products for each vector; fewer where there are fewer parameters. steps vectors of
            the size of the parameters are held.
        samples: how many vectors.
        points: of the grid.
        width: the standard deviation of the normal density that each node is smoothed with, as a
            part of the range of the nodes.

    Returns:
        A `Density`; with `per_layer` an `OrderedDict` of such by the layer's name.

    Raises:
        ValueError: as `hessian_product`; options out of range.
        ImportError: matfree is not installed: `pip install 'jbackprop[solvers]'`.
    """
    _check_matrix(net, loss, params, x, y, matrix, key, per_layer)
    check_key(key)
    for name, value in (("steps", steps), ("samples", samples), ("points", points)):
        check_number(name, value)
    width = number_of(width, "width", above=0)
    keys = jax.random.split(jax.random.fold_in(key, 1), samples)
    data = (params, x, y, key)

    def of(group: Group) -> Density:
        block = _Block(net, loss, matrix, group.leaves)
        nodes, weights = _quadrature(block, steps, *data, keys)
        return _smoothed(nodes, weights, points, width)

    groups = _blocks(net, params, x, per_layer)
    found = OrderedDict((group.name, of(group)) for group in groups)
    return found if per_layer else found[_ALL]


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1))
def _quadrature(
    block: _Block, steps: int, params: PyTree, x: Any, y: Any, draw: Array, keys: Array
) -> tuple[Array, Array]:
    """Nodes and weights (samples, steps), one vector after the other."""
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError(
            "spectral_density takes Lanczos from matfree: pip install 'jbackprop[solvers]'"
        ) from error
    size = block.size(params)
    lanczos = decomp.tridiag_sym(min(steps, size), materialize=False, custom_vjp=False)

    def one(key: Array) -> tuple[Array, Array]:
        start = jax.random.rademacher(key, (size,), block.dtype(params))
        made = lanczos(lambda v: block.product(params, x, y, draw, v), start)
        values, vectors = jnp.linalg.eigh(_tridiagonal(*made.J_small))
        return values, jnp.square(vectors[0])

    return lax.map(one, keys)


def _tridiagonal(diagonal: Array, beside: Array) -> Array:
    """The matrix that Lanczos made, up to where it found nothing more.

    A vector that is in few eigenspaces (as it is where the matrix has many zeros) is used up after
    as many steps: what is beside the diagonal is nothing but rounding then, and what comes after it
    means nothing. It is cut off, and has no weight.
    """
    scale = jnp.maximum(jnp.abs(diagonal[:-1]), jnp.abs(beside))
    scale = lax.associative_scan(jnp.maximum, scale)
    there = jnp.cumprod(jnp.abs(beside) > 100 * jnp.finfo(beside.dtype).eps * scale) == 1
    after = jnp.concatenate([jnp.ones(1, bool), there])
    beside = jnp.where(there, beside, 0)  # what is cut off may be NaN
    return jnp.diag(jnp.where(after, diagonal, 0)) + jnp.diag(beside, 1) + jnp.diag(beside, -1)


def _smoothed(nodes: Array, weights: Array, points: int, width: float) -> Density:
    counts = weights > jnp.finfo(weights.dtype).eps
    low = jnp.min(nodes, where=counts, initial=jnp.inf)
    high = jnp.max(nodes, where=counts, initial=-jnp.inf)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    scale = jnp.maximum(high - low, 1e-3 * largest)  # of one eigenvalue, still a bell
    sigma = width * jnp.where(scale > 0, scale, 1)
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, points)
    away = (grid[:, None] - nodes.reshape(1, -1)) / sigma
    bells = jnp.exp(-0.5 * jnp.square(away)) / (sigma * (2 * jnp.pi) ** 0.5)
    return Density(grid, bells @ weights.reshape(-1) / nodes.shape[0], nodes, weights)


def _check_matrix(
    net: Any, loss: Any, params: Any, x: Any, y: Any, matrix: Any, key: Any, per_layer: Any
) -> None:
    check_model(net, loss, params, x, y, key)
    flag_of(per_layer, "per_layer")
    if matrix not in get_args(Matrix):
        raise ValueError(f'matrix must be "ggn" or "hessian", not {matrix!r}')


_ALL = "all layers"


def _blocks(net: Model, params: PyTree, x: Any, per_layer: bool) -> list[Group]:
    """The diagonal blocks that are asked for, of what learns."""
    pairs = pairs_of(net, params, x)
    learning = [k for k, pair in enumerate(pairs) if not isinstance(pair, Nothing)]
    if not learning:
        raise ValueError("no parameter learns and reaches the outputs: there is no spectrum")
    if not per_layer:
        return [Group(_ALL, tuple(learning))]
    groups = [
        group._replace(leaves=tuple(k for k in group.leaves if k in learning))
        for group in layers_of(net, params, pairs)
    ]
    return [group for group in groups if group.leaves]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A diagonal block, over flat vectors in float32 at least.

    Attributes:
        net, loss, matrix: what it is of.
        leaves: the numbers of its parameters.
    """

    net: Model
    loss: Loss
    matrix: Matrix
    leaves: tuple[int, ...]

    def _own(self, params: PyTree) -> list[Array]:
        every = jax.tree.leaves(params)
        return [every[k] for k in self.leaves]

    def size(self, params: PyTree) -> int:
        """How many parameters it has."""
        return sum(leaf.size for leaf in self._own(params))

    def dtype(self, params: PyTree) -> Any:
        """That of its vectors."""
        return widest_dtype([wide_dtype(jnp.result_type(leaf)) for leaf in self._own(params)])

    def spread(self, params: PyTree, vectors: Any) -> PyTree:
        """Flat vectors (k, size) as trees like params, 0 outside the block."""
        leaves, tree = jax.tree.flatten(params)
        number, start = vectors.shape[0], 0
        found = [jnp.zeros((number, *v.shape), v.dtype) for v in leaves]
        for k in self.leaves:
            part = vectors[:, start : start + leaves[k].size]
            found[k] = jnp.asarray(part, leaves[k].dtype).reshape(found[k].shape)
            start += leaves[k].size
        return jax.tree.unflatten(tree, found)

    @on_mesh(lambda *_: WHOLE)
    @functools.partial(jax.jit, static_argnums=0)
    def product(self, params: PyTree, x: Any, y: Any, key: Array | None, vector: Array) -> Array:
        """The block times a flat vector."""
        of = hessian_of if self.matrix == "hessian" else ggn_of
        one = jax.tree.map(lambda v: v[0], self.spread(params, vector[None]))
        found = self._own(of(self.net, self.loss, params, x, y, key)(one))
        return jnp.concatenate([v.reshape(-1).astype(vector.dtype) for v in found])
