"""Which Kronecker block, or other, each parameter of a network has."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax

from jbackprop.curvature.blocks import Where
from jbackprop.curvature.sweeps import Model, canonical_home, layers_of, pairs_of
from jbackprop.factored import Factored, Lookup, Nothing, Outer, Patches, Place, PyTree, Shift

Sharing = Literal["expand", "reduce"]
LARGEST = 8192
"""The longest side of a factor; what would have a longer one gets a diagonal block."""


class Role(enum.Enum):
    """What block a parameter of a layer has."""

    MATRIX = "Kronecker"
    WITH_BIAS = "Kronecker, with a row for the bias"
    BIAS = "exact, of a bias by itself"
    IN_MATRIX = "the row of another"
    DIAGONAL = "diagonal"


def roles_of(pairs: Sequence[Factored], sharing: Sharing, joint_bias: bool) -> list[Role]:
    """What block each parameter of one layer has."""

    def role(pair: Factored) -> Role:
        if isinstance(pair, Lookup) and sharing == "reduce" and pair.ids.shape[2] > 1:
            return Role.DIAGONAL  # the mean of one-hot rows has no diagonal A
        if isinstance(pair, Outer | Patches | Lookup):
            sides = [_outputs(pair)] + ([] if isinstance(pair, Lookup) else [_inputs(pair) + 1])
            return Role.MATRIX if max(sides) <= LARGEST else Role.DIAGONAL
        beside = any(isinstance(other, Outer | Patches) for other in pairs)
        if isinstance(pair, Shift) and beside and pair.delta.shape[-1] <= LARGEST:
            return Role.BIAS
        return Role.DIAGONAL

    roles = [role(pair) for pair in pairs]
    if not joint_bias or not roles.count(Role.MATRIX) == roles.count(Role.BIAS) == 1:
        return roles
    (matrix, bias) = (pairs[roles.index(own)] for own in (Role.MATRIX, Role.BIAS))
    if _places(matrix) != _places(bias):  # z = a W + b has one delta for both
        return roles
    joint = {Role.MATRIX: Role.WITH_BIAS, Role.BIAS: Role.IN_MATRIX}
    return [joint.get(role, role) for role in roles]


def _inputs(pair: Outer | Patches | Lookup) -> int:
    """i, the rows of a matrix."""
    if isinstance(pair, Lookup):
        return pair.rows
    if isinstance(pair, Outer):
        return int(pair.a.shape[-1])
    return math.prod(pair.geometry.kernel) * pair.a.shape[-1] // pair.geometry.groups


def _places(pair: Any) -> tuple[int, ...]:
    """Groups, positions and outputs of its delta."""
    shape = pair.delta.shape
    return shape[1], math.prod(shape[2:-1]), shape[-1]


def _outputs(pair: Outer | Patches | Lookup) -> int:
    """o, its columns."""
    groups = pair.geometry.groups if isinstance(pair, Patches) else 1
    return int(pair.delta.shape[-1]) // groups


class Plan(NamedTuple):
    """The role and the parameters of each block, by name; and the pairs of every parameter."""

    blocks: OrderedDict[str, tuple[Role, Where]]
    pairs: Sequence[Factored]


def planned(net: Model, params: PyTree, x: Any, sharing: Sharing, joint_bias: bool) -> Plan:
    """The blocks of a network, in forward order."""
    pairs = pairs_of(net, params, x)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    blocks: OrderedDict[str, tuple[Role, Where]] = OrderedDict()
    for group in layers_of(net, params, pairs):
        own = [pairs[k] for k in group.leaves]
        roles = roles_of(own, sharing, joint_bias)
        for k, pair, role in zip(group.leaves, own, roles, strict=True):
            if role is Role.IN_MATRIX or isinstance(pair, Nothing):
                continue
            several = sum(r is not Role.IN_MATRIX for r in roles) > 1
            name = group.name + (jax.tree_util.keystr(paths[k][-1:]) if several else "")
            blocks[name] = (role, _where(role, k, pair, group.leaves, own, roles))
    return Plan(blocks, pairs)


def _where(
    role: Role, k: int, pair: Factored, leaves: Sequence[int], own: Any, roles: Any
) -> Where:
    if role is Role.DIAGONAL:
        return Where((k,), (pair.home,))
    if role is Role.BIAS:
        return Where((k,), (pair.home,), pair.delta.shape[-1:])  # type: ignore[attr-defined]
    assert isinstance(pair, Outer | Patches | Lookup)
    home = pair.home if isinstance(pair, Lookup) else _canonical(pair)
    features = (_inputs(pair), _outputs(pair))
    if role is Role.MATRIX:
        return Where((k,), (home,), features)
    at = roles.index(Role.IN_MATRIX)
    return Where((k, leaves[at]), (home, own[at].home), features)


def _canonical(pair: Outer | Patches) -> Place:
    """The same of a pair of shapes alone."""
    found: list[Place] = []
    jax.eval_shape(lambda pair: found.append(canonical_home(pair)), pair)
    return found[0]
