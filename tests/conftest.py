"""Strict configuration: float64 is there to be the truth, and nothing is promoted silently."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_CACHE = os.environ.get("JBACKPROP_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "jax")
if jax.__version_info__ >= (0, 8):  # on the CPU JAX 0.6 reads loops back that compute other numbers
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
