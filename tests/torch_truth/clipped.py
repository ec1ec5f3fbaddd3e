"""What JAX Privacy's `clipped_grad` computes, in float64: `python tests/torch_truth/clipped.py`.

Writes clipped.npz beside this file: of the MLP and the mini-batch in per_example.npz the clipped sums
at several bounds, and the norms. It divides by nothing unless it is told to.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np

HERE = Path(__file__).parent


def main():
    jax.config.update("jax_enable_x64", True)
    with np.load(HERE / "per_example.npz") as file:
        given = {k.removeprefix("mlp."): jnp.asarray(file[k]) for k in file.files if "mlp." in k}
    params = [{kind: given[f"params.{i}.{kind}"] for kind in "wb"} for i in (0, 1)]

    def cost(params, x, y):
        a = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        z = a @ params[1]["w"] + params[1]["b"]
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(y)), y])

    saved = {}
    for bound in (0.3, 1.0, 3.0):
        clipped = jax_privacy.clipped_grad(
            cost,
            l2_clip_norm=bound,
            batch_argnums=(1, 2),
            return_grad_norms=True,
            dtype=jnp.float64,
        )
        grads, aux = clipped(params, given["x"], given["y"])
        saved[f"{bound}.norms"] = aux.grad_norms
        for i in (0, 1):
            saved |= {f"{bound}.{i}.{kind}": grads[i][kind] for kind in "wb"}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **saved)


if __name__ == "__main__":
    main()
