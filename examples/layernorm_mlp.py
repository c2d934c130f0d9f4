"""LayerNormMLP: the norm, FC1, activation and FC2 of a transformer layer as one module.

Compares it with the same formula in plain PyTorch, loads its weights by name, and counts what it
keeps for the backward.

    python examples/layernorm_mlp.py
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og

HIDDEN, FFN = 64, 256


def formula(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What the module means. The gate is the first half of FC1's output, the value the second."""
    normed = F.rms_norm(x, x.shape[-1:], weights["layer_norm_weight"], eps=1e-5)
    gate, value = F.linear(normed, weights["fc1_weight"]).chunk(2, -1)
    return F.linear(F.silu(gate) * value, weights["fc2_weight"])


def make_mlp(dtype: torch.dtype) -> og.LayerNormMLP:
    """An RMSNorm and a SwiGLU MLP without biases, as Llama has them."""
    return og.LayerNormMLP(
        HIDDEN,
        FFN,
        normalization="RMSNorm",
        activation="swiglu",
        bias=False,
        params_dtype=dtype,
        device="cpu",
    )


def compare(mlp: og.LayerNormMLP) -> float:
    """The largest difference from the formula, output and all gradients, in fp64."""
    x = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)  # [sequence, batch, H]
    weights = dict(mlp.named_parameters())
    inputs = [x, *weights.values()]
    ours, theirs = mlp(x), formula(x, weights)
    dy = torch.randn_like(ours)
    found = [ours, *torch.autograd.grad(ours, inputs, dy)]
    expected = [theirs, *torch.autograd.grad(theirs, inputs, dy)]
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def saved_bytes_per_row(mlp: og.LayerNormMLP, rows: int = 32) -> float:
    """What autograd keeps of a call, parameters not counted, as its own hooks see it."""
    own = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()

    x = torch.randn(rows, HIDDEN, dtype=mlp.fc1_weight.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    return sum(storage.nbytes() for storage in kept.values()) / rows


def main() -> None:
    """Print and check all of it."""
    torch.manual_seed(0)
    mlp = make_mlp(torch.float64)
    for name, parameter in mlp.named_parameters():
        print(f"{name:<20}{list(parameter.shape)}")
    difference = compare(mlp)
    print(f"largest difference from the formula in fp64, gradients too: {difference:.1e}")
    assert difference < 1e-12

    copy = make_mlp(torch.float64)
    copy.load_state_dict(mlp.state_dict())
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    assert torch.equal(copy(x), mlp(x))
    print("a copy made by load_state_dict gives the same output, bit for bit")

    half = make_mlp(torch.bfloat16)
    plan = half.plan(training=True)
    print(f"\nin bf16, for training:\n{plan}")
    counted = saved_bytes_per_row(half)
    print(f"\nbytes per row that autograd's hooks count: {counted:g}")
    print(f"the input, rstd and the pre-activation are 2H + 4F + 4 = {2 * HIDDEN + 4 * FFN + 4}")
    assert counted == plan.saved_bytes_per_row == 2 * HIDDEN + 4 * FFN + 4
    print(f"\nfor inference, where nothing is kept:\n{half.plan(training=False)}")


if __name__ == "__main__":
    main()
