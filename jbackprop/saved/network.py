"""A network in a file: what it is, its parameters, its loss, and what its user noted."""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbackprop
from jbackprop.calls import check_loss, check_net
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.saved import archive
from jbackprop.saved.configuration import (
    Encoder,
    FormatError,
    Json,
    by_name,
    construct,
    difference,
    unresolved,
)
from jbackprop.structure import parameter_paths
from jbackprop.sweep import Node

FORMAT = "jbackprop network"
VERSION = 1
"""Raised whenever an older jbackprop would misread the file; what it reads stays readable."""

_KEY = "key:"  # in front of the implementation of a typed key, where others have their dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """What `load` found.

    Attributes:
        net: the network, equal to the one that was saved.
        params: its parameters, the same bits.
        loss: its loss; None if none was saved.
        notes: what its user noted, as JSON has it: tuples have become lists.
        version: of the jbackprop that wrote the file.
    """

    net: Node
    params: PyTree
    loss: Loss | None
    notes: Json
    version: str


def save(
    path: str | os.PathLike[str],
    net: Node,
    params: PyTree,
    *,
    loss: Loss | None = None,
    notes: Json = None,
) -> None:
    """Save a network: what it is, and its parameters. `load` reads it.

    The file is a zip file: the parameters by path ("layers[0].w"), which `numpy.load` reads as
    well, and config.json, a text. A file of that name is replaced at once, when all is on the disk:
    whatever happens on the way, the old one is there or the new one.

    Functions and classes of your own are saved by name; `load` wants them handed in. So give them
    names, and keep their code.

    Args:
        path: of the file, such as "model.npz"; no ending is added.
        net: a layer or a composite.
        params: its parameters, of any dtype. Those on several devices of this process are gathered.
        loss: a `Loss`, if it is to be kept with the network.
        notes: anything that JSON can say: names of classes, scales of features, a history.

    Raises:
        TypeError: no network, no loss, notes that are no JSON, parameters that are no arrays.
        ValueError: parameters of another network, or on other processes; a class of yours whose
            constructor takes something else than its fields.
        OSError: the file cannot be written; the old one is as it was.
    """
    _check_kinds(net, loss)
    encoder = Encoder()
    configs = encoder.encode((net, loss))
    _check_constructors(configs, encoder.known)
    try:
        json.dumps(notes)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"notes must be what JSON can say (dict, list, str, numbers, None): {error}; of an "
            "array take .tolist()"
        ) from None
    leaves = _leaves(net, params)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "library": jbackprop.__version__,
        "net": configs[0],
        "loss": configs[1],
        "notes": notes,
        "parameters": {
            path: {"dtype": _dtype_name(leaf), "shape": list(leaf.shape)}
            for path, leaf in leaves.items()
        },
    }
    arrays = ((_entry(path), _on_host(leaf)) for path, leaf in leaves.items())
    archive.write(path, config, arrays)


def load(
    path: str | os.PathLike[str], *, known: Mapping[str, Any] | Iterable[Any] | None = None
) -> Saved:
    """Load a network that `save` has saved: the same network, and the same bits.

    Nothing is unpickled and nothing is imported because the file says so: a file can name layers,
    losses and initialisers of jbackprop and public functions of JAX, and what you hand in. (The
    classes and functions that you hand in are called, with what the file gives them.)

    Args:
        path: of the file.
        known: your own functions and classes in it: a list, `known=[Gains, swish]`, where each has
            the name that it had, or a dict by these names, `known={"swish": new_swish}`.

    Raises:
        FormatError: it is no such file, or a damaged one, or one of a newer jbackprop, or it names
            what is not known; the message says which, and what to do.
        OSError: it is not there, or may not be read.
    """
    handed = by_name(known)
    with archive.opened(path) as file:
        config = _checked(file.config)
        _check_names(config, handed)
        net = construct(config["net"], handed, "net")
        loss = construct(config["loss"], handed, "loss")
        try:
            _check_kinds(net, loss)
            shapes = jax.eval_shape(lambda: net.init(jax.random.key(0)))
        except Exception as error:  # init of whatever was handed in
            raise FormatError(f"this makes no network of it: {error}") from error
        params = _read(file, config["parameters"], net, shapes)
        return Saved(net, params, loss, config["notes"], config["library"])


def _check_kinds(net: Any, loss: Any) -> None:
    check_net(net)
    if loss is not None:
        check_loss(loss)


def _check_constructors(configs: list[Json], known: Mapping[str, Any]) -> None:
    """Raise, before anything is written, unless it can all be made again."""
    for what, config in zip(("net", "loss"), configs, strict=True):
        try:
            found = Encoder().encode(construct(config, known, what))
        except FormatError as error:
            why: str | None = str(error)
        else:
            why = difference(config, found, ("now", "when made again from its fields"), what)
        if why is not None:
            raise ValueError(
                f"this could not be loaded again: {why}. A class of your own must be a dataclass "
                "that is made from its fields; where its constructor takes other things, write a "
                "function instead, that returns a Sequential say"
            )


def _leaves(net: Node, params: PyTree) -> dict[str, Any]:
    """The parameters by path, checked against those that the network would make."""
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0)))
    tree: Any = jax.tree.structure(shapes)
    if tree != jax.tree.structure(params):
        expected, found = (
            [jax.tree_util.keystr(where) for where, _ in jax.tree.leaves_with_path(t)]
            for t in (shapes, params)
        )
        missing = [f"params{where} is missing" for where in expected if where not in found]
        more = [f"params{where} is too many" for where in found if where not in expected]
        why = (missing + more + ["tuples, lists or dicts are not where they should be"])[0]
        raise ValueError(f"these are not the parameters of this network: {why}; see net.init")
    leaves = dict(zip(parameter_paths(net, shapes), jax.tree.leaves(params), strict=True))
    for (path, leaf), like in zip(leaves.items(), jax.tree.leaves(shapes), strict=True):
        if isinstance(leaf, bool | int | float | complex):
            leaf = leaves[path] = jnp.asarray(leaf)
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(f"{path} has no value yet: call jb.save outside of jit, grad and vmap")
        array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
        if not array or (not _is_key(leaf) and leaf.dtype.kind not in "biufcV"):
            raise TypeError(f"{path} must be an array of numbers, not {leaf!r}")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{path} is partly on other processes, but jb.save writes from one: gather it "
                "first (jax.experimental.multihost_utils.process_allgather), or use the "
                "checkpoints of training"
            )
        wrong = _misfit(leaf.shape, leaf.dtype, like)
        if wrong:
            raise ValueError(f"these are not the parameters of this network: {path} {wrong}")
    return leaves


def _misfit(shape: Any, dtype: Any, like: jax.ShapeDtypeStruct) -> str | None:
    """In which way an array is not what init makes; another number of bits is all right."""
    if tuple(shape) != like.shape:
        return f"has the shape {tuple(shape)}, but {like.shape} is needed"
    kinds = (jnp.inexact, jnp.integer)
    alike = any(all(jnp.issubdtype(d, k) for d in (dtype, like.dtype)) for k in kinds)
    return None if alike or dtype == like.dtype else f"is {dtype}, but {like.dtype} is needed"


def _entry(path: str) -> str:
    """The name in the zip file: the path, where that is plain text."""
    return urllib.parse.quote(path, safe="[].'\" ,()") + ".npy"


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _dtype_name(leaf: Any) -> str:
    return f"{_KEY}{jax.random.key_impl(leaf)}" if _is_key(leaf) else str(leaf.dtype.name)


def _on_host(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _checked(config: Json) -> dict[str, Any]:
    """The configuration, if it is one of this format, and of a version that is understood."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError("it is in another format, not one of jb.save; jb.load reads no other")
    version, library = config.get("version"), config.get("library")
    if not isinstance(version, int) or version > VERSION:
        raise FormatError(
            f"it was written by jbackprop {library} in version {version} of the format, but this "
            f"is jbackprop {jbackprop.__version__}, which reads up to {VERSION}: upgrade jbackprop"
        )
    match config:
        case {"library": str(), "net": _, "loss": _, "notes": _, "parameters": dict(found)}:
            for path, entry in found.items():
                match entry:
                    case {"dtype": str(), "shape": list(shape)} if all(
                        type(size) is int and size >= 0 for size in shape
                    ):
                        continue
                raise FormatError(f"its list of parameters makes no sense at {path}")
            return config
    raise FormatError("its config.json is not complete; it was changed after jb.save")


def _check_names(config: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Raise unless all that the file names is known."""
    missing: dict[str, str] = {}
    for what in ("net", "loss"):
        missing = unresolved(config[what], known, what) | missing
    if not missing:
        return
    ours = [name for name in missing if name.startswith("jbackprop.")]
    if ours:
        raise FormatError(
            f"it needs {', '.join(ours)}, which jbackprop {jbackprop.__version__} has not: it was "
            f"written by jbackprop {config['library']}; install that, or a newer one"
        )
    names = ", ".join(f"{name} ({path})" for name, path in missing.items())
    call = f"known=[{', '.join(missing)}]"
    if not all(name.isidentifier() for name in missing):
        call = f"known={{{', '.join(f'{name!r}: ...' for name in missing)}}}"
    raise FormatError(
        f"it names what is not jbackprop's: {names}. Files hold no code: import or define them as "
        f"they were and hand them in, jb.load(path, {call}); where the names have changed, as a "
        "dict by the old ones"
    )


def _read(file: archive.Archive, found: dict[str, Any], net: Node, shapes: PyTree) -> PyTree:
    """The parameters, in the tree that init makes."""
    paths = parameter_paths(net, shapes)
    for missing in sorted({*paths} - {*found}):
        raise FormatError(f"it has no {missing}, which the network needs{_CHANGED}")
    for more in sorted({*found} - {*paths}):
        raise FormatError(f"it has {more}, which the network does not have{_CHANGED}")
    for entry in sorted({*map(_entry, paths)} ^ {*file.entries}):
        raise FormatError(f"the entry {entry} is missing or too many; it was changed after jb.save")
    leaves = []
    for path, like in zip(paths, jax.tree.leaves(shapes), strict=True):
        name, shape = found[path]["dtype"], tuple(found[path]["shape"])
        wrong = _misfit(shape, like.dtype, like)
        if wrong:
            raise FormatError(f"{path} {wrong}{_CHANGED}")
        leaves.append(_leaf(file, path, name, like))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


_CHANGED = (
    ": the file was changed after jb.save, or the code of the network (yours, or jbackprop's) was"
)


def _leaf(file: archive.Archive, path: str, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    if name.startswith(_KEY):
        impl = name.removeprefix(_KEY)
        try:
            data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
        except ValueError as error:
            raise FormatError(f"{path} is a key that this JAX does not know: {error}") from error
        numbers = file.array(_entry(path), like.shape + data.shape, np.dtype(data.dtype))
        return jax.random.wrap_key_data(jnp.asarray(numbers), impl=impl)
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise FormatError(f"{path} is of the dtype {name}, which NumPy does not know") from error
    wrong = _misfit(like.shape, dtype, like)
    if wrong:
        raise FormatError(f"{path} {wrong}{_CHANGED}")
    array = file.array(_entry(path), like.shape, dtype)
    leaf = jnp.asarray(array)
    if leaf.dtype != dtype:
        raise FormatError(
            f"{path} is {dtype}, which JAX would cut to {leaf.dtype}: switch 64 bits on with "
            'jax.config.update("jax_enable_x64", True), or save the network in float32'
        )
    return leaf
