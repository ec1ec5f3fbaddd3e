"""Mutation test: every hand-written rule is made wrong, one place at a time, and a test must notice.

python tests/mutate_rules.py [--only TEXT ...] [--sample N] [--list]

A mutant is one change in the source of one rule: a factor or a term dropped, a sign or a comparison
turned, operands swapped, f' taken of the wrong argument, a constant or an axis moved, a reduction,
a cast or a keyword left out. It is compiled and put in the place of the rule's code, in memory, and
tests of `make test` run until one fails that passes without it. They run op by op (`disable_jit`):
no trace of a rule outlives its mutant, and what XLA compiled for one mutant serves the next. (Those
of curvature and credit, with their many sweeps, run compiled, with nothing left of what was traced
before.) A mutant that no test notices is a survivor, and the exit status is 1. What computes the
same is in `EQUIVALENT`, with the reason.
"""

import argparse
import ast
import contextlib
import fnmatch
import importlib
import inspect
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import pytest
from _pytest.runner import runtestprotocol
from equivalent import EQUIVALENT

from jbackprop.sweep import Layer

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "jbackprop"

RULES = {
    "layers/*.py": "*.slope *.backward *.mean",
    "layers/attention.py": "Attention.forward *._over_blocks _Heads.* _dot _flat _part _swapped _join"
    " _runs",
    "layers/batch_norm.py": "*.statistics",
    "layers/dropout.py": "*._thinned",
    "layers/gain.py": "rescaled rescaled_back",
    "layers/joins.py": "*.join",
    "layers/normalization.py": "*.standardized _group_mean",
    "layers/rotary.py": "*._turned",
    "layers/recurrent.py": "*._step_back *._pairs *._cuts *._for_loop carried _plus_hidden",
    "layers/lstm.py": "*._step_back",
    "layers/gru.py": "*._step_back *._pairs *._for_loop",
    "layers/pooling.py": "_Axis.* *._shares *._stages",
    "layers/shapes.py": "*._blocks",
    "losses/*.py": "*delta *.error *.mean *.targets *.labels *._spread *.hessian_product"
    " *.hessian_root *.sampled_root *.variance* *._counted *._root *._curved",
    "losses/base.py": "positions Loss.value_and_delta columns_of_diagonal unit_vectors",
    "losses/fused.py": "*.value *._capped *._slope *.head* *._rows *._forward *._mass *._delta_of"
    " *._spread_evenly *.cut _add_at _in_parts _by_example",
    "compose/*.py": "*.backward *.invert",
    "sweep.py": "backward _layer_backward leafwise",
    "factored/*.py": "*.total *.each *.square_norm *.second_moment *.dot *.gram *.stacked *.restore"
    " *.project *.moments *.copies *.canonical *.join in_blocks in_shares scan_examples"
    " over_examples *.of *._by_gram *._summands *._sum *.same_form _* present weighted wide_dtype wide_square flat einsum"
    " depth_into_groups stacked_place",
    "factored/patches.py": "*.outputs *.spread_size *.correlate *.back *.turned *.kernel_gradient"
    " *.patches *.outer",
    "curvature/roots.py": "*.columns *.number",
    "curvature/diagonals.py": "second_moment squares_of_each _rooted _written_out _squares"
    " with_last turned_second_moment _one_by_one",
    "curvature/kfac.py": "_factors _gram _of_rows update_average",
    "curvature/blocks.py": "*.product *.apply *.canonical *.restored *.trace *.decomposed"
    " *.log_determinant *.solve",
    "curvature/products.py": "ggn_of hessian_of",
    "curvature/root_products.py": "_block_product _root",
    "curvature/hessian.py": "_propagate _pulled _moved _by_eigenvectors _along_each _estimated",
    "curvature/traces.py": "_traces",
    "optim/kfac.py": "_given _minimising",
    "optim/damping.py": "*.adapted inner damped",
    "credit/transported.py": "*.sweep *.feedback *.begin *.update *._mirror _pairwise_uniform",
    "credit/direct.py": "*.sweep *.error _Direct.* _project",
    "credit/target.py": "*.sweep *.update *._inverses _Inverse.*",
    "credit/predictive.py": "*.sweep",
    "credit/settling.py": "settle share norm largest largest_entry",
    "credit/equilibrium.py": "*.sweep *._settle *._target _truth _halves _left",
    "credit/forward_forward.py": "*.sweep *.outputs *.truth *._both *._with _signs _goodness"
    " _normalised",
    "credit/forward_gradient.py": "*.sweep *._of_* _Perturbed.* direction",
    "credit/carriers.py": "carriers _first as_transport like_fresh",
    "credit/chain.py": "units unit_forward unit_backward _keys",
    "credit/angles.py": "_measured angle _ratio _mean_* _by_layer _local",
}
"""The rules of each file, as patterns of qualified names; a file has those of all that match it."""

LAYER = r"rules.*(adjoint|slope|linear|loop|jax_grad|question).*\[OWNER\("
NETWORK = r"rules.*(jax_grad|question).*\[(Dense|Sequential)"
COMPOSITE = r"rules.*(adjoint|loop|jax_grad|question).*\[OWNER\("
TRANSPORT = "rules.*transport"
GRADIENT = "gradient.*(collect|transport|hands_out|weight|steps|mixed|ids)"
KILLERS = {
    "layers/": [LAYER, "FILE", "rules.*(users_activation|draw)", TRANSPORT, "gradient.*mixed"],
    "layers/batch_norm.py": ["normalization.*(batch|averages)"],
    "layers/dropout.py": ["embedding.*dropout"],
    "layers/gain.py": ["embedding.*plain", "normalization.*(plain|half)"],
    "layers/joins.py": ["embedding.*(plain|tie|zeros|parts)"],
    "layers/parts.py": ["embedding.*plain"],
    "layers/attention.py": ["edges.*attention"],
    "layers/activations.py": ["edges.*gelu", "rules.*extreme.*OWNER"],
    "layers/pooling.py": ["convolution.*(pool|first|kink|nan|average)"],
    "layers/shapes.py": ["convolution.*(half|reshape)"],
    "layers/gru.py": ["recurrent.*(pytorch|reaches|first_state|half|transport|pieces|loop)"],
    "layers/lstm.py": ["recurrent.*(pytorch|reaches|first_state|half|transport|pieces|loop)"],
    "layers/recurrent.py": ["recurrent.*(pytorch|reaches|first_state|half|transport|pieces|loop)"],
    "layers/rotary.py": ["attention.*rotary"],
    "losses/": [
        "losses.*(complex|value|position|extreme|ignored|_of_|under_jit)",
        LAYER,
        "curvature.*(roots_and_products|masked|underflow)",
    ],
    "curvature/": [
        "curvature.*(answers|linear|nearer|backpack)",
        r"curvature.*dense.*\[(Dense\(6, 4\)|Embedding|LayerNorm\(5|Conv\(2, 4|Skip\(Sigmoid)",
        "curvature.*(converge|precision)",
    ],
    "credit/": [
        "credit.*(written|autodiff|true_weights|goes_to|energy|mirror|signs|magnitudes|shrinks)",
        "credit.*(settle|norms_neither|fixed_predictions)",
        "credit.*(inverses|targets|average|derivative|several|convolutions|first_layer|copies|position)",
        "credit_use.*(exact|above|dtype|agree)",
    ],
    "optim/": ["optim.*(steps|minimises|levenberg|solves|corrected)"],
    "losses/fused.py": [
        "fused.*(whatever|net_inputs)", "fused.*(weight_0|ignored|infinite|share|ends_in|narrow|rare)",
    ],
    "compose/": [COMPOSITE, "FILE", "compose.*(transport|aux|loop|recovers|keys)", "embedding.*stack"],
    "compose/tied.py": ["fused.*(tied|transport|two_ways)"],
    "compose/sequential.py": [NETWORK, GRADIENT],
    "sweep.py": [
        NETWORK, TRANSPORT, GRADIENT, "edges.*mask", r"bad_input.*\[(no|a) delta"
    ],
    "factored/patches.py": ["convolution.*(kernel|pytorchs|patches)"],
    "factored/other.py": ["gradient.*coupled", "compose.*frozen", r"rules.*question.*\[(Frozen|Tied)"],
    "factored/shift.py": [r"rules.*question.*\[(Gain|LayerNorm|Positions|Repeat)"],
    "factored/lookup.py": [r"rules.*question.*\[(Embedding|Tied)", "embedding"],
    "factored/": [
        "factored", "per_example.*(few_examples|variance_much|leak|cancel)", r"rules.*question.*\[Dense\(6, 4\)", "gradient.*(steps|weight_is)", "FILE"
    ],
}  # fmt: skip
"""The tests for the rules of each folder or file, by name, in their order.

OWNER is the class, FILE the name of its file: tests/test_pooling.py is for layers/pooling.py.
"""

NO_KILLERS = (
    "against_sklearn check check_hard check_programs cli diagnose examples fit mutations"
    " planted project random_nets private per_example_rules"
)
"""The tests that never are."""

COMPILED = ("curvature/", "optim/", "credit/")
"""Where mutants are traced and compiled."""

LIMIT = 120
"""Seconds of a processor that one test of a mutant may take: an endless one is killed too."""

TURNED: dict[type, list[type]] = {
    ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE], ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Add: [ast.Sub], ast.Sub: [ast.Add],
    ast.Div: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
CONFUSED = {
    "z": "a", "a": "z delta", "x": "y delta", "y": "x", "delta": "a x", "alpha": "beta",
    "beta": "alpha", "t": "s", "s": "t", "i": "o", "o": "i", "params": "carry", "carry": "params",
    "own": "transports", "transports": "own auxes", "auxes": "transports",
    "transport": "aux", "aux": "transport",
}  # fmt: skip
MISTAKEN = {
    "x": "y", "y": "x", "a": "delta", "delta": "a", "maximum": "minimum", "add": "subtract",
    "ones": "zeros", "zeros": "ones", "exp": "expm1", "expm1": "exp",
}  # fmt: skip
NEGATED = "slope _delta error mean delta each total square_norm second_moment dot gram weighted"
LEFT_OUT = (
    "sum square maximum where clip abs exp expm1 tanh erf logistic softmax broadcast_to moveaxis"
    " astype reshape present weighted restore reversed mean _bounded depth_into_groups"
    " stacked_place"
)
SWAPPED = "of where einsum dot_general Trace backward slope collect rule _layer_backward error"


class Mutant(NamedTuple):
    """One change of a module's tree: `holder[key]`, in one of its nodes, becomes `new`."""

    file: str
    rule: str
    line: int
    what: str
    reason: str  # why it computes the same
    change: tuple[ast.Module, Any, Any, ast.AST]

    def __str__(self):
        return f"{self.file}:{self.line} {self.what}"


def wrong(node, rule, names):
    """What may stand in the place of a node, and should not."""
    match node:
        case ast.BinOp(left, op, right):
            yield from (left, right)
            yield from (ast.BinOp(left, other(), right) for other in TURNED.get(type(op), []))
            if isinstance(op, ast.Sub | ast.Div | ast.MatMult):
                yield ast.BinOp(right, op, left)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.BoolOp(op, values):
            yield ast.BoolOp(TURNED[type(op)][0](), values)
            yield from (
                values
                if len(values) == 2
                else (ast.BoolOp(op, [w for w in values if w is not v]) for v in values)
            )
        case ast.Compare(left, ops, rights):
            for i, op in enumerate(ops):
                for other in TURNED[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], rights)
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.If(ast.Name() | ast.Attribute() | ast.Call() as test, body, orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value) if rule.split(".")[-1] in NEGATED.split():
            yield ast.Return(ast.UnaryOp(ast.USub(), value))
        case ast.Return(ast.Tuple([delta, *rest])) if rule.endswith(".backward"):
            yield ast.Return(ast.Tuple([ast.UnaryOp(ast.USub(), delta), *rest], ast.Load()))
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value - 1 if value else 1)
        case ast.Constant(float(value)):
            yield ast.Constant(1.001 * value)
        case ast.Constant("x" | "y" as value):
            yield ast.Constant("y" if value == "x" else "x")
        case ast.Constant(str(value)) if "->" in value:
            given, result = value.split("->")
            yield from (ast.Constant(f"{given}->{r}") for r in (result[::-1], result[:-1]))
        case ast.Name(name, ast.Load()):
            others = CONFUSED.get(name, "").split()
            yield from (ast.Name(n, ast.Load()) for n in others if n in names)
        case ast.Attribute(value, name, ast.Load()) if name in MISTAKEN:
            yield ast.Attribute(value, MISTAKEN[name], ast.Load())
        case ast.Call(func, args, keywords):
            what = ast.unparse(func).split(".")[-1].strip("()")
            if what in LEFT_OUT.split():
                inner = [func.value] if what in ("astype", "reshape") else args[what == "where" :]
                yield from (a for a in inner if not isinstance(a, ast.Constant))
            if what in SWAPPED.split():
                for i in range(what in ("where", "einsum"), len(args) - 1):
                    pair = [args[i + 1], args[i]]
                    yield ast.Call(func, [*args[:i], *pair, *args[i + 2 :]], keywords)
            for k in keywords:
                yield ast.Call(func, args, [other for other in keywords if other is not k])


ATOMS = ast.Name | ast.Constant | ast.Attribute | ast.UnaryOp | ast.keyword


def places(node, shown=None):
    """Every node that computes: its holder, its key there, itself, what to show of its change."""
    for field, value in ast.iter_fields(node):
        many = isinstance(value, list)
        for key, child in enumerate(value) if many else [(field, value)]:
            match child:
                case ast.If(body=[ast.Raise()]) | ast.Raise() | ast.Assert() | ast.JoinedStr():
                    continue  # refusals are not rules
                case ast.Expr(ast.Constant()) | ast.arguments() | ast.Attribute(attr="dtype"):
                    continue
                case ast.Expr(ast.Call(func)) if "check" in ast.unparse(func):
                    continue
            if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                around = (shown if isinstance(child, ATOMS) else None) or child
                yield value if many else vars(node), key, child, around
                yield from places(child, around)


def functions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


@contextlib.contextmanager
def changed(holder, key, new):
    was, holder[key] = holder[key], new
    try:
        yield
    finally:
        holder[key] = was


def files():
    """Every file that has rules, and their patterns."""
    found = {}
    for glob, patterns in RULES.items():
        for path in sorted(SOURCE.glob(glob)):
            file = str(path.relative_to(SOURCE))
            found[file] = f"{found.get(file, '')} {patterns}"
    return found


def mutants():
    """Every mutant, in the order of the source."""
    for file, patterns in files().items():
        tree = ast.parse((SOURCE / file).read_text())
        for rule, function in functions(tree):
            if not any(fnmatch.fnmatchcase(rule, p) for p in patterns.split()):
                continue
            names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            names |= {a.arg for a in function.args.args}
            seen = {ast.unparse(function)}
            for holder, key, node, shown in places(ast.Module(function.body, [])):
                before, _, _ = ast.unparse(shown).partition("\n")
                for new in wrong(node, rule, names):
                    with changed(holder, key, new):
                        source = ast.unparse(function)
                        after, _, _ = ast.unparse(new if shown is node else shown).partition("\n")
                    if source not in seen:
                        seen.add(source)
                        what = f"{rule}: {before} -> {after}"
                        why = next((w for w, same in EQUIVALENT.items() if what in same), "")
                        yield Mutant(file, rule, node.lineno, what, why, (tree, holder, key, new))


@contextlib.contextmanager
def applied(mutant):
    """Run with the mutant in the place of the rule; gives the names of the classes concerned."""
    tree, *change = mutant.change
    with changed(*change):
        codes = [compile(ast.fix_missing_locations(tree), mutant.file, "exec")]
    while codes[0].co_qualname != mutant.rule:
        codes += filter(inspect.iscode, codes.pop(0).co_consts)
    owner = importlib.import_module(f"jbackprop.{mutant.file[:-3].replace('/', '.')}")
    *classes, name = mutant.rule.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function = inspect.unwrap(getattr(vars(owner)[name], "__func__", vars(owner)[name]))
    right, function.__code__ = function.__code__, codes[0]
    leaf = inspect.isclass(owner) and issubclass(owner, Layer)
    try:  # of a leaf x and y are there, so that the wrong one is a number
        with mock.patch.object(owner, "reads", ("x", "y")) if leaf else contextlib.nullcontext():
            yield "|".join(c.__name__ for c in (owner, *getattr(owner, "__subclasses__", list)()))
    finally:
        function.__code__ = right


def late(*_):
    raise TimeoutError(f"not done after {LIMIT} s")


class Killer:
    """A pytest plugin: one collection of the tests serves all mutants."""

    def __init__(self, chosen):
        self.chosen, self.survivors = chosen, 0
        self.kills, self.sound, self.useless = Counter(), set(), set()

    def pytest_collection(self):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def pytest_runtestloop(self, session):
        signal.signal(signal.SIGVTALRM, late)
        for m in self.chosen:
            verdict = f"the same: {m.reason}" if m.reason else self.killer(m, session.items)
            self.survivors += not verdict
            print(f"{m}  {verdict or 'SURVIVED'}", flush=True)
        return True

    def killer(self, mutant, items):
        """What fails with the mutant and passes without, or an empty string."""
        with applied(mutant) as owner:
            likely = self.likely(mutant, owner, items)
        for item in likely:
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
            compiled = mutant.file.startswith(COMPILED)
            with applied(mutant):
                failed = fails(item, compiled)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if failed and item not in self.sound:  # some read programs, and here there are none
                (self.useless if fails(item, compiled) else self.sound).add(item)
            if failed and item in self.sound:
                self.kills.update([item, (item, mutant.rule)])
                return f"killed by {item.nodeid.removeprefix('tests/')}"
        return ""

    def likely(self, mutant, owner, items):
        """The tests for a mutant, those first that killed others."""
        patterns = [p for f, ps in KILLERS.items() if mutant.file.startswith(f) for p in ps]
        found = {}
        for pattern in patterns:
            pattern = pattern.replace("OWNER", f"({owner})").replace("FILE", Path(mutant.file).stem)
            name = re.compile(f"test_{pattern}")
            found |= dict.fromkeys(i for i in items if name.search(i.nodeid))
        for item in self.useless & found.keys():
            del found[item]
        return sorted(found, key=lambda i: (-self.kills[i, mutant.rule], -self.kills[i]))


def fails(item, compiled):
    if compiled:
        jax.clear_caches()
        return any(report.failed for report in runtestprotocol(item, log=False))
    with contextlib.nullcontext() if "under_jit" in item.name else jax.disable_jit():
        return any(report.failed for report in runtestprotocol(item, log=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="mutants whose line has this text")
    parser.add_argument("--sample", type=int, help="this many, evenly spread")
    parser.add_argument("--list", action="store_true", help="list them and run nothing")
    options = parser.parse_args()
    chosen = [m for m in mutants() if not options.only or any(t in str(m) for t in options.only)]
    if options.sample:
        chosen = [m for m in chosen if not m.reason]
        chosen = chosen[:: -(-len(chosen) // options.sample)]
    if options.list:
        return print(*chosen, f"{len(chosen)} mutants", sep="\n")
    start, killer = time.time(), Killer(chosen)
    no = {TESTS / f"test_{name}.py" for name in NO_KILLERS.split()}
    tests = sorted(map(str, set(TESTS.glob("test_*.py")) - no))
    status = pytest.main([*tests, "-q", "-s", "-p", "no:cacheprovider"], [killer])
    if status != pytest.ExitCode.OK:
        return f"pytest ends with {status!r}"
    same = sum(bool(m.reason) for m in chosen)
    print(
        f"{len(chosen)} mutants: {len(chosen) - same - killer.survivors} killed, "
        f"{same} compute the same, {killer.survivors} survived; {time.time() - start:.0f} s"
    )
    return int(killer.survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
