"""What kfac-jax computes, in float64: `python tests/torch_truth/kfac_jax_blocks.py`.

Writes kfac_jax_blocks.npz beside this file: of the MLP and the mini-batch in curvature.npz the dense
blocks of its two layers, by the exact roots ("ggn_exact"), for mean costs. A block's rows are the
entries of [w; b], (i + 1, o), a bias being a row of the matrix.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

HERE = Path(__file__).parent


def main():
    jax.config.update("jax_enable_x64", True)
    with np.load(HERE / "curvature.npz") as file:
        given = {k.removeprefix("mlp."): jnp.asarray(file[k]) for k in file.files if "mlp." in k}
    params = [{"w": given[str(k)].T, "b": given[str(k + 1)]} for k in (0, 2, 4)]

    def cost(params, batch):
        x, y = batch
        a = jax.nn.sigmoid(x @ params[0]["w"] + params[0]["b"])
        a = jnp.tanh(a @ params[1]["w"] + params[1]["b"])
        z = a @ params[2]["w"] + params[2]["b"]
        kfac_jax.register_softmax_cross_entropy_loss(z, y)
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(y)), y])

    args = (params, (given["x"], given["y"]))
    estimator = kfac_jax.BlockDiagonalCurvature(cost, params_index=0)
    none = dict.fromkeys(("exact_powers_to_cache", "approx_powers_to_cache"))
    state = estimator.init(
        jax.random.key(0), args, cache_eigenvalues=False, **dict.fromkeys(none, ())
    )
    state = estimator.update_curvature_matrix_estimate(
        state, ema_old=0.0, ema_new=1.0, identity_weight=0.0, batch_size=6,
        rng=jax.random.key(0), func_args=args, estimation_mode="ggn_exact",
    )  # fmt: skip
    blocks = estimator.to_diagonal_block_dense_matrix(state)
    saved = {str(k): np.asarray(block) for k, block in enumerate(blocks)}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **saved)


if __name__ == "__main__":
    main()
