"""BackPACK on the networks of `curvature.py`, in units of its own plain gradient.

python curvature_torch.py PROBLEM.npz NETWORK QUANTITY

As `per_example_torch.py`, with whose networks and whose clock it works. Products with a vector are
those of `backpack.hessianfree`, which is autodiff twice; the vector is drawn here.
"""

from __future__ import annotations

from typing import Any

import torch
from per_example_torch import Answer, Peers, flat, main
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

QUANTITIES = ("hessian_product", "ggn_product", "diag_mc", "diag_exact", "kfac", "kflr")


class CurvaturePeers(Peers):
    """The contestants."""

    def backpack(self, quantity: str) -> Answer:
        """Its extension for the quantity, on top of a gradient."""
        from backpack import backpack, extend, extensions

        if quantity.endswith("product"):
            return self.product(quantity)
        net, loss = extend(self._network()), extend(nn.CrossEntropyLoss())
        extension: Any = {
            "diag_mc": extensions.DiagGGNMC,
            "diag_exact": extensions.DiagGGNExact,
            "kfac": extensions.KFAC,
            "kflr": extensions.KFLR,
        }[quantity]

        def answer() -> Any:
            net.zero_grad()
            with backpack(extension()):
                loss(*flat(net(self.x), self.y)).backward()
            lacking = [
                type(m).__name__ for m in net.modules() for p in m.parameters(recurse=False)
                if not hasattr(p, extension().savefield)
            ]  # fmt: skip
            if lacking:
                raise NotImplementedError(f"it has nothing for {lacking[0]}")
            return {k: getattr(p, extension().savefield) for k, p in net.named_parameters()}

        return answer

    def product(self, quantity: str) -> Answer:
        """A product with a vector, the graph built anew each time."""
        from backpack.hessianfree.ggnvp import ggn_vector_product
        from backpack.hessianfree.hvp import hessian_vector_product

        net, loss = self._network(), nn.CrossEntropyLoss()
        params = list(net.parameters())
        vector = [torch.randn_like(p) for p in params]

        def answer() -> Any:
            with sdpa_kernel(SDPBackend.MATH):  # no other attention has a second derivative
                z, y = flat(net(self.x), self.y)
            value = loss(z, y)
            if quantity == "hessian_product":
                return hessian_vector_product(value, params, vector)
            return ggn_vector_product(value, z, net, vector)

        return answer

    def all(self) -> Any:
        yield "BackPACK", "backpack", self.backpack


if __name__ == "__main__":
    main(CurvaturePeers, QUANTITIES)
