"""Composites: what routes deltas between layers."""

from jbackprop.compose.mlp import mlp as mlp
from jbackprop.compose.sequential import Sequential as Sequential
