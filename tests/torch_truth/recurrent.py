"""What PyTorch computes for RNN, LSTM and GRU, in float64: `python tests/torch_truth/recurrent.py`.

Writes recurrent.npz beside this file: inputs, weights in our layout, outputs, and the gradients of
the sum of u * outputs, with torch's own names gone.
"""

from pathlib import Path

import numpy as np
import torch

P, Q, T, B = 3, 4, 6, 2
KINDS = {"RNN": torch.nn.RNN, "LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}


def ours(parts, name):
    """weight_ih (gates * q, p) -> w_x (p, gates * q); the two biases of torch are one, but GRU's."""
    w_x, w_h, b_x, b_h = parts
    found = {"w_x": w_x.T, "w_h": w_h.T, "b": b_x}
    return found | {"b_h": b_h[2 * Q :]} if name == "GRU" else found


def main():
    torch.manual_seed(0)
    saved = {}
    for name, kind in KINDS.items():
        for reverse in (False, True):
            layer = kind(P, Q, batch_first=True).double()
            layer.bias_hh_l0.data[: 2 * Q if name == "GRU" else None] = 0.0
            x = torch.randn(B, T, P, dtype=torch.float64, requires_grad=True)
            u = torch.randn(B, T, Q, dtype=torch.float64)
            y, _ = layer(x.flip(1) if reverse else x)
            y = y.flip(1) if reverse else y
            (y * u).sum().backward()
            weights = [getattr(layer, f"{v}_l0") for v in
                       ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
            arrays = {"x": x, "u": u, "y": y, "delta_x": x.grad}
            arrays |= {f"params.{k}": v for k, v in ours(weights, name).items()}
            arrays |= {f"grads.{k}": v for k, v in ours([w.grad for w in weights], name).items()}
            where = f"{name}{'.reverse' if reverse else ''}"
            saved |= {f"{where}/{k}": v.detach().numpy() for k, v in arrays.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **saved)


if __name__ == "__main__":
    main()
