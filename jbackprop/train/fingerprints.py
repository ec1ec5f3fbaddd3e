"""Trees as arrays by path, and fingerprints by which what was written is known again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored import PyTree


def flat(trees: Mapping[str, PyTree]) -> dict[str, Array]:
    """The arrays of trees by path; keys as their data, without what has no entries."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(trees))[0]
    found = {jax.tree_util.keystr(path): _data(leaf) for path, leaf in leaves}
    return {path: leaf for path, leaf in found.items() if leaf.size}


def unflat(trees: Mapping[str, PyTree], arrays: Mapping[str, Array]) -> dict[str, PyTree]:
    """Trees like these, of other arrays."""

    def put(path: Any, leaf: Any) -> Any:
        found = arrays.get(jax.tree_util.keystr(path))
        if found is None:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))
        return found

    return jax.tree_util.tree_map_with_path(put, dict(trees))


def _data(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def described(arrays: Mapping[str, Array]) -> dict[str, list[Any]]:
    """By path: shape, dtype and fingerprint."""
    prints: dict[str, Array] = {}
    for devices in {frozenset(leaf.sharding.device_set) for leaf in arrays.values()}:
        here = {p: leaf for p, leaf in arrays.items() if leaf.sharding.device_set == devices}
        prints |= _fingerprints(here)
    found = jax.device_get(prints)
    return {
        path: [list(leaf.shape), str(leaf.dtype), [int(v) for v in found[path]]]
        for path, leaf in arrays.items()
    }


@jax.jit
def _fingerprints(arrays: dict[str, Array]) -> dict[str, Array]:
    return {path: fingerprint(leaf) for path, leaf in arrays.items()}


def fingerprint(values: Array) -> Array:
    """Two sums modulo 2^32 over the entries' bits, each scrambled together with its place.

    The scrambling is one to one, so that no change of a single 32-bit word leaves either as it was;
    other changes do so by chance only, 1 in 2^64. Being sums, they do not depend on how the array
    is laid out over devices.
    """
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        values = jnp.stack([values.real, values.imag])
    if values.dtype == jnp.bool_:
        values = values.astype(jnp.uint8)
    bits = values.dtype.itemsize * 8
    word = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    words = lax.bitcast_convert_type(values, word).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(length % 2**32) + along

    def summed(seed: int) -> Array:
        return jnp.sum(_mixed(words ^ _mixed(place + jnp.uint32(seed))), dtype=jnp.uint32)

    return jnp.stack([summed(0x9E3779B9), summed(0x7F4A7C15)])


def _mixed(v: Array) -> Array:
    """A one-to-one scrambling of 32 bits, as the finalizer of MurmurHash3 (Appleby, 2011)."""
    v = (v ^ (v >> 16)) * jnp.uint32(0x85EBCA6B)
    v = (v ^ (v >> 13)) * jnp.uint32(0xC2B2AE35)
    return v ^ (v >> 16)
