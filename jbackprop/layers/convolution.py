"""Convolutions, and what carries them back: the same with the arrows turned round."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from jbackprop.checks import check_flags, check_functions, check_key, check_sizes
from jbackprop.factored import Geometry, Patches, PyTree, Shift
from jbackprop.layers import windows
from jbackprop.layers.checks import check_features, check_params, shown
from jbackprop.layers.dense import Init, glorot_uniform
from jbackprop.sweep import Layer, Trace

_he = initializers.he_normal()


def he_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """He, Zhang, Ren and Sun (2015), equation 10, for relu; as a function that pickles."""
    return _he(key, shape, dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class _Convolution(Layer):
    """What both convolutions share: their geometry says the rest."""

    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: windows.Padding = "SAME"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    w_init: Init = glorot_uniform
    b_init: Init = initializers.zeros

    reads = ("x",)

    def __post_init__(self) -> None:
        check_sizes(self, "c_in", "c_out", "groups")
        check_flags(self, "bias")
        check_functions(self, "w_init", "b_init")
        windows.check_window(self, "kernel")
        for name in ("stride", "dilation"):
            windows.check_steps(self, name, len(self.kernel))
        windows.check_padding(self, len(self.kernel))
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(
                f"{type(self).__name__}: {self.groups} groups must divide c_in = {self.c_in} and "
                f"c_out = {self.c_out}"
            )

    def __repr__(self) -> str:
        plain = dataclasses.replace(self, w_init=glorot_uniform, b_init=initializers.zeros)
        return shown(plain, "c_in", "c_out", "kernel")

    @abc.abstractmethod
    def geometry(self, size: tuple[int, ...]) -> Geometry:
        """How the kernel is laid over an example of this size, without its channels."""

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{self}.init: key")
        key_w, key_b = jax.random.split(key)
        dtype = jnp.result_type(float)
        shapes = self._shapes
        params = {"w": self.w_init(key_w, shapes["w"], dtype)}
        if self.bias:
            params["b"] = self.b_init(key_b, shapes["b"], dtype)
        return params

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_features(self, x, self.c_in)
        windows.check_spatial(self, x, len(self.kernel))
        check_params(self, params, self._shapes)
        geometry = self.geometry(x.shape[:-1])
        windows.check_outputs(self, x, geometry.outputs(x.shape[:-1]))
        dtype = jnp.result_type(x, params["w"])
        z = geometry.correlate(x[None].astype(dtype), params["w"].astype(dtype))[0]
        if self.bias:
            z = z + jnp.broadcast_to(params["b"], z.shape)
        return z, None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        x = trace.x
        geometry = self.geometry(x.shape[:-1])
        w = geometry.turned(params["w"].astype(delta.dtype))
        delta_x = geometry.back(x.shape[:-1]).correlate(delta[None], w)[0]
        factored: dict[str, Any] = {"w": Patches.of(x, delta, geometry)}
        if self.bias:
            factored["b"] = Shift.of(delta)
        return delta_x.astype(x.dtype), factored

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        w = (*self.kernel, self.c_in // self.groups, self.c_out)
        return {"w": w} | ({"b": (self.c_out,)} if self.bias else {})

    @property
    def _steps(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stride, dilation and reach of the kernel along each axis."""
        n = len(self.kernel)
        stride, dilation = windows.steps(self.stride, n), windows.steps(self.dilation, n)
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, dilation, strict=True))
        return stride, dilation, reach


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(_Convolution):
    """A convolution (as everywhere in this field: a correlation) over any number of axes.

    Equation, for one example, with t the place of an output, k that of an entry of the kernel, s
    the stride, d the dilation, p the padding in front, all of them vectors over the spatial axes:

        z_to = sum_k sum_i x_{ts+kd-p, i} w_kio + b_o         x (*size, c_in) -> z (*outputs, c_out)

    where x is 0 outside its size. With groups, the channels fall into that many equal parts, and
    o sees the i of its own part only; groups = c_in is the depthwise convolution.

    Derivation. Let delta_to = dC/dz_to. The kernel's entry w_kio is used at every t, and is there
    multiplied with x_{ts+kd-p, i}; the positions' shares add up:

        dC/dw_kio = sum_t delta_to dz_to/dw_kio = sum_t x_{ts+kd-p, i} delta_to

    This is a correlation again, of x with delta in the place of the kernel. It asks for the places
    k of a kernel, that are d apart, and sums over the places t of delta, that are s apart: stride
    and dilation have changed roles. The kind `Patches` stands for it.

        dC/db_o   = sum_t delta_to

    An entry x_ui reaches z_to through w_kio for each pair (t, k) with u = ts + kd - p, thus

        dC/dx_ui  = sum_{t,k : ts+kd-p = u} sum_o delta_to w_kio

    To write it as a correlation, spread delta by s, so that D_{ts} = delta_t and D is 0 between;
    then the sum is over k alone, of D_{u+p-kd} w_k. Let K be the size of the kernel and
    k = K - 1 - j: with the kernel the other way round, v_j = w_{K-1-j},

        dC/dx_ui  = sum_j sum_o D_{u + jd - ((K-1)d - p), o} v_jio

    a correlation of stride 1, dilation d and padding (K-1)d - p in front, from outputs to inputs:
    the transposed convolution. Behind, D is padded (or cut) so that u runs over the size of x.

    Source: LeCun, Boser, Denker et al., Backpropagation applied to handwritten zip code
    recognition, Neural Computation 1 (1989); all strides and dilations: Dumoulin and Visin, A guide
    to convolution arithmetic for deep learning (2016), section 4.

    Params: ``{"w": (*kernel, c_in/groups, c_out), "b": (c_out,)}``; without a bias no ``"b"``.

    Attributes:
        c_in: channels of the input, on its last axis.
        c_out: channels of the output.
        kernel: its size along each spatial axis: (3, 3) for images, (3,) for sequences.
        stride: from one output to the next; one number, or one for each axis.
        padding: "SAME", ceil(size / stride) outputs; "VALID", no padding; or (before, after) for
            each axis; one number stands for the same all around.
        dilation: from one entry of the kernel to the next.
        groups: parts of the channels that do not see one another; divides c_in and c_out.
        bias: whether there is a b.
        w_init: initialiser of w, by default Glorot and Bengio's (2010) uniform one.
        b_init: initialiser of b, by default zeros.

    Raises:
        ValueError: sizes below 1, groups that do not divide, inputs or parameters of another shape,
            a kernel that does not fit into the input.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    def geometry(self, size: tuple[int, ...]) -> Geometry:
        stride, dilation, reach = self._steps
        padding = windows.pairs(self.padding, size, reach, stride)
        one = (1,) * len(self.kernel)
        return Geometry(self.kernel, stride, padding, dilation, one, self.groups)


@dataclasses.dataclass(frozen=True, repr=False)
class ConvTranspose(_Convolution):
    """A transposed convolution: the linear map that carries the deltas of a `Conv` back.

    Equation, for one example: every x_u is laid out, through the kernel, around the place us,

        z_to = sum_{u,k : us+kd-p = t} sum_i x_ui w_kio + b_o

    from x (*size, c_in) to z (*outputs, c_out). It is the transpose of
    Conv(c_out, c_in, kernel, stride, padding, dilation, groups), whose kernel is w with its two
    channel axes exchanged (in each group). A Conv maps several sizes to one, so that the way back
    must choose; with r = (kernel - 1) d + 1 the size of the output along an axis is

        "SAME"             size * s
        "VALID"            (size - 1) s + r
        (before, after)    (size - 1) s + r - before - after

    Derivation. As there, spread x by s: X_{us} = x_u, and 0 between. The kernel's entry k = K-1-j
    of an output at t is multiplied with X_{t+p-kd}, so that with the kernel the other way round

        z_to = sum_j sum_i X_{t + jd - ((K-1)d - p), i} w_{K-1-j, io} + b_o

    is a correlation of stride 1. From it, as for `Conv`, with delta_to = dC/dz_to,

        dC/dw_kio = sum_t X_{t+p-kd, i} delta_to  = sum_u x_ui delta_{us+kd-p, o}
        dC/db_o   = sum_t delta_to
        dC/dx_ui  = sum_k sum_o delta_{us+kd-p, o} w_kio

    and the last is the plain convolution of stride s: what carried deltas is now carried by it.

    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning (2016),
    section 4; as a layer: Zeiler, Krishnan, Taylor and Fergus, Deconvolutional networks (2010).

    Params: ``{"w": (*kernel, c_in/groups, c_out), "b": (c_out,)}``; without a bias no ``"b"``.

    Attributes:
        c_in: channels of the input, on its last axis.
        c_out: channels of the output.
        kernel: its size along each spatial axis.
        stride: from one input to the next, seen from the outputs.
        padding: "SAME", "VALID", one number, or (before, after) for each axis: what the Conv would
            pad, hence what is cut off here. A smaller `after` makes the output longer.
        dilation: from one entry of the kernel to the next.
        groups: parts of the channels that do not see one another; divides c_in and c_out.
        bias: whether there is a b.
        w_init: initialiser of w, by default Glorot and Bengio's (2010) uniform one.
        b_init: initialiser of b, by default zeros.

    Raises:
        ValueError: sizes below 1, groups that do not divide, inputs or parameters of another shape,
            more padding than there is output.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    def geometry(self, size: tuple[int, ...]) -> Geometry:
        stride, dilation, reach = self._steps
        wide = tuple(n * s for n, s in zip(size, stride, strict=True))
        padding = []
        cut = windows.pairs(self.padding, wide, reach, stride)
        for n, s, r, (low, high) in zip(size, stride, reach, cut, strict=True):
            if self.padding == "SAME":  # behind, as far as n s: a kernel may be shorter than s
                high = (n - 1) * s + r - low - n * s
            padding.append((r - 1 - low, r - 1 - high))
        one = (1,) * len(self.kernel)
        return Geometry(self.kernel, one, tuple(padding), dilation, stride, self.groups, True)
