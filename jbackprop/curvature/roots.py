"""Which output deltas stand for the curvature of the loss: exact, drawn, or those of the targets.

The Gauss-Newton matrix is G = 1/B sum_n J_n^T H_n J_n, where J_n is the derivative of the outputs
z_n with respect to the parameters, and H_n the Hessian of the cost with respect to z_n. With a root
of that, sum_v S_nv (outer) S_nv = H_n,

    G = 1/B sum_n sum_v g_nv (outer) g_nv,    g_nv = J_n^T S_nv

and g_nv is what the delta rule makes of the output delta S_nv. So whatever is known of G comes from
sweeping several deltas back and contracting their pairs. Source: Schraudolph, Fast curvature
matrix-vector products for second-order gradient descent (2002); Dangel, Kunstner and Hennig,
BackPACK: packing more into backprop (2020), section 2.3.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_sizes
from jbackprop.losses import Loss
from jbackprop.mesh import shapes

Columns = Callable[[Array], Array]
"""From the numbers of some of the deltas (v,) to these deltas (v, B, ..., q)."""


class Roots(abc.ABC):
    """Which deltas S_v of the outputs are swept back. Use `Exact`, `MonteCarlo` or `Empirical`.

    Unless they are drawn, both methods may be asked of a portion of the examples, whose deltas and
    whose number must not depend on the others.
    """

    @abc.abstractmethod
    def number(self, loss: Loss, z: Any, y: Any) -> int:
        """How many deltas there are, for outputs z (B, ..., q), of which shapes will do."""

    @abc.abstractmethod
    def columns(self, loss: Loss, z: Array, y: Any, key: Array | None) -> Columns:
        """The deltas of a mini-batch."""

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return False


@dataclasses.dataclass(frozen=True)
class Exact(Roots):
    """All columns of the loss's `hessian_root`: the Gauss-Newton matrix itself.

    For r columns at T positions these are T r deltas. Of q outputs r = q, as a rule; of q classes
    it is q - 1.
    """

    def number(self, loss: Loss, z: Any, y: Any) -> int:
        root = jax.eval_shape(loss.hessian_root, *shapes((z, y)))
        if root.shape[1:] != z.shape:
            raise ValueError(
                f"{loss}: hessian_root gives {root.shape}; it must give r columns like the outputs "
                f"{z.shape}, (r, B, ..., q)"
            )
        rank: int = root.shape[0]
        return rank * math.prod(z.shape[1:-1])

    def columns(self, loss: Loss, z: Array, y: Any, key: Array | None) -> Columns:
        root = loss.hessian_root(z, y)
        rank, shape, places = root.shape[0], z.shape, math.prod(z.shape[1:-1])
        if places == 1:
            return lambda at: jnp.take(root, at, axis=0)
        flat = root.reshape(rank, shape[0], places, shape[-1])

        def some(at: Array) -> Array:
            here = jax.nn.one_hot(at % places, places, dtype=z.dtype)[:, None, :, None]
            return (jnp.take(flat, at // places, axis=0) * here).reshape(-1, *shape)

        return some


@dataclasses.dataclass(frozen=True)
class MonteCarlo(Roots):
    """Random deltas: an estimate of the Gauss-Newton matrix without bias, from few sweeps.

    Deltas at targets drawn from the model's own distribution, over the root of their number; of a
    loss that is no likelihood, columns of its root with random signs. All positions of an example
    are drawn at once. The error falls as 1 / sqrt(samples B). Needs `key=`.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature (2015), section 5.

    Attributes:
        samples: how many deltas for each example.

    Raises:
        ValueError: samples below 1.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, "samples")

    @property
    def draws(self) -> bool:
        return True

    def number(self, loss: Loss, z: Any, y: Any) -> int:
        return self.samples

    def columns(self, loss: Loss, z: Array, y: Any, key: Array | None) -> Columns:
        assert key is not None

        def one(at: Array) -> Array:
            return loss.sampled_root(jax.random.fold_in(key, at), z, y)

        return lambda at: jax.vmap(one)(at) / math.sqrt(self.samples)


@dataclasses.dataclass(frozen=True)
class Empirical(Roots):
    """The deltas of the cost itself, at the given targets: the "empirical Fisher" matrix.

    1/B sum_n g_n (outer) g_n of the gradients of single examples. It is no Gauss-Newton matrix, nor
    an estimate of one, unless targets are as if drawn from the model: see Kunstner, Balles and
    Hennig, Limitations of the empirical Fisher approximation (2019).
    """

    def number(self, loss: Loss, z: Any, y: Any) -> int:
        return 1

    def columns(self, loss: Loss, z: Array, y: Any, key: Array | None) -> Columns:
        delta = loss.delta(z, y)
        return lambda at: jnp.broadcast_to(delta, (at.shape[0], *delta.shape))
