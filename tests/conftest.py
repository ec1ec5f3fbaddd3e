"""Strict configuration: float64 is there to be the truth, and nothing is promoted silently.

Most of the time of the tests is XLA's, compiling programs that run once. So it compiles them with
little optimisation, unless XLA_FLAGS says otherwise. What is about the program as users get it
(its speed, its memory, what is in it, and every rule once) is marked `as_shipped`, and runs where
XLA_FLAGS is set to nothing: `make test` does both.
"""

import gc
import itertools
import os
import re
from pathlib import Path

QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
quick = os.environ.setdefault("XLA_FLAGS", QUICK) == QUICK  # before JAX is imported

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # no stacks of calls in what XLA is given
_CACHE = os.environ.get("JBACKPROP_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "jax")
if jax.__version_info__ >= (0, 8):  # on the CPU JAX 0.6 reads loops back that compute other numbers
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


_ONLY_NEWEST = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.newest", re.MULTILINE)
if jax.__version_info__ < (0, 8):  # files of which nothing is asked here are not even imported
    files = Path(__file__).parent.glob("test_*.py")
    collect_ignore = [path.name for path in files if _ONLY_NEWEST.search(path.read_text())]


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config, items):
    """Tests of one case go to one worker, where they share what they compile."""
    shipped = [item for item in items if quick and item.get_closest_marker("as_shipped")]
    if shipped:  # they are run with XLA_FLAGS=''
        config.hook.pytest_deselected(items=shipped)
        items[:] = [item for item in items if item not in set(shipped)]
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if hasattr(case, "name"):
            item.add_marker(pytest.mark.xdist_group(case.name))


def pytest_collection_finish():
    """What is there by now stays there, and tracing makes many small objects that are soon let go."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


tests_run = itertools.count(1)
MAPS = Path("/proc/self/maps")


def pytest_runtest_teardown():
    """Compiled programs are let go before there are too many: Linux maps 65,530 pieces of memory."""
    if next(tests_run) % 50 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def as_jax_comes():
    """Without float64 and strictness: as most people run it."""
    jax.config.update("jax_enable_x64", False)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_enable_x64", True)
