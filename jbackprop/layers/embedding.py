"""Rows of a table: embeddings of ids, and of positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.checks import check_functions, check_key, check_sizes
from jbackprop.factored import Lookup, PyTree, Shift
from jbackprop.layers.checks import check_features, check_params
from jbackprop.layers.dense import Init
from jbackprop.sweep import Layer, Trace


def unit_rows(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers of variance 1 / width: a row has a length of about 1."""
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1])


@dataclasses.dataclass(frozen=True)
class Embedding(Layer):
    """A row of a table for every id.

    Equation, for one example with ids i_t:

        y_t = w_{i_t}                                     x (...) of integers -> y (..., width)

    Derivation. y_t is a product with a matrix, y_t = e_{i_t} W, where e_i is the i-th unit vector;
    so with delta_t = dC/dy_t, as in `Dense`,

        dC/dW = sum_t e_{i_t} (outer) delta_t             row i: the sum of the deltas where i_t = i

    The kind is `Lookup`, which never writes that sum of almost empty matrices out. Ids have no
    delta: dC/dx is None.

    An id that is not in the table, below 0 or not below `vocab`, is an error where its value can be
    seen; under `jit`, as in all the library's calls, its row is NaN, so that it cannot pass
    unnoticed, and no row gets its delta.

    Source: Bengio, Ducharme, Vincent and Jauvin, A neural probabilistic language model (2003),
    section 2, whose C is W here.

    Params: ``{"w": (vocab, width)}``.

    Attributes:
        vocab: the number of rows.
        width: the length of a row.
        w_init: initialiser of w, by default normal numbers of variance 1 / width.

    Raises:
        ValueError: a size below 1; parameters of another shape; ids out of range.
        TypeError: ids that are not integers.
    """

    vocab: int
    width: int
    w_init: Init = unit_rows

    carries: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        check_sizes(self, "vocab", "width")
        check_functions(self, "w_init")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab}, {self.width})"

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{self}.init: key")
        return {"w": self.w_init(key, (self.vocab, self.width), jnp.result_type(float))}

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(x)
        check_params(self, params, {"w": (self.vocab, self.width)})
        ids = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x  # an int8 cannot hold 300
        # JAX counts negative ids from the end: those are sent beyond it.
        ids = jnp.where(ids < 0, self.vocab, ids)
        return jnp.take(params["w"], ids, axis=0, mode="fill", fill_value=jnp.nan), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[None, PyTree]:
        return None, {"w": Lookup.of(trace.x, delta, self.vocab)}

    def _check(self, x: Any) -> None:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(
                f"{self} needs integer ids, not {getattr(x, 'dtype', type(x).__name__)}: use "
                "x.astype('int32')"
            )
        if isinstance(x, jax.core.Tracer):
            return
        ids = np.asarray(x)
        wrong = (ids < 0) | (ids >= self.vocab)
        if wrong.any():
            raise ValueError(
                f"{self}: ids must be from 0 to {self.vocab - 1}, but there is "
                f"{ids[wrong].flat[0]}; {int(wrong.sum())} of {ids.size} are out of range"
            )


@dataclasses.dataclass(frozen=True)
class Positions(Layer):
    """A vector for every position, learnt, and added to what is there.

    Equation, for one example of T <= length positions:

        y_t = x_t + w_t                                   x (T, width) -> y (T, width)

    Derivation. x_t and w_t reach the cost through y_t alone; with delta_t = dC/dy_t

        dC/dx_t = delta_t        dC/dw_t = delta_t        dC/dw_s = 0 for T < s <= length

    The kind is `Shift`, of the first T rows of w: each is a bias that no other position shares.

    Source: Gehring, Auli, Grangier, Yarats and Dauphin, Convolutional sequence to sequence learning
    (2017), section 3.1.

    Params: ``{"w": (length, width)}``.

    Attributes:
        length: how many positions there are at most.
        width: the length of a vector.
        w_init: initialiser of w, by default normal numbers of variance 1 / width.

    Raises:
        ValueError: a size below 1; an input of more positions, or inputs or parameters of another
            shape.
        TypeError: inputs that are not floating-point numbers.
    """

    length: int
    width: int
    w_init: Init = unit_rows

    carries: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self, "length", "width")
        check_functions(self, "w_init")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.length}, {self.width})"

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{self}.init: key")
        return {"w": self.w_init(key, (self.length, self.width), jnp.result_type(float))}

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_features(self, x, self.width, axes=2)
        check_params(self, params, {"w": (self.length, self.width)})
        if x.ndim != 2 or x.shape[0] > self.length:
            raise ValueError(
                f"{self} takes up to {self.length} positions of {self.width} features, but one "
                f"example has the shape {x.shape}"
            )
        return x + params["w"][: x.shape[0]].astype(x.dtype), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        # One group and one position, whose features are all entries of the rows that were used.
        rows = (("slice", (0, 0), delta.shape),)
        return delta, {"w": Shift.of(delta.reshape(-1), rows)}
