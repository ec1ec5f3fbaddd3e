"""Convolutions in PyTorch, float64: inputs, weights, outputs and gradients, as a file of numbers.

    python tests/torch_truth/convolution.py

writes convolution.npz, which `test_convolution.py` compares with. Arrays are kept in PyTorch's
layout, channels in front; the test turns them.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

CONV = {
    "2d": ((2, 3, 6, 5), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "groups": ((2, 4, 5, 5), (6, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "depthwise": ((2, 3, 9), (3, 1, 4), {"padding": 2, "groups": 3}),
}
TRANSPOSED = {
    "2d": (
        (2, 3, 4, 3),
        (3, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)},
    ),
    "groups": ((2, 4, 3, 3), (4, 3, 3, 3), {"stride": 2, "padding": 1, "groups": 2, "dilation": 2}),
    "depthwise": ((2, 3, 5), (3, 1, 3), {"stride": 3, "groups": 3}),
}


def numbers(rng, f, x_shape, w_shape, out, options):
    x, w, b = (rng.standard_normal(shape) for shape in (x_shape, w_shape, (out,)))
    leaves = [torch.tensor(v, requires_grad=True) for v in (x, w, b)]
    z = f(*leaves, **options)
    delta = rng.standard_normal(z.shape)
    z.backward(torch.tensor(delta))
    return {"x": x, "w": w, "b": b, "z": z.detach().numpy(), "delta": delta} | {
        f"d{name}": leaf.grad.numpy() for name, leaf in zip("xwb", leaves, strict=True)
    }


def pooled(rng, f, x_shape, **options):
    x = np.round(rng.standard_normal(x_shape), 0)  # whole numbers: many windows have ties
    leaf = torch.tensor(x, requires_grad=True)
    y = f(leaf, **options)
    delta = rng.standard_normal(y.shape)
    y.backward(torch.tensor(delta))
    return {"x": x, "z": y.detach().numpy(), "delta": delta, "dx": leaf.grad.numpy()}


def main():
    rng, found = np.random.default_rng(0), {}
    for kind, cases in (("conv", CONV), ("transposed", TRANSPOSED)):
        for name, (x, w, options) in cases.items():
            axes = len(x) - 2
            f = getattr(functional, f"conv{'_transpose' if kind == 'transposed' else ''}{axes}d")
            out = w[1] * options.get("groups", 1) if kind == "transposed" else w[0]
            case = numbers(rng, f, x, w, out, options)
            found |= {f"{kind}/{name}/{key}": value for key, value in case.items()}
    pools = {
        "max": pooled(rng, functional.max_pool2d, (2, 3, 6, 7), kernel_size=(3, 2), stride=(2, 1)),
        "average": pooled(
            rng, functional.avg_pool2d, (2, 3, 6, 7), kernel_size=(3, 2), stride=(2, 1)
        ),
    }
    found |= {f"pool/{name}/{key}": v for name, case in pools.items() for key, v in case.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
