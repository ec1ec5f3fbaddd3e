"""Makes attention.npz: what PyTorch computes in float64. Run by hand, where torch is installed.

python tests/torch_truth/attention.py

For every case inputs, weights, output, the delta handed to the output, and all gradients, by
`CASE.NAME`. Masks are as in jbackprop: True where there is something.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
rng = np.random.default_rng(0)
found = {}
B, T, S = 3, 5, 4


def leaf(*shape):
    return torch.tensor(rng.standard_normal(shape), requires_grad=True)


def backward(name, y, **inputs):
    delta = torch.tensor(rng.standard_normal(y.shape))
    y.backward(delta)
    found[f"{name}.y"], found[f"{name}.delta"] = y.detach().numpy(), delta.numpy()
    for key, x in inputs.items():
        found[f"{name}.{key}"] = x.detach().numpy()
        found[f"{name}.{key}_gradient"] = x.grad.numpy()


def multi_head(name, memory=None, mask=None, causal=False, **options):
    module = nn.MultiheadAttention(6, 2, batch_first=True, **options)
    for p in module.parameters():
        p.data = torch.tensor(rng.standard_normal(p.shape))
    x = leaf(B, T, 6)
    y, _ = module(
        x,
        x if memory is None else memory,
        x if memory is None else memory,
        key_padding_mask=None if mask is None else torch.tensor(~mask),
        attn_mask=torch.ones(T, T).triu(1).bool() if causal else None,
        need_weights=False,
    )
    weights = {key.replace(".", "_"): p for key, p in module.named_parameters()}
    inputs = {"x": x} | ({} if memory is None else {"memory": memory}) | weights
    backward(name, y, **inputs)
    if mask is not None:
        found[f"{name}.mask"] = mask


def padding(length):
    return np.arange(length) < np.array([[length], [1], [3]])


multi_head("self")
multi_head("causal", causal=True)
multi_head("padding", mask=padding(T), bias=False)
multi_head("cross", leaf(B, S, 3), padding(S), kdim=3, vdim=3)

q, k, v = leaf(B, 4, T, 3), leaf(B, 2, T, 3), leaf(B, 2, T, 2)
y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
backward("grouped", y, q=q, k=k, v=v)

np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)
