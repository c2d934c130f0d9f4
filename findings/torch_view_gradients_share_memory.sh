#!/usr/bin/env bash
# PyTorch 2.13: gradients of two leaves that are added as views are one memory, the caller's too.
#
# Packages: torch 2.13.0, numpy 2.4.1; on the CPU. Minutes to install, and gigabytes where the
#   registry has a CUDA build of torch.
# Seen: after `(x.view(6) + o.view(6)).backward(g)`, `x.grad`, `o.grad` and `g` are one memory. So
#   `clip_grad_norm_([x, o], 1.0)` scales it twice, and leaves a total norm of 0.29 where 1.0 was
#   asked; `g` is scaled as well. Without the views each gradient has memory of its own, and the
#   norm is 1.0.
# Expected: each leaf's `.grad` has memory of its own, whether views stand before the sum or not.
# Why: AccumulateGrad takes over a gradient that nothing else refers to. A view of `g` is a tensor
#   of its own, so it counts as that, though its memory is shared.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)


def clipped(views: bool) -> tuple[bool, float, float]:
    """Whether the gradients share memory, their norm after clipping to 1, and g's first entry."""
    x, o = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    y = x.view(6) + o.view(6) if views else x + o
    g = torch.ones_like(y)
    y.backward(g)
    assert x.grad is not None and o.grad is not None
    shared = x.grad.data_ptr() == o.grad.data_ptr() == g.data_ptr()
    torch.nn.utils.clip_grad_norm_([x, o], 1.0)
    norm = torch.cat([x.grad.flatten(), o.grad.flatten()]).norm().item()
    return shared, round(norm, 2), round(g.flatten()[0].item(), 2)


plain, viewed = clipped(False), clipped(True)
for name, (shared, norm, first) in {"x + o": plain, "of views": viewed}.items():
    print(f"{name:9} shared {shared}, norm after clipping to 1: {norm}, first of g: {first}")
changed = (plain, viewed) != ((False, 1.0, 1.0), (True, 0.29, 0.08))
print("changed" if changed else "as described: views share their gradients' memory")
raise SystemExit(changed)
PYTHON
