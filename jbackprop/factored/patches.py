"""The pair of a convolution's kernel: what it was correlated with, and the delta of what came out.

With x the input, spread by `spread` (that many steps from one entry to the next, zeros between) and
padded, and k the places of the kernel, every convolution here is the correlation

    z_t = sum_k x_{t s + k d} w_k                          s strides, d dilation

so that the gradient of w_k is sum_t x_{t s + k d} (outer) delta_t: a correlation of x with delta,
where strides and dilation have changed places. Seen from t, it is an `Outer` of the patch that the
kernel saw there and delta_t; that form answers what a sum over the batch cannot.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored.base import Factored, Method, depth_into_groups, in_blocks, kind
from jbackprop.factored.outer import Outer
from jbackprop.factored.place import Place, Step, somewhere, stacked_place
from jbackprop.factored.sums import present, weighted, wide_dtype


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a kernel is laid over its input; one entry for each spatial axis.

    Attributes:
        kernel: its size.
        strides: from one output to the next.
        padding: entries added before and after the (spread) input; below 0 they are cut off.
        dilation: from one entry of the kernel to the next.
        spread: from one entry of the input to the next; above 1 in transposed convolutions.
        groups: parts of the channels that do not see one another.
        flipped: whether w_k stands at the far end of the kernel, as in transposed convolutions.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]
    groups: int = 1
    flipped: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The spatial axes, counted without those of the batch and the channels."""
        return tuple(range(len(self.kernel)))

    @property
    def reach(self) -> tuple[int, ...]:
        """How many entries the kernel spans, with the gaps of its dilation."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def spread_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size of a spread input."""
        return tuple((n - 1) * e + 1 for n, e in zip(size, self.spread, strict=True))

    def outputs(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """How many outputs each axis has; below 1 where the kernel does not fit in."""
        inside = zip(self.spread_size(size), self.padding, self.reach, self.strides, strict=True)
        return tuple((n + sum(p) - r) // s + 1 for n, p, r, s in inside)

    def correlate(self, x: Array, w: Array) -> Array:
        """z_t = sum_k x_{t s + k d} w_k: x (B, *size, c), w (*kernel, c/groups, o)."""
        n, (first, last) = len(self.kernel), (0, len(self.kernel) + 1)
        numbers = lax.ConvDimensionNumbers(
            (first, last, *range(1, last)), (n + 1, n, *self.axes), (first, last, *range(1, last))
        )
        return lax.conv_general_dilated(
            x,
            jnp.flip(w, self.axes) if self.flipped else w,
            self.strides,
            self.padding,
            lhs_dilation=self.spread,
            rhs_dilation=self.dilation,
            dimension_numbers=numbers,
            feature_group_count=self.groups,
        )

    def back(self, size: tuple[int, ...]) -> Geometry:
        """The geometry that carries a delta back to an input of this size.

        x_u reaches z_t through w_k where u e = t s + k d - p. So delta is spread by s, the kernel
        lies the other way round, and u strides by e. Its far end, at (K - 1) d, comes first: hence
        (K - 1) d - p entries in front; and behind, as many as it takes to reach the last x.
        """
        outputs, padding = self.outputs(size), []
        for i, (low, _) in enumerate(self.padding):
            front = self.reach[i] - 1 - low
            spread = (outputs[i] - 1) * self.strides[i] + 1
            end = (size[i] - 1) * self.spread[i] + self.reach[i]
            padding.append((front, end - front - spread))
        return dataclasses.replace(
            self,
            strides=self.spread,
            spread=self.strides,
            padding=tuple(padding),
            flipped=not self.flipped,
        )

    def turned(self, w: Array) -> Array:
        """The kernel that carries deltas: (*kernel, c/groups, o) -> (*kernel, o/groups, c)."""
        g, n = self.groups, len(self.kernel)
        w = w.reshape(*self.kernel, w.shape[-2], g, w.shape[-1] // g)
        w = w.transpose(*self.axes, n + 2, n + 1, n)
        return w.reshape(*self.kernel, w.shape[-3], -1)

    def kernel_gradient(self, x: Array, delta: Array) -> Array:
        """sum_n sum_t x_{t s + k d} (outer) delta_t, (*kernel, c/groups, o): one correlation."""
        n, last = len(self.kernel), len(self.kernel) + 1
        inputs, outputs = self.spread_size(x.shape[1:-1]), delta.shape[1:-1]
        padding = tuple(
            (low, self.reach[i] - 1 + (outputs[i] - 1) * self.strides[i] + 1 - inputs[i] - low)
            for i, (low, _) in enumerate(self.padding)
        )
        numbers = lax.ConvDimensionNumbers(  # the examples are what is summed over
            (last, 0, *range(1, last)), (last, 0, *range(1, last)), (n, n + 1, *self.axes)
        )
        w = lax.conv_general_dilated(
            x,
            delta,
            self.dilation,
            padding,
            lhs_dilation=self.spread,
            rhs_dilation=self.strides,
            dimension_numbers=numbers,
            batch_group_count=self.groups,
            preferred_element_type=wide_dtype(x.dtype),
        )
        return jnp.flip(w, self.axes) if self.flipped else w

    def patches(self, x: Array) -> Array:
        """What the kernel sees at each t: (N, *size, c) -> (N, *outputs, *kernel, c)."""
        outputs = self.outputs(x.shape[1:-1])
        around = [(*pair, e - 1) for pair, e in zip(self.padding, self.spread, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        for i in self.axes:  # one axis after the other: the sum of the sizes in slices
            s, span = self.strides[i], (outputs[i] - 1) * self.strides[i] + 1
            starts = [k * self.dilation[i] for k in range(self.kernel[i])]
            seen = [
                lax.slice_in_dim(x, start, start + span, s, axis=i + 1)
                for start in (reversed(starts) if self.flipped else starts)
            ]
            x = jnp.stack(seen, axis=-2)
        return x


@kind("a", "delta", meta=("geometry",))
class Patches(Factored):
    """g_nk = sum_t a_n,ts+kd (outer) delta_nt: the kernel of a convolution.

    Attributes:
        a: what the kernel was laid over, (B, G, *size, c).
        delta: the delta of what came out, (B, G, *outputs, o).
        geometry: how it was laid; with its groups, one kernel is (*kernel, c/groups, o).
    """

    a: Array
    delta: Array
    geometry: Geometry
    place: Place | None = None

    @classmethod
    def of(
        cls, a: Array, delta: Array, geometry: Geometry, steps: tuple[Step, ...] = ()
    ) -> Patches:
        """One example's pair from a (*size, c) and delta (*outputs, o)."""
        return cls(a[None], delta[None], geometry, somewhere(steps))

    def ranks(self, place: Place) -> dict[str, int]:
        axes = 3 + len(self.geometry.kernel)
        return {"a": axes, "delta": axes}

    def check_fits(self, place: Place) -> None:
        features = (self.a.shape[-1] // self.geometry.groups, self.delta.shape[-1])
        kernel = (*self.geometry.kernel, *features)
        if not place.steps and place.shape not in (kernel, (self.a.shape[1], *kernel)):
            raise ValueError(
                f"{type(self).__name__} of kernels {kernel} does not fit a parameter of shape "
                f"{place.shape}: are its operands swapped? Steps lead from a parameter to another "
                "form"
            )

    def stacked(self) -> Patches:
        place = stacked_place(self.place, self.a.shape[0])
        a, delta = depth_into_groups(self.a), depth_into_groups(self.delta)
        return Patches(a, delta, self.geometry, place)

    def total(self, weights: Array | None = None) -> Array:
        _ = self.home  # raises for what was kept under an outer vmap
        a, delta = self.a, self.delta
        if weights is not None:
            delta = weighted(weights, delta)
            a = present(weights, a).astype(delta.dtype)
        dtype = jnp.result_type(a, delta)
        a, delta = a.astype(dtype), delta.astype(dtype)
        if a.shape[1] == 1:
            return self.home.restore(self.geometry.kernel_gradient(a[:, 0], delta[:, 0]))
        pairs = (jnp.moveaxis(v, 1, 0) for v in (a, delta))  # one copy after the other: a grouped
        gradient = self.geometry.kernel_gradient  # correlation is slower
        return self.home.restore(lax.map(lambda pair: gradient(*pair), tuple(pairs)))

    def outer(self) -> Outer:
        """The same as an `Outer` of patches; every copy's groups become groups."""
        home, geometry, (b, copies) = self.home, self.geometry, self.a.shape[:2]
        g, n, positions = geometry.groups, len(geometry.kernel), math.prod(self.delta.shape[2:-1])
        c, o = self.a.shape[-1] // g, self.delta.shape[-1] // g
        size = math.prod(geometry.kernel)
        a = geometry.patches(self.a.reshape(b * copies, *self.a.shape[2:]))
        a = a.reshape(b, copies, positions, size, g, c).transpose(0, 1, 4, 2, 3, 5)
        delta = self.delta.reshape(b, copies, positions, g, o).transpose(0, 1, 3, 2, 4)
        one = copies // math.prod(home.stack)
        axes = (0, n + 2, *range(1, n + 2), n + 3)
        steps: tuple[Step, ...] = (
            ("reshape", (one, *geometry.kernel, c, g, o)),
            ("transpose", axes),
            ("reshape", (one * g, size * c, o)),
        )
        return Outer(
            a.reshape(b, copies * g, positions, size * c),
            delta.reshape(b, copies * g, positions, o),
            dataclasses.replace(home, steps=(*home.steps, *steps)),
        )

    @property
    def entries(self) -> int:
        kernel, positions = math.prod(self.geometry.kernel), math.prod(self.delta.shape[2:-1])
        return super().entries + self.a.shape[1] * positions * kernel * self.a.shape[-1]

    def each(self) -> Array:
        return self.outer().each()

    def square_norm(self, method: Method = "auto") -> Array:
        return self._by_example(lambda pair: pair.outer().square_norm(method))

    def project(self, vector: Array) -> Array:
        (b, copies), dtype = self.a.shape[:2], wide_dtype(jnp.result_type(self.a, self.delta))
        kernel = self.geometry.kernel
        features = (self.a.shape[-1] // self.geometry.groups, self.delta.shape[-1])
        w = self.home.canonical(vector, (*kernel, *features)).astype(dtype)
        a, delta = (jnp.moveaxis(v.astype(dtype), 1, 0) for v in (self.a, self.delta))

        def one(pair: tuple[Array, Array, Array]) -> Array:
            products = self.geometry.correlate(pair[0], pair[2]) * pair[1]
            return jnp.sum(products.reshape(b, -1), axis=1)

        return one((a[0], delta[0], w[0])) if copies == 1 else lax.map(one, (a, delta, w)).sum(0)

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        if other is self:
            return self.square_norm(method)

        def products(pairs: tuple[Patches, Factored]) -> Array:
            mine, their = pairs
            return mine.outer().dot(their.outer() if isinstance(their, Patches) else their, method)

        return in_blocks(products, (self, other), self.size, self.entries + other.entries)

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        return self.outer().gram(other.outer() if isinstance(other, Patches) else other, method)
