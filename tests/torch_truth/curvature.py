"""What BackPACK computes of second derivatives, in float64: `python tests/torch_truth/curvature.py`.

Writes curvature.npz beside this file. Costs are cross-entropies, and all is of their mean over the
mini-batch, as BackPACK has it with that loss. Its factors of a weight (o, i) are (G, A), of a bias
(G,). Monte-Carlo factors are of so many samples that they are nearly exact. A network's arrays are
NET.x, NET.y and by the parameter's number NET.K, NET.K.diag_ggn, NET.K.diag_hessian, NET.K.kflr.J,
NET.K.kfac.J.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from backpack import backpack, extend, extensions
from torch import nn

SAMPLES = 20_000


def nets():
    sigmoids = [nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    yield "mlp", nn.Sequential(*sigmoids), torch.randn(6, 5)
    images = [nn.Conv2d(2, 3, (3, 2), padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(60, 3)]
    yield "cnn", nn.Sequential(*images), torch.randn(4, 2, 4, 4)


def main():
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    saved = {}
    for name, net, x in nets():
        y = torch.randint(0, 3, (len(x),))
        net, loss = extend(net), extend(nn.CrossEntropyLoss())
        kfac = extensions.KFAC(mc_samples=SAMPLES)
        for own in (extensions.DiagGGNExact(), extensions.DiagHessian(), extensions.KFLR(), kfac):
            net.zero_grad()
            with backpack(own):
                loss(net(x), y).backward()
        saved |= {f"{name}.x": x, f"{name}.y": y}
        for k, p in enumerate(net.parameters()):
            saved |= {f"{name}.{k}": p.detach(), f"{name}.{k}.diag_ggn": p.diag_ggn_exact}
            saved[f"{name}.{k}.diag_hessian"] = p.diag_h
            for kind in ("kflr", "kfac"):
                for j, factor in enumerate(getattr(p, kind)):
                    saved[f"{name}.{k}.{kind}.{j}"] = factor
    arrays = {k: np.asarray(v) for k, v in saved.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
