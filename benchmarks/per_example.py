"""Questions about single examples, in units of one plain gradient: norms, clipped sum, variance.

python benchmarks/per_example.py [--seconds S] [--only NAME] [--torch PYTHON] [--out FILE.json]

The unit of time is `jit(jax.value_and_grad)` of the same network in plain JAX, in a fast one of
its arrangements, taken in turns with each contestant; that of memory is what the compiler states
for it. The peers for PyTorch run in a process of their own, in units of their own eager
`loss.backward()`. All answers are about the costs of single examples, divided by nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import convolution
import jax
import numpy as np
from contest import Contestant, built, difference, machine, save
from jax import Array
from plain import conv
from plain.per_example import MAX_NORM, by_jax_privacy, in_parts, whole
from plain.transformer import Arrangement, Sizes, model
from tqdm import tqdm
from transformer import Order, model_data

import jbackprop as jb
from jbackprop import bench
from jbackprop.table import render

QUANTITIES = ("norms", "clipped", "variance")
BATCHES = (32, 128, 512)
MICROBATCH = 16
TIME_GOALS = {
    "norms": {"mlp": 0.65, "transformer": 1.3},
    "clipped": {"mlp": 1.05, "transformer": 1.5},
    "variance": {"mlp": 1.6, "cnn": 1.6, "transformer": 1.6},
}
TOTAL_GOAL = 1.5
TOLERANCE = 1e-3  # in float32 a net input at a kink may be rounded to its other side
SLOW, VERY_SLOW = 2.0, 20.0  # seconds of a call: then three of them have to do, or one
REFUSALS = (
    ArithmeticError, ImportError, MemoryError, NotImplementedError,
    jax.errors.JaxRuntimeError,  # out of memory
)  # fmt: skip

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network at one batch size.

    Attributes:
        name: "mlp", "cnn", "transformer" or "classifier".
        data: params in the layout of `plain`, x, y.
        plain: (params, x, y) -> (mean cost, gradient), in plain JAX.
        net: the same network of ours.
        pack, unpack: from the parameters of `plain` to those of `net`, and back for gradients.
    """

    name: str
    data: tuple[Any, Any, Any]
    plain: Function
    net: Any
    pack: Function
    unpack: Function


def _same(tree: Any) -> Any:
    return tree


def mlp(batch: int) -> Problem:
    """784-1024-1024-1024-10, relu."""
    load = bench.Workload((784, 1024, 1024, 1024, 10), batch, "relu")
    net = jb.mlp(load.sizes, jb.Relu())
    return Problem("mlp", bench.data(load), bench.automatic(load), net, _same, _same)


def cnn(batch: int) -> Problem:
    """Images 28x28x1, two stages of 32 and 64 channels, and a Dense."""
    shape, channels = (28, 28, 1), (32, 64)
    params, x, y = convolution.data(shape, channels, batch)
    ours, net = convolution.ours(shape, channels)[0], jb.cnn(shape, channels, convolution.CLASSES)
    # pooled by a reshape: reduce_window's gradient takes nearly twice as long on a CPU
    plain = conv.network("reshape")
    return Problem("cnn", (params, x, y), plain, net, ours.pack, ours.unpack)


def transformer(batch: int) -> Problem:
    """Six blocks of width 128, 4 heads, 64 positions, a vocabulary of 64."""
    sizes = Sizes(128, 6, 4, 64, batch)
    params, x, y = model_data(sizes)
    net: Any = jb.transformer(sizes.vocab, sizes.width, sizes.depth, sizes.heads, sizes.length)
    order, plain = Order(net), model(Arrangement(), sizes)
    return Problem("transformer", (params, x, y), plain, net, order.pack, order.unpack)


def classifier(batch: int) -> Problem:
    """The same blocks, and ten classes from the mean over positions."""
    sizes = Sizes(128, 6, 4, 64, batch, classes=10)
    params, x, y = model_data(sizes)
    whole: Any = jb.transformer(sizes.vocab, sizes.width, sizes.depth, sizes.heads, sizes.length)
    net = jb.Sequential(
        *whole.layers[:-1], jb.GlobalAveragePool(), jb.Dense(sizes.width, sizes.classes)
    )
    order, plain = Order(net), model(Arrangement(), sizes)
    return Problem("classifier", (params, x, y), plain, net, order.pack, order.unpack)


def ours(problem: Problem, quantity: str) -> Iterator[Contestant]:
    """The pairs kept; contracted as they are born; that, of some examples at a time."""
    asks: dict[str, Function] = {
        "norms": jb.per_example.norms,
        "clipped": lambda bp, **how: jb.per_example.clipped_gradient(bp, MAX_NORM, **how).gradient,
        "variance": jb.per_example.variance,
    }
    loss = jb.SoftmaxCrossEntropy()
    unpack = _same if quantity == "norms" else problem.unpack
    few, later = f"microbatches of {MICROBATCH}", jb.per_example.deferred
    ways: dict[str, tuple[Function, dict[str, Any]]] = {
        "kept": (jb.backprop, {}),
        "deferred": (later, {}),
        f"deferred, {few}": (later, {"microbatch": MICROBATCH}),
    }
    if quantity == "clipped":
        how = {"microbatch": MICROBATCH, "method": "materialise"}
        ways[f"written out, {few}"] = (later, how)
    for name, (source, options) in ways.items():

        def answer(
            params: Any, x: Any, y: Any, source: Any = source, options: Any = options
        ) -> Any:
            return asks[quantity](source(problem.net, loss, params, x, y), **options)

        yield Contestant(f"ours, {name}", answer, "ours", problem.pack, unpack)


def contestants(problem: Problem, quantity: str) -> list[Contestant]:
    """Everybody; with the first, which takes little memory, the others must agree."""
    few, plain = f"microbatches of {MICROBATCH}", problem.plain
    unroll = problem.name == "cnn"  # inside a loop, XLA's convolutions on a CPU are very slow
    parts = functools.partial(in_parts, plain, quantity)
    private = functools.partial(by_jax_privacy, plain, quantity)
    return [
        Contestant(f"vmap(grad), {few}", parts(MICROBATCH, unroll), "vmap"),
        Contestant("vmap(grad), whole", whole(plain, quantity), "vmap"),
        Contestant("grad, one by one", parts(1), "vmap"),
        *ours(problem, quantity),
        Contestant("jax_privacy, whole", private(None), "jax_privacy"),
        Contestant(f"jax_privacy, {few}", private(MICROBATCH), "jax_privacy"),
    ]


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant against the plain gradient; None where it was not measured.

    Attributes:
        workload, contestant, kind: names.
        milliseconds: median time of one call.
        time: median of the paired ratios, its time / that of a plain gradient.
        quartiles: of these ratios.
        memory, total: its temporary and its total memory (with arguments and results) / plain's.
        compile: seconds to trace, lower and compile it.
        difference: the worst relative difference from the first one's answer, leaf by leaf as in
            `contest.difference`; of norms, each for itself.
        over_ours: its time / that of the fastest of ours, each in its own units.
        goal: the most that `time` (if anything) and `total` may be.
        note: why it was not measured.
    """

    workload: str
    contestant: str
    kind: str
    milliseconds: float | None = None
    time: float | None = None
    quartiles: tuple[float, float] | None = None
    memory: float | None = None
    total: float | None = None
    compile: float | None = None
    difference: float | None = None
    over_ours: float | None = None
    goal: tuple[float | None, float | None] | None = None
    note: str = ""


def memory(compiled: Any) -> tuple[int, int]:
    """Temporary and total bytes, as the compiler states them."""
    stated = compiled.memory_analysis()
    temp = stated.temp_size_in_bytes
    return temp, temp + stated.argument_size_in_bytes + stated.output_size_in_bytes


def timed(f: Function) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    found = jax.block_until_ready(f())
    return time.perf_counter() - start, found


def in_turns(f: Function, g: Function, once: float, seconds: float) -> list[tuple[float, float]]:
    """Times of f and g, as `bench.paired` has them; of a g that is slow, of a few single calls."""
    if once > SLOW:
        return [(timed(f)[0], timed(g)[0]) for _ in range(1 if once > VERY_SLOW else 3)]
    return list(zip(*bench.paired(f, g, 200, seconds), strict=True))


def compete(problem: Problem, person: Contestant, unit: Any, wanted: Any, options: Any) -> Any:
    """One contestant's figures, as fields of `Result`, and its answer."""
    params, *data = problem.data
    args = (person.pack(params), *data)
    found: dict[str, Any] = {}
    try:
        compiled, trace, compile_ = built(person.function, args)
        (temp, total), units = memory(compiled), memory(unit)
        found |= {"compile": trace + compile_}
        found |= {"memory": temp / units[0], "total": total / units[1]}
        if total > options.gib * 2**30:
            raise MemoryError(f"needs {total / 2**30:.0f} GiB")
        once, answer = timed(lambda: person.unpack(compiled(*args)))
        wanted = answer if wanted is None else wanted
        split: Function = list if isinstance(wanted, Array) else _same
        found["difference"] = difference(split(answer), split(wanted))
        if not found["difference"] <= TOLERANCE:
            raise ArithmeticError("differs")
        f, g = functools.partial(unit, *problem.data), functools.partial(compiled, *args)
        times = in_turns(f, g, once, options.seconds)
    except REFUSALS as error:
        note = (str(error) or type(error).__name__).splitlines()[0][:48]
        return found | {"note": note}, wanted
    ratios = [b / a for a, b in times]
    cuts = statistics.quantiles(ratios if len(ratios) > 1 else 2 * ratios, n=4)
    found |= {"time": cuts[1], "quartiles": (cuts[0], cuts[2])}
    return found | {"milliseconds": 1e3 * statistics.median(b for _, b in times)}, wanted


def torch_peers(
    problem: Problem,
    quantity: str,
    wanted: Any,
    options: Any,
    script_name: str = "per_example_torch.py",
) -> Iterator[Any]:
    """The same fields, and names, of the peers for PyTorch, from a process of their own."""
    params, x, y = problem.data
    arrays = {"x": np.asarray(x), "y": np.asarray(y)}
    for name, tree in {"params": params, "wanted": wanted}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            arrays[f"{name}/{key}"] = np.asarray(leaf)
    script = Path(__file__).parent / "plain" / script_name
    limits = {"seconds": options.seconds, "gib": options.gib, "threads": machine()["cores"]}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(file := Path(folder) / "problem.npz", **arrays)  # type: ignore[arg-type]
        command = [options.torch, script, file, problem.name, quantity]
        command += [f"--{name}={value}" for name, value in limits.items()]
        # threads that wait by spinning, as is the default, suffer most where others compute too
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
    yield from map(json.loads, done.stdout.splitlines())
    if done.returncode:
        note = (done.stderr.splitlines() or [f"ended with {done.returncode}"])[-1][:48]
        yield {"contestant": "PyTorch", "kind": "torch", "note": note}


def measure(problem: Problem, quantity: str, options: Any) -> list[Result]:
    """Let everybody compete."""
    load = f"{problem.name}, batch {len(problem.data[1])}, {quantity}"
    unit, *_ = built(problem.plain, problem.data)
    goal = (TIME_GOALS[quantity].get(problem.name), TOTAL_GOAL)
    results, wanted = [], None
    people = contestants(problem, quantity)
    for person in tqdm(people, desc=load, leave=False, disable=not sys.stderr.isatty()):
        found, wanted = compete(problem, person, unit, wanted, options)
        own = goal if person.kind == "ours" else None
        results.append(Result(load, person.name, person.kind, goal=own, **found))
    results += [Result(load, **row) for row in torch_peers(problem, quantity, wanted, options)]
    best = min((r.time for r in results if r.kind == "ours" and r.time), default=None)
    return [
        dataclasses.replace(r, over_ours=r.time / best) if r.time and best else r for r in results
    ]


def verdict(r: Result) -> str:
    """Which goals are met, or why there are no figures."""
    if r.goal is None or r.time is None or r.total is None:
        return r.note
    pairs = (("time", r.time, r.goal[0]), ("total", r.total, r.goal[1]))
    met = {True: "met", False: "missed"}
    return ", ".join(f"{what} {most:.2f} {met[own <= most]}" for what, own, most in pairs if most)


def table(results: Sequence[Result]) -> str:
    """The results of one workload as text."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    rows = []
    for r in results:
        spread = "" if r.quartiles is None else " ({:.2f} to {:.2f})".format(*r.quartiles)
        rows.append(
            (
                r.contestant, number(r.milliseconds, ".1f"), number(r.time) + spread,
                number(r.over_ours), number(r.memory), number(r.total), number(r.compile, ".1f"),
                number(r.difference, ".0e"), verdict(r),
            )
        )  # fmt: skip
    columns = (
        "contestant", ">ms", ">time / plain", ">over ours", ">temp / plain", ">total / plain",
        ">compile s", ">difference", "goals, or why not",
    )  # fmt: skip
    return render(columns, rows, results[0].workload)


def main() -> None:
    """Measure, print a table for each workload, and save on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each contestant")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--torch", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--gib", type=float, default=20.0, help="nothing may take more memory")
    parser.add_argument("--out", help="a .json file for the results")
    options = parser.parse_args()
    if shutil.which(options.torch) is None:
        parser.error(f"there is no {options.torch}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for make, batch, quantity in itertools.product((mlp, cnn, transformer), BATCHES, QUANTITIES):
        if options.only in f"{make.__name__}, batch {batch}, {quantity}":
            results = measure(make(batch), quantity, options)
            print("\n" + table(results), flush=True)
            if options.out:
                save(options.out, results)


if __name__ == "__main__":
    main()
