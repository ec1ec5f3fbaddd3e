"""Gradient checkers on planted errors and on right gradients: `python benchmarks/checker.py`.

Ours beside `jax.test_util.check_grads`, `chex.assert_numerical_grads` and torch's `gradcheck`, each
with its defaults. `--peers none` leaves them out; `--prove` tries no checker, but the catalogue:
every entry against finite differences in float64.

A peer checks a function's own derivative, so the candidate becomes one: a `jax.custom_vjp` whose
primal is the function and whose reverse rule is the cotangent times the candidate, as a function of
the floating-point leaves alone. Functions that have a rule are tried as they are; a network as its
mean cost, a function of its parameters and inputs, whose candidate is `jb.backprop`'s.

- check_grads and chex get float32 (or the entry's dtype, with x64 where that is float64) and
  first order. A `custom_vjp` has no forward mode, so that they are told modes=["rev"]; a
  `custom_jvp` is checked both ways, as is their default.
- gradcheck gets a `torch.autograd.Function` that calls the same function and the same rule through
  NumPy. It is made for doubles, so that it always gets them: function and candidate are evaluated
  in float64 whatever the dtype of the entry. What depends on the dtype alone it cannot see.

A peer has "caught" a wrong gradient if it raises its own error (AssertionError, GradcheckError).
"n/a: ..." is any other exception: JAX itself refuses a cotangent of the wrong shape, for example.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
from entries import Entry, Planted, cast
from planted import PLANTED
from right import RIGHT
from tqdm import tqdm

import jbackprop as jb
from jbackprop.table import render

RESULTS = Path(__file__).parent / "results" / "checker.json"
Leaves = tuple[Any, ...]
Flat = Callable[..., tuple[Any, ...]]


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


# The checkers. A peer raises when it finds a gradient wrong.


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

        torch.autograd.gradcheck(
            Function.apply, tuple(tensor(leaf).requires_grad_() for leaf in leaves)
        )


PEERS: dict[str, tuple[str, Callable[[Entry], None]]] = {
    "check_grads": ("jax", _check_grads),
    "chex": ("chex", _chex),
    "gradcheck": ("torch", _gradcheck),
}
"""Name -> the package that it needs, and the call."""


def peer(name: str, entry: Entry) -> str:
    """What a peer says: "caught", "passed", "not installed" or "n/a: " and what it raised."""
    package, check = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(entry)
    except Exception as error:
        own = isinstance(error, AssertionError) or type(error).__name__ == "GradcheckError"
        return "caught" if own else f"n/a: {type(error).__name__}"
    return "passed"


def report(entry: Entry) -> Any:
    """What ours says."""
    check: Any = jb.check
    args = on_device(entry)
    if entry.call != "gradient":
        return getattr(check, entry.call)(entry.fun, *args)
    assert entry.candidate is not None
    return check.gradient(entry.fun, *args, candidate=jax.jit(entry.candidate)(*args))


def diagnosed(entry: Entry, report: Any) -> bool:
    """Whether a diagnosis has the word that is expected; True where none is."""
    expect = entry.expect if isinstance(entry, Planted) else ""
    return any(expect in leaf.diagnosis.lower() for leaf in report.failures) or not expect


# The truth, to prove the catalogue itself.


def departure(entry: Entry) -> float:
    """How far the candidate is from finite differences, both in float64, relative to these.

    The largest of all leaves, along the coordinates of a leaf and random directions; for a function
    with several outputs along one random cotangent. Infinite for NaN and for another shape.
    """
    draw = np.random.default_rng(0)
    with precision("float64"):
        f, leaves = flat(entry, on_device(entry, "float64"))
        cotangents = [jnp.asarray(draw.normal(size=y.shape)) for y in jax.eval_shape(f, *leaves)]

        @jax.jit
        def at(*leaves: Any) -> Any:
            return sum(jnp.vdot(c, y) for c, y in zip(cotangents, f(*leaves), strict=True))

        try:
            grads = jax.jit(lambda *leaves: jax.vjp(f, *leaves)[1](tuple(cotangents)))(*leaves)
        except ValueError:  # of a custom_vjp: the wrong shape
            return np.inf
        found = [0.0]
        for i, g in enumerate(grads):
            n = leaves[i].size
            directions = draw.normal(size=(16, n)) if n > 400 else np.eye(n)
            if not getattr(entry, "kink", False):  # there slopes of several kinks do not add up
                directions = np.concatenate([directions, draw.normal(size=(4, n))])
            claims = np.einsum("dn,n->d", directions, np.ravel(g))
            pairs = [_slope(at, leaves, i, *pair) for pair in zip(directions, claims, strict=True)]
            error, size = np.linalg.norm(np.array(pairs).reshape(-1, 2), axis=0)
            found.append(float(error / (size or error or 1)))
    return max(e if e == e else np.inf for e in found)


def _slope(at: Any, leaves: Leaves, i: int, direction: Any, claim: float) -> tuple[float, float]:
    """(error of the claim, slope) along a direction in leaf i, by the step that suits it best.

    A claim between the slopes of the two sides, which differ at a kink, has no error.
    """
    d, here = direction.reshape(leaves[i].shape), at(*leaves)

    def one_sided(h: float) -> float:
        ahead = (at(*leaves[:i], leaves[i] + s * d, *leaves[i + 1 :]) for s in (h / 2, h))
        half, whole = (float(there - here) / s for there, s in zip(ahead, (h / 2, h), strict=True))
        return 2 * half - whole

    errors = []
    for h in (1e-3, 1e-5, 1e-7):
        h *= float(jnp.max(jnp.abs(leaves[i]), initial=0)) or 1
        low, high = sorted((one_sided(h), one_sided(-h)))
        errors.append((max(low - claim, claim - high, 0.0), (low + high) / 2))
    return min(errors)


def is_proved(entry: Entry) -> bool:
    """Whether finite differences call a planted error wrong, and a right gradient right."""
    error = departure(entry)
    if isinstance(entry, Planted):
        return error > 5e-7 if entry.dtype == "float64" else error > 1e-4
    return error < 1e-5 or getattr(entry, "inconclusive", "") != "" or "offset" in entry.name


# The benchmark.


@dataclasses.dataclass(frozen=True)
class Result:
    """What all said of one entry."""

    kind: str
    name: str
    dtype: str
    planted: bool
    expect: str
    ours: str
    diagnosed: bool
    diagnosis: str
    seconds: float
    peers: dict[str, str]


def judge(entry: Entry, peers: Sequence[str]) -> Result:
    """Try them all on one entry."""
    said, text, words, start = "error", "", False, time.perf_counter()
    try:
        with precision(entry.dtype):
            found = report(entry)
        said, words = found.verdict, diagnosed(entry, found)
        text = "; ".join(dict.fromkeys(d for leaf in found.failures if (d := leaf.diagnosis)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = round(time.perf_counter() - start, 3)
    is_planted, expect = isinstance(entry, Planted), getattr(entry, "expect", "")
    others = {name: peer(name, entry) for name in peers}
    jax.clear_caches()  # hundreds of compiled programs would fill the memory
    return Result(
        entry.kind, entry.name, entry.dtype, is_planted, expect, said, words, text, seconds, others
    )


def summary(results: Iterable[Result]) -> str:
    """For every kind, how many wrong gradients were caught; then the false alarms."""
    results = list(results)
    wrong = [r for r in results if r.planted]
    right = [r for r in results if not r.planted]
    names = list(results[0].peers)
    columns = ("planted error", ">n", ">ours", ">diagnosed", *(f">{name}" for name in names))

    def line(kind: str, rows: list[Result]) -> tuple[str, ...]:
        due = [r for r in rows if r.expect]
        peers = (_caught([r.peers[name] for r in rows]) for name in names)
        ours, told = sum(r.ours == "wrong" for r in rows), sum(r.diagnosed for r in due)
        return kind, str(len(rows)), str(ours), f"{told}/{len(due)}" if due else "", *peers

    kinds = dict.fromkeys(r.kind for r in wrong)
    lines = [line(kind, [r for r in wrong if r.kind == kind]) for kind in kinds]
    table = render(columns, [*lines, line("all", wrong)], "Wrong gradients caught")

    def alarms(kind: str, rows: list[Result]) -> tuple[str, ...]:
        counts = [sum(r.ours == said for r in rows) for said in ("wrong", "inconclusive", "error")]
        peers = (_caught([r.peers[name] for r in rows]) for name in names)
        return kind, str(len(rows)), *map(str, counts), *peers

    kinds = dict.fromkeys(r.kind for r in right)
    lines = [alarms(kind, [r for r in right if r.kind == kind]) for kind in kinds]
    columns = ("right gradient", ">n", ">ours", ">inconclusive", ">error", *columns[4:])
    return f"{table}\n\n{render(columns, [*lines, alarms('all', right)], 'False alarms')}"


def _caught(said: list[str]) -> str:
    """Caught of those it could be called on; a dash if there are none of these."""
    called = [s for s in said if s in ("caught", "passed")]
    if not called:
        return "not installed" if "not installed" in said else "n/a"
    return f"{called.count('caught')}" + (f"/{len(called)}" if len(called) < len(said) else "")


def versions() -> dict[str, str]:
    """Of Python and the packages that take part."""
    found = {"python": platform.python_version(), "device": jax.default_backend()}
    for package in ("jbackprop", "jax", "numpy", "chex", "torch"):
        if importlib.util.find_spec(package):
            found[package] = importlib.import_module(package).__version__
    return found


def main() -> None:
    """Run the catalogue, print the tables, save all verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="a,b,... or none")
    parser.add_argument("--only", default="", help="entries whose id has this text")
    parser.add_argument("--prove", action="store_true", help="only prove the catalogue itself")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    peers = [] if options.peers == "none" else options.peers.split(",")
    entries = [e for e in (*PLANTED, *RIGHT) if options.only in e.id]
    bar = tqdm(entries, unit="gradient", disable=not sys.stderr.isatty())
    if options.prove:
        unproved = [entry.id for entry in bar if not is_proved(entry)]
        sys.exit("\n".join(["not what the catalogue says:", *unproved]) if unproved else None)
    results = [judge(entry, peers) for entry in bar]
    print(", ".join(f"{name} {value}" for name, value in versions().items()) + "\n")
    print(summary(results))
    if not options.only:
        saved = versions() | {"results": [dataclasses.asdict(result) for result in results]}
        options.out.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
