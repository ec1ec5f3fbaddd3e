"""Backpropagation with the lid off, for JAX: hand-derived delta rules, proved against jax.grad."""

from jbackprop import check as check
from jbackprop import diagnose as diagnose
from jbackprop import factored as factored
from jbackprop import metrics as metrics
from jbackprop import sweep as sweep
from jbackprop.compose import Sequential as Sequential
from jbackprop.compose import mlp as mlp
