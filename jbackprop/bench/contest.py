"""Measuring one workload: everybody is built, compared with the truth, and then runs in turns.

In a round everybody takes part once, in an order that is drawn anew, so that a disturbance of the
machine, and what one leaves in the caches of the next, meets all alike. What is reported are ratios
of the samples of one round: two separate runs on one machine differ by more than the contestants
do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jbackprop.bench.alone import peak_of
from jbackprop.bench.declare import Absent, Contestant, Workload
from jbackprop.bench.machine import room
from jbackprop.bench.outside import Process
from jbackprop.check.precision import exactly

SAMPLE = 0.005
"""Seconds that one sample lasts at least: a faster contestant is called several times."""
PEAKS = ("plain", "ours", "idiomatic")
"""The kinds whose process peaks are looked at: each takes a process, and seconds."""
ROUNDS = (7, 100)
"""At least, and at most. A slow contestant takes part in some of them only, in three at least."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant on one workload; None where it was not measured.

    Attributes:
        workload, family, question, contestant, kind: names.
        axis: (name, size) of a series.
        note: why there are no times.
        trace, lower, compile, first: seconds; `first` is the first call, which where the contestant
            compiles itself includes that.
        samples: seconds of one call, round by round; None in rounds that it was not in.
        temp, arguments, outputs: bytes, as the compiler states them.
        peak: bytes that a process of its own took at most; see `jbackprop.bench.alone`.
        error: the largest relative error of the answer against float64; see `gap`.
        unit: whether the ratios are to this one.
        flops: of the work, on paper; 0 where not counted.
        theory: exponents of (time, temporary memory) in the size.
    """

    workload: str
    family: str
    question: str
    contestant: str
    kind: str
    axis: tuple[str, int] | None = None
    note: str = ""
    trace: float | None = None
    lower: float | None = None
    compile: float | None = None
    first: float | None = None
    samples: tuple[float | None, ...] = ()
    temp: int | None = None
    arguments: int | None = None
    outputs: int | None = None
    peak: int | None = None
    error: float | None = None
    unit: bool = False
    flops: float = 0.0
    theory: tuple[float, float] | None = None

    @property
    def seconds(self) -> float | None:
        """The median time of one call."""
        times = [s for s in self.samples if s is not None]
        return statistics.median(times) if times else None

    @property
    def total(self) -> int | None:
        """Temporary memory, arguments and outputs."""
        parts = (self.temp, self.arguments, self.outputs)
        return None if None in parts else sum(p for p in parts if p is not None)


Timed = Callable[[int], float]


def paired(ours: Row, theirs: Row) -> list[float]:
    """Ratios of the times in the rounds that both were in."""
    both = zip(ours.samples, theirs.samples, strict=False)
    return [a / b for a, b in both if a is not None and b is not None]


def quartiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Lower quartile, median, upper quartile; None of nothing."""
    if not values:
        return None
    low, middle, high = statistics.quantiles(values if len(values) > 1 else 2 * list(values), n=4)
    return low, middle, high


def gap(found: Any, truth: Any) -> float:
    """The largest relative error of an answer: of its arrays, leaf by leaf.

    A leaf is measured by its own norm, but by no less than 1e-3 of the largest leaf's: the gradient
    of an attention key's bias, for one, is zero but for rounding. An answer that is one array, such
    as norms, is measured number by number in the same way. NaN where one is.
    """
    a, b = ([np.asarray(v, np.float64) for v in jax.tree.leaves(tree)] for tree in (found, truth))
    if len(a) != len(b) or any(v.shape != w.shape for v, w in zip(a, b, strict=True)):
        raise ArithmeticError("its answer has other shapes")
    if len(b) == 1 and b[0].ndim == 1:
        a, b = list(a[0]), list(b[0])
    largest = max((float(np.linalg.norm(w)) for w in b), default=0.0)
    floor = 1e-3 * largest or 1.0
    gaps = [
        float(np.linalg.norm(v - w)) / max(float(np.linalg.norm(w)), floor)
        for v, w in zip(a, b, strict=True)
    ]
    return float(np.max(gaps)) if gaps else 0.0


def answered(load: Workload, person: Contestant, found: Any) -> tuple[Any, Any]:
    """The answer in the workload's order, as (value, the rest)."""
    value, rest = found if load.valued else ((), found)
    return value, person.unpack(rest)


def error_of(answer: tuple[Any, Any], truth: tuple[Any, Any]) -> float:
    """The larger one of the value's error and of the rest's."""
    return max(gap(answer[0], truth[0]), gap(answer[1], truth[1]))


def truth_of(load: Workload, person: Contestant, inputs: Any) -> tuple[Any, Any] | None:
    """The answer of this contestant in float64, as NumPy; None where there is no room for it."""
    params, *data = inputs
    args = (person.pack(params), *data)  # what is drawn here is drawn in float32
    with exactly():  # no matmul in less than it says
        args = _cast(args, np.float64)
        if person.jit:
            compiled: Any = jax.jit(person.function).lower(*args).compile()
            stated = compiled.memory_analysis()
            if stated is not None and stated.temp_size_in_bytes > room():
                return None
        else:
            compiled = person.function
        value, rest = answered(load, person, compiled(*args))
        return jax.tree.map(np.asarray, value), jax.tree.map(np.asarray, rest)


def _cast(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays in another dtype."""

    def one(v: Any) -> Any:
        return v.astype(dtype) if jax.numpy.issubdtype(v.dtype, jax.numpy.floating) else v

    return jax.tree.map(one, tree)


def built(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, tuple[float, ...]]:
    """The compiled function, and the seconds to trace, lower and compile it, from nothing."""
    jax.jit(function).trace(*args)  # what is imported and set up once is nobody's
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(function).trace(*args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    return compiled, tuple(b - a for a, b in itertools.pairwise(times))


@contextlib.contextmanager
def nothing_cached() -> Iterator[None]:
    """Programs are compiled anew: what is compiled is timed."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def caller(function: Callable[..., Any], args: Sequence[Any]) -> Timed:
    """A function from a number of calls to the seconds that they took, all work done."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


def _enter(
    load: Workload, person: Contestant, inputs: tuple[Any, ...], row: Row, truth: Any, limit: int
) -> tuple[Row, Timed | None]:
    """Build a contestant, call it once, compare its answer; None where that went wrong."""
    params, *data = inputs
    args = (person.pack(params), *data)
    try:
        function: Callable[..., Any] = person.function
        if person.jit:
            function, (trace, lower, compile_) = built(person.function, args)
            row = dataclasses.replace(row, trace=trace, lower=lower, compile=compile_)
            stated = function.memory_analysis()  # type: ignore[attr-defined]
            if stated is not None:
                row = dataclasses.replace(
                    row, temp=int(stated.temp_size_in_bytes),
                    arguments=int(stated.argument_size_in_bytes),
                    outputs=int(stated.output_size_in_bytes),
                )  # fmt: skip
                if (row.total or 0) > limit:
                    raise MemoryError(f"needs {(row.total or 0) / 2**30:.1f} GiB")
        start = time.perf_counter()
        found = jax.block_until_ready(function(*args))
        row = dataclasses.replace(row, first=time.perf_counter() - start)
        own = truth_of(load, person, inputs) if person.own_truth else truth
        own = None if person.drawn else own
        if own is not None:
            row = dataclasses.replace(row, error=error_of(answered(load, person, found), own))
            _agrees(load, row.error)
        return row, caller(function, args)
    except Exception as error:  # whatever a peer raises costs its row, not the run
        return dataclasses.replace(row, note=_reason(error)), None


LOOSER = 100.0
"""How much larger an error may be where float32 matmuls are allowed fewer bits than float32 has."""


def tolerance_of(load: Workload) -> float:
    """The workload's tolerance, looser where an accelerator may use TF32 or bfloat16."""
    config: Any = jax.config
    exact = jax.default_backend() == "cpu" or config.jax_default_matmul_precision == "highest"
    return load.tolerance if exact else LOOSER * load.tolerance


def _agrees(load: Workload, error: float | None) -> None:
    if error is not None and not error <= tolerance_of(load):
        raise ArithmeticError(f"WRONG: its answer is off by {error:.0e}")


def _reason(error: BaseException) -> str:
    said = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in said:
        return "out of memory"
    if isinstance(error, ArithmeticError | MemoryError | NotImplementedError) and said:
        return said[:60]
    return f"{type(error).__name__}: {said}"[:60]


def measure(
    load: Workload,
    seconds: float,
    python: str | None = None,
    peaks: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Let everybody compete on a workload.

    Args:
        load: the workload.
        seconds: that the samples of one contestant may take altogether, about.
        python: which Python has the peers that run in a process of their own; None for nobody.
        peaks: start a process for each of `PEAKS` to see what it takes at most.
        tell: hears who is being looked at.

    Returns:
        A row for everybody, in order; who could not be measured has a note that says why. Answers
        that differ from the truth by more than the workload's tolerance are not timed.
    """
    blank = Row(load.name, load.family, load.question, "", "", load.axis, flops=load.flops)
    try:
        inputs, people = load.data(), list(load.contestants())
    except ImportError as error:
        return [
            dataclasses.replace(blank, contestant="everybody", note=f"not installed: {error.name}")
        ]
    reference = next(p for p in people if isinstance(p, Contestant))
    rows: dict[str, Row] = {}
    entrants: list[tuple[Row, Timed]] = []
    limit = room()
    with nothing_cached(), contextlib.ExitStack() as stack:
        tell("float64")
        usable = [p for p in people if isinstance(p, Contestant) and not p.own_truth]
        candidates = [reference, *(p for p in usable if p.kind not in ("ours", "variant"))]
        candidates = [p for p in candidates if not (p.own_truth or p.drawn)]
        truths = (truth_of(load, p, inputs) for p in candidates)
        truth = next((t for t in truths if t is not None), None)
        unit = load.unit or reference
        if load.unit is not None:
            people.insert(0, load.unit)
        for person in people:
            tell(person.name)
            row = dataclasses.replace(
                blank, contestant=person.name, kind=person.kind,
                theory=load.theory.get(person.kind), unit=person is unit,
            )  # fmt: skip
            run = None
            if isinstance(person, Absent):
                row = dataclasses.replace(row, note=person.note)
            elif person is load.unit:
                row, run = _enter(load, person, inputs, row, None, limit)
            else:
                row, run = _enter(load, person, inputs, row, truth, limit)
            if run is not None and isinstance(person, Contestant):
                if peaks and person.kind in PEAKS:
                    row = dataclasses.replace(row, peak=peak_of(load, person))
                entrants.append((row, run))
            rows[person.name] = row
        for outside in load.outside if python else ():
            tell(outside.task)
            process = stack.enter_context(Process(str(python), outside, load, truth, inputs))
            for fields in process.entered:
                row = dataclasses.replace(blank, **fields)
                rows[row.contestant] = row
                if row.note:
                    continue
                try:
                    _agrees(load, row.error)
                except ArithmeticError as error:
                    rows[row.contestant] = dataclasses.replace(row, note=_reason(error))
                    continue
                entrants.append((row, process.runner(row.contestant)))
        tell("in turns")
        samples = in_turns([run for _, run in entrants], seconds)
        for (row, _), own in zip(entrants, samples, strict=True):
            rows[row.contestant] = dataclasses.replace(row, samples=own)
    return list(rows.values())


def in_turns(
    runs: Sequence[Callable[[int], float]], seconds: float
) -> list[tuple[float | None, ...]]:
    """Samples of everybody, round by round: seconds of one call, None in rounds without.

    Before each sample there is a call that is not timed.

    Args:
        runs: each a function from a number of calls to the seconds that they took.
        seconds: that the samples of one may take altogether, about.
    """
    if not runs:
        return []
    once = [run(1) for run in runs]
    once = [min(t, run(1)) if t < 1 else t for t, run in zip(once, runs, strict=True)]
    calls = [max(1, round(SAMPLE / t)) for t in once]
    lasts = [c * t for c, t in zip(calls, once, strict=True)]
    rounds = round(min(max(seconds / statistics.median(lasts), ROUNDS[0]), ROUNDS[1]))
    every = [_every(rounds, s * rounds / seconds) for s in lasts]
    samples: list[list[float | None]] = [[] for _ in runs]
    drawn = np.random.default_rng(0)
    for number in range(rounds):
        for i in drawn.permutation(len(runs)):
            if number % every[i]:
                samples[i].append(None)
            else:
                runs[i](1)  # its memory and its code are in the caches again, as in a loop
                samples[i].append(runs[i](calls[i]) / calls[i])
    return [tuple(each) for each in samples]


def _every(rounds: int, too_slow: float) -> int:
    """In every how many rounds to take part: a power of two, so that two slow ones meet."""
    every = 1
    while 2 * every <= too_slow and rounds > 2 * (2 * every):  # three samples at least
        every *= 2
    return every
