"""A faster matrix product under a model's linear layers, while it writes text on a CPU.

Token by token, a model's time is that of reading its weights: every matrix once a token, for
a single product with a vector. In float32, torch leaves that product to the processor's BLAS
(MKL on x86), which may read the matrix at a fraction of the memory's speed. oneDNN
(github.com/uxlfoundation/oneDNN), which torch has on board for convolutions and half
precision, can do better. `make bench` tells how much on the machine at hand.

Axes: i inputs and o outputs of a layer; those before (batch, token) are all rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()


@contextmanager
def onednn_products(model: nn.Module) -> Iterator[list[nn.Module]]:
    """While it lasts, the model's layers multiply by oneDNN in float32 on the CPU.

    Gives the modules that do: those of class `nn.Linear` itself, not of one built on it, and
    those whose `tied_product` multiplies by the embedding. What comes out are the same sums in
    another order. With gradients enabled, or where torch was built without oneDNN, the layers
    are what they were.
    """
    changed = []
    for module in model.modules():
        # On the instance: hooks run, and parameters keep their names. What stands there
        # already belongs to somebody else, or is from here.
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = lambda x, layer=module: product(x, layer.weight, layer.bias)
            changed.append((module, "forward"))
        elif hasattr(module, "tied_product") and "tied_product" not in vars(module):
            module.tied_product = product
            changed.append((module, "tied_product"))
    try:
        yield [module for module, _ in changed]
    finally:
        for module, name in changed:
            delattr(module, name)


def product(
    x: Float[Tensor, "*rows i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "*rows o"]:
    """x W^T + bias; by oneDNN in float32 on the CPU, when no gradient can be asked for."""
    known = ONEDNN and fits(x) and fits(weight)
    # Of a wrong size, torch's error tells; oneDNN's doesn't.
    if torch.is_grad_enabled() or not known or x.shape[-1:] != weight.shape[1:]:
        return F.linear(x, weight, bias)
    # What torch.compile puts in place of `F.linear` on CPUs; it has no public name.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def fits(tensor: Tensor) -> bool:
    """Plain float32 on the CPU: a subclass of Tensor, say a quantized one, has its own product."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
