"""Mutants that compute the same as the rule: why, and which."""

EQUIVALENT: dict[str, list[str]] = {
    "z and a have one shape and dtype, and here both are there": [
        "Identity.slope: jnp.ones_like(a) -> jnp.ones_like(z)",
    ],
    "x and y have the same number of examples": [
        "Transported.sweep: batch_size(x) -> batch_size(y)",
        "DirectFeedbackAlignment.sweep: batch_size(x) -> batch_size(y)",
        "DifferenceTargetPropagation.sweep: batch_size(x) -> batch_size(y)",
        "PredictiveCoding.sweep: batch_size(x) -> batch_size(y)",
        "EquilibriumPropagation.sweep: batch_size(x) -> batch_size(y)",
        "_truth: batch_size(x) -> batch_size(y)",
        "ForwardForward.sweep: batch_size(x) -> batch_size(y)",
        "ForwardForward.truth: batch_size(x) -> batch_size(y)",
        "ForwardGradient._of_activities: batch_size(x) -> batch_size(y)",
    ],
    "JAX does so by itself: it broadcasts indices, drops those out of range, and casts": [
        "_scattered: jnp.broadcast_to(jnp.arange(groups)[:, None], ids.shape)"
        " -> jnp.arange(groups)[:, None]",
        "_scattered: table.at[group, ids].add(delta.astype(table.dtype), mode='drop')"
        " -> table.at[group, ids].add(delta.astype(table.dtype))",
        "_scattered: delta.astype(table.dtype) -> delta",
    ],
    "all copies have the same examples; and less than nothing is nothing": [
        "Nothing.stacked: self.none[0] -> self.none[1]",
        "Nothing.total: return jnp.zeros(self.home.stack + self.home.shape,"
        " wide_dtype(self.home.dtype)) -> return -jnp.zeros(self.home.stack + self.home.shape,"
        " wide_dtype(self.home.dtype))",
        "Nothing.each: return jnp.zeros((self.size, *total.shape), total.dtype)"
        " -> return -jnp.zeros((self.size, *total.shape), total.dtype)",
    ],
    "a product takes two dtypes and is wide: slower, and no less exact": [
        "Attention.forward: e.astype(v.dtype) -> e",
        "Attention.backward: wide if it.k.dtype == jnp.float16 else it.k.dtype -> wide",
        "Attention.backward: (p * g).astype(dtype) -> p * g",
        "Attention.backward: _flat(q).astype(dtype) -> _flat(q)",
        "Attention.backward: p.astype(k.dtype) -> p",
        "Attention.backward: k[:, :, :end].astype(dtype) -> k[:, :, :end]",
    ],
    "a layer that reads no y computes without one, and the y done again is the one that was": [
        "Checkpoint.backward: trace.y if 'y' in self.layer.reads else y -> trace.y",
        "Checkpoint.backward: trace.y if 'y' in self.layer.reads else y -> y",
        "Checkpoint.backward: 'y' in self.layer.reads -> 'y' not in self.layer.reads",
        "Checkpoint.backward: 'y' in self.layer.reads -> 'x' in self.layer.reads",
        "Checkpoint.backward: trace.y if 'y' in self.layer.reads else y"
        " -> trace.y if 'y' in self.layer.reads else x",
    ],
    "JAX broadcasts a mask by itself": [
        "_Heads.scores: jnp.broadcast_to(mask, may.shape) -> mask",
        "_Heads.scores: jnp.broadcast_to(may[None, :, None], z.shape) -> may[None, :, None]",
    ],
    "it was checked before that all are as many": [
        "Skip.backward: zip(self.children().items(), trace.saved, *trees, strict=True)"
        " -> zip(self.children().items(), trace.saved, *trees)",
        "Skip.backward: zip(self.children().items(), trace.saved, *trees, strict=True)"
        " -> zip(self.children().items(), trace.saved, *trees, strict=False)",
    ],
    "all steps have one shape, and of one step JAX takes the last; a wide edge is no less exact": [
        "Recurrent.backward: h[0] -> h[1]",
        "Recurrent.backward: h_0.astype(h.dtype) -> h_0",
    ],
    "how many queries are worked on at a time changes no number; all heads have as many keys": [
        "Attention._over_blocks: self.block or (T if T <= WHOLE else PART)"
        " -> T if T <= WHOLE else PART",
        "Attention._over_blocks: T if T <= WHOLE else PART -> PART",
        "Attention._over_blocks: T <= WHOLE -> T < WHOLE",
        "Attention._over_blocks: GROUPS if self.causal else 1 -> GROUPS",
        "Attention._over_blocks: GROUPS if self.causal else 1 -> 1",
        "Attention._over_blocks: GROUPS if self.causal else 1 -> GROUPS if self.causal else 0",
        "Attention._over_blocks: start + count * size if self.causal else S -> S",
        "Attention._over_blocks: found and self.causal -> found or self.causal",
        "Attention._over_blocks: found and self.causal -> found",
        "Attention._over_blocks: found and self.causal -> self.causal",
        "Attention._over_blocks: count == 1 -> count == 0",
        "_runs: full // 2 -> full",
        "_runs: full // 2 -> 2",
        "_runs: full // 2 -> full // 1",
        "_runs: b > a -> b >= a",
        "_part: a if a.shape[axis] == size else lax.dynamic_slice_in_dim(a, at, size, axis)"
        " -> lax.dynamic_slice_in_dim(a, at, size, axis)",
        "_join: jnp.concatenate(a[::-1], axis) if a[1:] else a[0]"
        " -> jnp.concatenate(a[::-1], axis)",
        "_join: 1: -> 0:",
        "Attention.backward: dv[0] -> dv[1]",
    ],
    "one example: JAX takes an index beyond it for the last": [
        "_Convolution.backward: geometry.back(x.shape[:-1]).correlate(delta[None], w)[0]"
        " -> geometry.back(x.shape[:-1]).correlate(delta[None], w)[1]",
    ],
    "jnp.sum takes halves in float32 by itself": [
        "Upsample.backward: jnp.sum(delta.reshape(*blocks, delta.shape[-1]), axis=within,"
        " dtype=wide_dtype(delta.dtype)) -> jnp.sum(delta.reshape(*blocks, delta.shape[-1]),"
        " axis=within)",
    ],
    "a and delta are stacked together": [
        "Patches.stacked: self.a.shape[0] -> self.delta.shape[0]",
        "Patches.total: a.shape[1] -> delta.shape[1]",
        "Patches.outer: self.a.shape[:2] -> self.delta.shape[:2]",
    ],
    "of one copy all are the first; JAX takes an index beyond it for the last": [
        "Patches.total: a.shape[1] == 1 -> a.shape[1] == 0",
        "Patches.total: (:, 0) -> (:, 1)",
    ],
    "a and delta have the same positions": [
        "Outer._by_gram: self.a.shape[2] -> self.delta.shape[2]",
    ],
    "where it is worth the care is a choice; on either side both are right": [
        "Outer._by_gram: 16 * self.a.shape[2] -> 15 * self.a.shape[2]",
        "Outer._by_gram: 1024 * jnp.finfo(products.dtype).eps -> 1023 * jnp.finfo(products.dtype).eps",
        "Outer._by_gram: products >= least -> products > least",
        "Outer._by_gram: products >= typical -> products > typical",
    ],
    "what holds NaN is NaN however it is found, at more cost": [
        "_unless: ~good & ~jnp.isnan(size) -> ~good",
    ],
    "written out, it is the same number, at more cost": [
        "Patches.gram: other.outer() if isinstance(other, Patches) else other -> other",
    ],
    "what comes out of a layer is as wide as what goes in": [
        "Patches.total: jnp.result_type(a, delta) -> jnp.result_type(delta, delta)",
        "Patches.total: delta.astype(dtype) -> delta",
    ],
    "padding never wins, whatever it holds": [
        "MaxPool.backward: axis.seen(x, -jnp.inf) -> axis.seen(x, jnp.inf)",
    ],
    "as long by construction": [
        "MaxPool.backward: zip(axis.seen(x, -jnp.inf), axis.real(), strict=True)"
        " -> zip(axis.seen(x, -jnp.inf), axis.real())",
        "MaxPool.backward: zip(axis.seen(x, -jnp.inf), axis.real(), strict=True)"
        " -> zip(axis.seen(x, -jnp.inf), axis.real(), strict=False)",
        "Upsample.backward: zip(delta.shape[:-1], factors, strict=True)"
        " -> zip(delta.shape[:-1], factors)",
        "Upsample.backward: zip(delta.shape[:-1], factors, strict=True)"
        " -> zip(delta.shape[:-1], factors, strict=False)",
        "Upsample._blocks: zip(size, factors, strict=True) -> zip(size, factors)",
        "Geometry.spread_size: zip(size, self.spread, strict=True) -> zip(size, self.spread)",
        "Geometry.spread_size: zip(size, self.spread, strict=True)"
        " -> zip(size, self.spread, strict=False)",
        "Geometry.outputs: zip(self.spread_size(size), self.padding, self.reach, self.strides, strict=True)"
        " -> zip(self.spread_size(size), self.padding, self.reach, self.strides)",
        "Geometry.outputs: zip(self.spread_size(size), self.padding, self.reach, self.strides, strict=True)"
        " -> zip(self.spread_size(size), self.padding, self.reach, self.strides, strict=False)",
        "Geometry.patches: zip(self.padding, self.spread, strict=True)"
        " -> zip(self.padding, self.spread)",
        "Geometry.patches: zip(self.padding, self.spread, strict=True)"
        " -> zip(self.padding, self.spread, strict=False)",
        "Upsample._blocks: zip(size, factors, strict=True) -> zip(size, factors, strict=False)",
    ],
    "pooling keeps the number of axes, and the channels": [
        "MaxPool.backward: y.ndim - axis.axis -> x.ndim - axis.axis",
        "GlobalMaxPool.backward: trace.x.shape[-1] -> trace.y.shape[-1]",
    ],
    "a and z have one sign, and pass a kink together": [
        "Relu.slope: a > 0 -> z > 0",
        "Relu.backward: trace.y > 0 -> trace.x > 0",
        "LeakyRelu.slope: a > 0 -> z > 0",
        "Elu.slope: a > 0 -> z > 0",
        "Selu.slope: a > 0 -> z > 0",
        "Celu.slope: a > 0 -> z > 0",
        "HardTanh.slope: jnp.abs(a) -> jnp.abs(z)",
    ],
    "no kink: both branches give 1 at 0": ["Celu.slope: a > 0 -> a >= 0"],
    "x and delta have as many axes": ["Dense.backward: delta.ndim - 1 -> x.ndim - 1"],
    "int() follows": ["positions: np.prod(z.shape[1:-1], dtype=int) -> np.prod(z.shape[1:-1])"],
    "a division by 1 is saved": [
        "Canonical._delta: error if number == 1 else error / number -> error / number",
        "Canonical._delta: number == 1 -> number == 0",
    ],
    "the default": [
        "FusedSoftmaxCrossEntropy._forward: jnp.take_along_axis(z, rows.y[:, None], axis=1)"
        " -> jnp.take_along_axis(z, rows.y[:, None])",
        "SoftmaxCrossEntropy.mean: jax.nn.softmax(z, axis=-1) -> jax.nn.softmax(z)",
        "SoftmaxCrossEntropy.error: p.at[y].add(-1, mode='drop', unique_indices=True)"
        " -> p.at[y].add(-1, unique_indices=True)",
    ],
    "a promise to XLA: it saves time": [
        "SoftmaxCrossEntropy.error: p.at[y].add(-1, mode='drop', unique_indices=True) -> " + call
        for call in (
            "p.at[y].add(-1, mode='drop')",
            "p.at[y].add(-1, mode='drop', unique_indices=False)",
        )
    ],
    "broadcast later": ["SoftmaxCrossEntropy.targets: (1.0,) * classes -> (1.0,)"],
    "integers have 1, 2, 4 or 8 bytes; one of 4 bytes is int32, or counts as it": [
        "SoftmaxCrossEntropy.labels: y.dtype.itemsize < 4 -> y.dtype.itemsize <= 4",
        "SoftmaxCrossEntropy.labels: y.dtype.itemsize < 4 -> y.dtype.itemsize < 3",
    ],
    "a row of no places that count is 0 in the next line": [
        "SoftmaxCrossEntropy.labels: jnp.maximum(number, 1) -> number",
        "SoftmaxCrossEntropy.labels: jnp.maximum(number, 1) -> jnp.maximum(number, 0)",
    ],
    "an index beyond an axis of 1 is moved into it": [
        "FusedSoftmaxCrossEntropy.head: _dot(rows.weight[None], delta, 1, 0)[0]"
        " -> _dot(rows.weight[None], delta, 1, 0)[1]",
        "FusedSoftmaxCrossEntropy._forward: (:, 0) -> (:, 1)",
    ],
    "what does not count has the weight 0, if only it is finite": [
        "FusedSoftmaxCrossEntropy._rows: jnp.where(there[..., None], h, 0)"
        " -> jnp.where(there[..., None], h, 1)",
    ],
    "all of it is written": [
        "FusedSoftmaxCrossEntropy._forward: jnp.zeros((len(rows.y), w.shape[1]), rows.share.dtype)"
        " -> jnp.ones((len(rows.y), w.shape[1]), rows.share.dtype)",
    ],
    "blocks of nothing more, or all in one, or a part of nothing": [
        "_Rows.cut: -len(v) // size -> -len(v)",
        "_in_parts: size < total -> size <= total",
        "_in_parts: size < total -> size > total",
        "_in_parts: f(start, total - start, carry) if start < total else carry"
        " -> f(start, total - start, carry)",
        "_in_parts: start < total -> start <= total",
    ],
    "the last axis either way": ["_add_at: sums.ndim - 1 -> 1 - sums.ndim"],
    "t is finite": [
        "SoftmaxCrossEntropy._spread: jnp.where(mass[..., None] == 0, 0, t * mass[..., None])"
        " -> t * mass[..., None]"
    ],
    "a layer leaves alone what it does not read": [
        "Sequential.backward: ends[i] if 'x' in layer.reads else None -> ends[i]",
        "Sequential.backward: ends[i + 1] if 'y' in layer.reads else None -> ends[i + 1]",
    ],
    "a transport has the leaves of params": [
        "backward: jax.tree.leaves(params) -> jax.tree.leaves(carry)",
    ],
    "the same program under another name": [
        "leafwise: functools.partial(jax.jit, inline=True) -> functools.partial(jax.jit)",
        "leafwise: functools.partial(jax.jit, inline=True) -> functools.partial(jax.jit, inline=False)",
    ],
    "dtypes have 16, 32 or 64 bits, and float32 is float32": [
        "wide_dtype: jnp.finfo(dtype).bits >= 32 -> jnp.finfo(dtype).bits > 32",
        "wide_dtype: jnp.finfo(dtype).bits >= 32 -> jnp.finfo(dtype).bits >= 31",
    ],
    "times a weight of 0, and NaN has no derivative by it": [
        "present: jnp.zeros((), values.dtype) -> jnp.ones((), values.dtype)"
    ],
    "asked only after isinstance": [
        "Factored.same_form: type(other) is type(self) and self._form() == other._form()"
        " -> self._form() == other._form()",
    ],
    "same_form looks at the type": [
        "Lookup.dot: isinstance(other, Lookup) and self.same_form(other) -> self.same_form(other)",
        "Outer.dot: isinstance(other, Outer) and self.same_form(other) -> self.same_form(other)",
        "Outer.gram: isinstance(other, Outer) and self.same_form(other) -> self.same_form(other)",
        "_Summed.dot: isinstance(other, _Summed) and self.same_form(other) -> self.same_form(other)",
    ],
    "a and delta have one depth, the same groups and positions": [
        "Outer.stacked: self.a.shape[0] -> self.delta.shape[0]",
        "Outer.total: a.shape[1] -> delta.shape[1]",
        "Outer.second_moment: self.a.shape[2] -> self.delta.shape[2]",
        "Outer.dot: self.a.shape[2] -> self.delta.shape[2]",
        "Outer.dot: other.a.shape[2] -> other.delta.shape[2]",
    ],
    "a dearer way to the same number": [
        "Outer.total: a.shape[1] == 1 -> a.shape[1] == 0",
        "Outer.dot: t == s == 1 -> t == s == 0",
        "_Summed.total: s.shape[1] == 1 -> s.shape[1] == 0",
        "Sum.gram: other.parts if isinstance(other, Sum) else (other,) -> (other,)",
    ],
    "there is one position, and an index beyond is that of the last": [
        "Outer.second_moment: (:, :, 0) -> (:, :, 1)",
    ],
    "the parts of a sum are stacked alike": [
        "Sum.stacked: jax.tree.leaves(self.parts)[0] -> jax.tree.leaves(self.parts)[1]"
    ],
    "dot_general takes two dtypes too": [
        "Outer.total: v.reshape(rows, v.shape[3]).astype(dtype) -> v.reshape(rows, v.shape[3])",
    ],
    "what carries the delta has the structure of params": [
        "_layer_backward: as_told(layer, params, found) -> as_told(layer, carry, found)",
    ],
    "a square": ["BatchNorm.statistics: x - m -> m - x"],
    "equal once in 2^32 draws": [
        "Dropout._thinned: jax.random.bits(key, x.shape, jnp.uint32) >= jnp.uint32(int(self.rate * 2 ** 32))"
        " -> jax.random.bits(key, x.shape, jnp.uint32) > jnp.uint32(int(self.rate * 2 ** 32))",
    ],
    "a product of h and delta": ["rescaled_back: Scale.of(h, delta) -> Scale.of(delta, h)"],
    "a wider integer than is needed": [
        "Maximum.join: len(x) <= 256 -> len(x) < 256",
        "Maximum.join: len(x) <= 256 -> len(x) <= 255",
    ],
    "the first is not larger than itself": ["Maximum.join: range(1, len(x)) -> range(0, len(x))"],
}
