"""Mutants that compute the same as the rule: why, and which."""

EQUIVALENT: dict[str, list[str]] = {
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
        "SoftmaxCrossEntropy.mean: jax.nn.softmax(z, axis=-1) -> jax.nn.softmax(z)",
        "SoftmaxCrossEntropy.error: at.add(-1, mode='drop', unique_indices=True, indices_are_sorted=True)"
        " -> at.add(-1, unique_indices=True, indices_are_sorted=True)",
    ],
    "a promise to XLA: it saves time": [
        "SoftmaxCrossEntropy.error: at.add(-1, mode='drop', unique_indices=True, indices_are_sorted=True)"
        " -> " + call
        for call in (
            "at.add(-1, mode='drop', indices_are_sorted=True)",
            "at.add(-1, mode='drop', unique_indices=True)",
            "at.add(-1, mode='drop', unique_indices=False, indices_are_sorted=True)",
            "at.add(-1, mode='drop', unique_indices=True, indices_are_sorted=False)",
        )
    ],
    "broadcast later": ["SoftmaxCrossEntropy.targets: (1.0,) * classes -> (1.0,)"],
    "integers have 1, 2, 4 or 8 bytes; one of 4 bytes is int32, or counts as it": [
        "SoftmaxCrossEntropy.targets: y.dtype.itemsize < 4 -> y.dtype.itemsize <= 4",
        "SoftmaxCrossEntropy.targets: y.dtype.itemsize < 4 -> y.dtype.itemsize < 3",
    ],
    "all rows are of one size": ["SoftmaxCrossEntropy.targets: y[0] -> y[1]"],
    "a row of no places that count is 0 in the next line": [
        "SoftmaxCrossEntropy.targets: jnp.maximum(number, 1) -> number",
        "SoftmaxCrossEntropy.targets: jnp.maximum(number, 1) -> jnp.maximum(number, 0)",
    ],
    "t is finite": [
        "SoftmaxCrossEntropy._spread: jnp.where(mass[..., None] == 0, 0, t * mass[..., None])"
        " -> t * mass[..., None]"
    ],
}
