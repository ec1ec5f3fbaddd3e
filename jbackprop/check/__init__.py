"""Proof of the rules: deltas and gradients against automatic differentiation in float64."""

from jbackprop.check.network import Agreement as Agreement
from jbackprop.check.network import Row as Row
from jbackprop.check.network import network as network
