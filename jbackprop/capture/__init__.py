"""Pairs (activation, delta) from any JAX model, unchanged."""

from jbackprop.capture.capture import capture as capture
