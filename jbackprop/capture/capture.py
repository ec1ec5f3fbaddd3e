"""Costs and factored gradients of a mini-batch, by any JAX function of one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jbackprop.capture.deferred import DeferredCapture
from jbackprop.capture.explain import Explanation, explanation
from jbackprop.capture.program import traced
from jbackprop.capture.sweep import run
from jbackprop.checks import flag_of, function_of
from jbackprop.factored import Factored, PyTree
from jbackprop.mesh import WHOLE, examples, on_mesh


class Capture:
    """See `__call__`; `explain` and `deferred` go with it."""

    def __call__(
        self,
        cost: Callable[..., Any],
        has_aux: bool = False,
        collect: Callable[[Factored], PyTree] | None = None,
    ) -> Callable[..., Any]:
        """Costs and pairs (activation, delta) of a mini-batch from any JAX function, unchanged.

        The cost of one example is traced; every parameter is followed through reshapes, transposes,
        broadcasts, casts, slices, nested calls, `jax.checkpoint` and `lax.scan` to where it meets
        data: in a matmul, a convolution, a sum, a product, a lookup. What it met there and the
        delta of what came out, dC/dz, make its pair, and one sweep back under `jax.vmap` gives all
        deltas. The model is not rewritten, and no layer is known by name. A parameter that is used
        several times is exact, cross terms included. Where there is no rule (a weight in a branch
        of a `lax.cond` or in a custom rule, the norm of a weight, a penalty), that use of that
        parameter falls back to its gradients, written out for every example (`Full`, with a
        reason); `explain` shows where and what that costs.

        Args:
            cost: (params, *example) -> the cost of one example, () floating point. A model that
                wants an axis of examples is given x[None]; its batch norm must be in inference
                mode, for it sees one example.
            has_aux: whether it gives (cost, aux).
            collect: what is asked of each pair instead of keeping it, such as
                ``lambda pair: pair.square_norm()``: from one `Factored` of the mini-batch to
                arrays. Scanned parameters (a leading axis that `lax.scan` goes along) are asked
                copy by copy, where the copy's turn of the scan ends in the sweep back, so that the
                pairs of one copy are alive at a time, and `jax.checkpoint` keeps its worth; the
                answers are stacked in front. They must be floating-point arrays; of a scan whose
                results have no bearing on the cost they are 0, whatever it gives of nothing.

        Returns:
            A function (params, *batch) -> (costs, factored), or ((costs, aux), factored). `batch`
            are trees of arrays (B, ...), also of PRNG keys (one for each example). `costs` are (B,)
            and unscaled. `factored` is a tree like params of factored gradients of the examples'
            own costs, divided by nothing: `jbackprop.gradient` and all of `jbackprop.per_example`
            take it; with `collect`, a tree like params of what that gave. A pure function, to be
            used under `jax.jit` like `jax.value_and_grad`; it traces the model at every call.

        Raises:
            TypeError: parameters that are no real floating-point arrays; a cost that is not one
                number; integers for a batch's arrays.
            ValueError: arrays that differ in the number of examples; a cost that reduces over an
                axis of examples (a batch norm in training), which has no gradient of one of them.

        Source: the pairs are those of the delta rule; taps for the deltas as in Dangel, Kunstner
        and Hennig, BackPACK: packing more into backprop (2020), here by jaxpr and `jax.vjp`.
        """
        function_of(cost, "cost")
        flag_of(has_aux, "has_aux")

        def split(params: PyTree, *batch: Any) -> Any:
            own = examples(batch)
            return own, own if collect is None else WHOLE

        @on_mesh(split, compiled=False)
        def captured(params: PyTree, *batch: Any) -> Any:
            program = traced(cost, has_aux, params, batch)
            costs, aux, found = run(program, collect)
            tree = jax.tree.unflatten(program.tree, found)
            return ((costs, aux), tree) if has_aux else (costs, tree)

        return captured

    def deferred(
        self, cost: Callable[..., Any], has_aux: bool = False
    ) -> Callable[..., DeferredCapture]:
        """A mini-batch for the questions of `jbackprop.per_example`, without keeping its pairs.

        Each question is a forward sweep and a sweep back that contracts the pairs where they are
        born (see `collect` of `capture`); one that needs them twice, such as clipping, is two of
        both: about the time of two gradients, and no more memory than one where the model is
        scanned and rematerialised. As under `jax.jit`, what `cost` closes over is read once.

        Args:
            cost, has_aux: as in `capture`.

        Returns:
            A function (params, *batch) -> what `jbackprop.per_example` takes.

        Raises:
            TypeError, ValueError: as `capture`.
        """
        function_of(cost, "cost")
        flag_of(has_aux, "has_aux")

        def later(params: PyTree, *batch: Any) -> DeferredCapture:
            n = traced(cost, has_aux, params, batch).n
            return DeferredCapture(params, batch, cost, has_aux, n)

        return later

    def explain(
        self, cost: Callable[..., Any], has_aux: bool = False
    ) -> Callable[..., Explanation]:
        """Which pair each parameter has, what it takes, and why some have none.

        Args:
            cost, has_aux: as in `capture`.

        Returns:
            A function (params, *batch) -> `Explanation`; print it. Nothing is computed, so that
            shapes (`jax.ShapeDtypeStruct`) do for params and batch.

        Raises:
            TypeError, ValueError: as `capture`.
        """
        function_of(cost, "cost")
        flag_of(has_aux, "has_aux")

        def explained(params: PyTree, *batch: Any) -> Explanation:
            return explanation(traced(cost, has_aux, params, batch))

        return explained


capture = Capture()
