"""The other side of the contests: networks in plain JAX, Flax and Equinox, under autodiff.

Written as their best engineer would, each in several arrangements; nothing of this library is used.
"""
