"""The other checkers, called the way their documentation says, with their own defaults.

A peer checks a function's own derivative, so the candidate becomes one: a `jax.custom_vjp` whose
primal is the function and whose reverse rule is the cotangent times the candidate, as a function of
the floating-point leaves alone. Functions that have a rule are tried as they are; a network as its
mean cost, a function of its parameters and inputs, whose candidate is `jb.backprop`'s.

- check_grads and chex get the entry's dtype (x64 where that is float64) and first order. A
  `custom_vjp` has no forward mode, so that they are told modes=["rev"]; a `custom_jvp` is checked
  both ways, as is their default.
- gradcheck gets a `torch.autograd.Function` that calls the same function and the same rule through
  NumPy. It is made for doubles, so that it always gets them: function and candidate are evaluated
  in float64 whatever the dtype of the entry. What depends on the dtype alone it cannot see. Above
  LARGE entries it gets fast_mode=True, for a Jacobian would take minutes. That is what it turns to
  all the same once the fast mode has failed, so that to run out of time there is to have caught.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np

import jbackprop as jb
from planted.entries import Entry, cast

Leaves = tuple[Any, ...]
Flat = Callable[..., tuple[Any, ...]]
LARGE = 2000
SECONDS = 60


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inside, float64 exists if the dtype is that."""
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    with home.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        yield


def on_device(entry: Entry, dtype: str | None = None) -> tuple[Any, ...]:
    """The entry's args as JAX arrays, cast to dtype if that is given; a loss stays a loss."""
    head, args = ((), entry.args) if entry.call != "network" else (entry.args[:1], entry.args[1:])
    return *head, *jax.tree.map(jnp.asarray, cast(args, dtype) if dtype else args)


def with_rule(
    fun: Callable[..., Any], candidate: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Flat, Leaves]:
    """fun of args[0] with the candidate as its reverse rule, and the leaves of args[0]."""
    leaves, tree = jax.tree.flatten(args[0])

    @jax.custom_vjp
    def f(*leaves: Any) -> tuple[Any, ...]:
        return (fun(jax.tree.unflatten(tree, leaves), *args[1:]),)

    def back(leaves: Leaves, cotangents: Any) -> Leaves:
        grads = candidate(jax.tree.unflatten(tree, leaves), *args[1:])
        return tuple(cotangents[0].astype(g.dtype) * g for g in jax.tree.leaves(grads))

    f.defvjp(lambda *leaves: (f(*leaves), leaves), back)
    return f, tuple(leaves)


def network_cost(net: Any, loss: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The mean cost as a function of {params, x} and y, and its gradient by our rules."""

    def fun(both: Any, y: Any) -> Any:
        return jnp.mean(loss.value(jb.forward(net, both["params"], both["x"])[0], y))

    def candidate(both: Any, y: Any) -> Any:
        bp = jb.backprop(net, loss, both["params"], both["x"], y)
        return {"params": jb.gradient(bp), "x": bp.delta_x / len(both["x"])}

    return fun, candidate


def flat(entry: Entry, args: tuple[Any, ...]) -> tuple[Flat, Leaves]:
    """The entry as a function of floating-point leaves with a rule, and those leaves."""
    if entry.call == "gradient":
        assert entry.candidate is not None
        return with_rule(entry.fun, entry.candidate, args)
    if entry.call == "network":
        loss, params, x, y = args
        return with_rule(*network_cost(entry.fun, loss), ({"params": params, "x": x}, y))
    leaves, tree = jax.tree.flatten(args)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def f(*moved: Any) -> tuple[Any, ...]:
        whole = list(leaves)
        for i, leaf in zip(floating, moved, strict=True):
            whole[i] = leaf
        return tuple(jax.tree.leaves(entry.fun(*jax.tree.unflatten(tree, whole))))

    return f, tuple(leaves[i] for i in floating)


def _check_grads(entry: Entry) -> None:
    with precision(entry.dtype):
        f, leaves = flat(entry, on_device(entry))
        modes = ["fwd", "rev"] if entry.call == "jvp" else ["rev"]
        jax.test_util.check_grads(f, leaves, order=1, modes=modes)


def _chex(entry: Entry) -> None:
    chex = importlib.import_module("chex")
    with precision(entry.dtype):
        f, leaves = flat(entry, on_device(entry))
        modes = {} if entry.call == "jvp" else {"modes": ["rev"]}
        chex.assert_numerical_grads(f, leaves, order=1, **modes)


def _gradcheck(entry: Entry) -> None:
    torch: Any = importlib.import_module("torch")
    with precision("float64"):
        f, leaves = flat(entry, on_device(entry, "float64"))
        forward = jax.jit(f)
        backward = jax.jit(lambda leaves, cotangents: jax.vjp(f, *leaves)[1](cotangents))

        def tensor(value: Any) -> Any:
            return torch.from_numpy(np.array(value))

        def array(value: Any) -> Any:
            return value.detach().numpy()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                ctx.save_for_backward(*inputs)
                return tuple(map(tensor, forward(*map(array, inputs))))

            @staticmethod
            def backward(ctx: Any, *cotangents: Any) -> Any:
                leaves = tuple(map(array, ctx.saved_tensors))
                return tuple(map(tensor, backward(leaves, tuple(map(array, cotangents)))))

        inputs = tuple(tensor(leaf).requires_grad_() for leaf in leaves)
        large = sum(leaf.size for leaf in leaves) > LARGE
        try:
            torch.autograd.gradcheck(Function.apply, inputs, fast_mode=large)
        except TimeoutError:
            if large:  # it has failed, and was to find out where
                raise AssertionError from None
            raise


PEERS: dict[str, tuple[str, Callable[[Entry], None]]] = {
    "check_grads": ("jax", _check_grads),
    "chex": ("chex", _chex),
    "gradcheck": ("torch", _gradcheck),
}
"""Name -> the package that it needs, and the call."""


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peer(name: str, entry: Entry) -> str:
    """What a peer says: "caught", "passed", "not installed" or "n/a: " and why not.

    It has caught a wrong gradient if it raises its own error.
    """
    package, check = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        with warnings.catch_warnings(), _limited(SECONDS):
            warnings.simplefilter("ignore")
            check(entry)
    except Exception as error:
        own = isinstance(error, AssertionError) or type(error).__name__ == "GradcheckError"
        refused = "bwd rule must produce" in str(error)
        reason = "JAX itself refuses this shape" if refused else type(error).__name__
        return "caught" if own else f"n/a: {reason}"
    return "passed"
