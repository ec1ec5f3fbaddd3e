"""Makes normalization.npz: what PyTorch computes in float64. Run by hand, where torch is installed.

python tests/torch_truth/normalization.py

For every case inputs, weights, output, the delta handed to the output, and all gradients, by
`CASE.NAME`. Channels are last, as in jbackprop.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
rng = np.random.default_rng(0)
found = {}


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def record(name, module, x, move=lambda v: v):
    """x as torch has it; what is stored is moved to jbackprop's axes."""
    integer = x.dtype.kind == "i"
    given = torch.tensor(x, requires_grad=not integer)
    for p in module.parameters():
        p.data = torch.tensor(rng.standard_normal(p.shape))
    y = module(given)
    delta = torch.tensor(rng.standard_normal(y.shape))
    y.backward(delta)
    found[f"{name}.x"] = x if integer else move(x)
    found[f"{name}.y"] = move(y.detach().numpy())
    found[f"{name}.delta"] = move(delta.numpy())
    if not integer:
        found[f"{name}.delta_x"] = move(given.grad.numpy())
    for key, p in module.named_parameters():
        found[f"{name}.{key}"] = p.detach().numpy()
        found[f"{name}.{key}_gradient"] = p.grad.numpy()
    for key, b in module.named_buffers():
        found[f"{name}.{key}"] = b.numpy()


def normal(*shape):
    return 0.3 + 2 * rng.standard_normal(shape)


record("layer_norm", nn.LayerNorm(7, eps=1e-4), normal(4, 5, 7))
record("rms_norm", nn.RMSNorm(7, eps=1e-4), normal(4, 5, 7))
record("group_norm", nn.GroupNorm(3, 6, eps=1e-4), normal(4, 6, 3, 2), channels_last)
record("instance_norm", nn.InstanceNorm1d(3, eps=1e-4, affine=True), normal(4, 3, 5), channels_last)
batch_norm = nn.BatchNorm2d(3, eps=1e-4, momentum=0.1)
record("batch_norm", batch_norm, normal(5, 3, 4, 2), channels_last)
batch_norm.eval()
x = normal(5, 3, 4, 2)
found["batch_norm.eval_x"] = channels_last(x)
found["batch_norm.eval_y"] = channels_last(batch_norm(torch.tensor(x)).detach().numpy())
record("embedding", nn.Embedding(9, 4), rng.integers(0, 9, (3, 6)))

np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)
