"""What Opacus and BackPACK say of single examples, in float64: `python tests/torch_truth/per_example.py`.

Writes per_example.npz beside this file: a small MLP and a small CNN with their weights in our
layout, a mini-batch, and (with the names of their extensions) gradients, norms and moments. Both
take the mean over the batch; Opacus' grad_sample takes that back, BackPACK leaves the 1/N in.
"""

from pathlib import Path

import numpy as np
import torch
from backpack import backpack, extend, extensions
from opacus import GradSampleModule

B = 6


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.Sigmoid(), torch.nn.Flatten(),
        torch.nn.Linear(3 * 4 * 5, 3),
    )  # fmt: skip


SHAPES = {"mlp": (5,), "cnn": (2, 4, 5)}


def ours(name, index, v):
    """(..., o, i) -> (..., i, o); kernels (o, i, h, w) -> (h, w, i, o); (c, h, w) -> (h, w, c)."""
    lead = v.ndim - (4 if name == "cnn" and index == 0 else 2)
    if name == "cnn" and index == 0:
        order = (lead + 2, lead + 3, lead + 1, lead)
        return v.permute(*range(lead), *order)
    if name == "cnn":
        v = v.reshape(*v.shape[:-1], 3, 4, 5)
        v = v.permute(*range(lead + 1), lead + 2, lead + 3, lead + 1).flatten(-3)
    return v.transpose(-1, -2)


def main():
    torch.manual_seed(0)
    saved = {}
    for name, make in {"mlp": mlp, "cnn": cnn}.items():
        net = make().double()
        x, y = torch.randn(B, *SHAPES[name]).double(), torch.randint(0, 3, (B,))
        arrays = {"x": x if name == "mlp" else x.permute(0, 2, 3, 1), "y": y}

        def keep(what, values, name=name, arrays=arrays):
            """Of each parameter, w and b of layer 0 and 1."""
            for i, v in enumerate(values):
                kind = "wb"[i % 2]
                arrays[f"{what}.{i // 2}.{kind}"] = ours(name, i // 2, v) if kind == "w" else v

        keep("params", [p.detach() for p in net.parameters()])
        sampled = GradSampleModule(make().double())
        sampled.load_state_dict({f"_module.{k}": v for k, v in net.state_dict().items()})
        torch.nn.CrossEntropyLoss()(sampled(x), y).backward()
        keep("grad_sample", [p.grad_sample for p in sampled.parameters()])
        net, loss = extend(net), extend(torch.nn.CrossEntropyLoss())
        with backpack(extensions.BatchL2Grad(), extensions.SumGradSquared(), extensions.Variance()):
            loss(net(x), y).backward()
        for what in ("sum_grad_squared", "variance"):
            keep(what, [getattr(p, what) for p in net.parameters()])
        for i, p in enumerate(net.parameters()):
            arrays[f"batch_l2.{i // 2}.{'wb'[i % 2]}"] = p.batch_l2
        saved |= {f"{name}.{k}": v.detach().numpy() for k, v in arrays.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **saved)


if __name__ == "__main__":
    main()
