"""A Sequential's options: what is not known, or is no value of an option, is an error."""

import copy
import pickle
from collections.abc import Collection
from typing import Any

import pytest
import torch

import opsgraph as og
from opsgraph.ops import Linear, SiLU

X = torch.randn(3, 4)
NAMES = "backends, planner, double_backward, recompute, checkpoint, delay_wgrad_compute, fusers"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"recompte": False}, f"got an option 'recompte', expected some of {NAMES}, device"),
    ({"recompte": False}, "dtype (the nearest is 'recompute')"),
    ({"planer": "optimal"}, "(the nearest is 'planner')"),
    ({"backend": ("cpu",)}, "(the nearest is 'backends')"),
    ({"dtyp": torch.float32}, "(the nearest is 'dtype')"),
    ({"zzz": 1}, f"got an option 'zzz', expected some of {NAMES}, device, dtype"),
    ({"backends": "cpu"}, "got backends='cpu', expected a tuple of names: backends=(\"cpu\",)"),
    ({"backends": ("refrence",)}, "got backend 'refrence', expected some of "),
    ({"backends": ("refrence",)}, "(the nearest is 'reference')"),
    ({"backends": 3}, "got backends=3, expected a tuple of names"),
    ({"planner": "optimum"}, "got planner 'optimum', expected one of greedy, optimal (the nearest"),
    ({"planner": None}, "got planner None, expected one of greedy, optimal"),
    ({"checkpoint": "no"}, "got checkpoint='no', expected True or False"),
    ({"recompute": None}, "got recompute=None, expected True or False"),
    ({"double_backward": "yes"}, "got double_backward='yes', expected True or False"),
    ({"delay_wgrad_compute": 2}, "got delay_wgrad_compute=2, expected True or False"),
    ({"fusers": "Norm"}, "got fusers='Norm', expected a tuple of names: fusers=(\"Norm\",)"),
    ({"fusers": 3}, "got fusers=3, expected a tuple of names"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[str(o) for o, _ in WRONG])
def test_wrong_options_are_told_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(og.OpsgraphError) as error:
        og.Sequential(Linear(4, 4), **options)
    assert message in str(error.value)
    with pytest.raises(og.OpsgraphError):
        og.Sequential.from_torch(torch.nn.Sequential(torch.nn.Linear(4, 4)), **options)
    if next(iter(options)) in ("recompte", "planer", "backend", "dtyp", "zzz"):
        return
    module = og.Sequential(Linear(4, 4))
    with pytest.raises(og.OpsgraphError) as error:
        setattr(module, *next(iter(options.items())))
    assert message in str(error.value)
    assert module.planner == "greedy"
    module(X)


def test_a_fuser_may_be_registered_until_it_is_planned_with() -> None:
    module = og.Sequential(SiLU(), SiLU(), fusers=("Doubled",))
    with pytest.raises(og.PlanError, match="got fuser 'Doubled', expected some of "):
        module(X)
    with og.register(Doubled):
        assert [s.name for s in module.plan(False, X).forward] == ["Doubled"]


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_collections_of_names_are_taken(kind: Any) -> None:
    with og.register(Doubled):
        options: dict[str, Collection[str]] = {
            "backends": kind(["reference"]),
            "fusers": kind(["Doubled"]),
        }
        module = og.Sequential(Linear(4, 4), SiLU(), **options)
        assert {s.backend for s in module.plan().forward} == {"reference"}


class Doubled(og.Fuser):
    """Never taken."""

    backend = "aten"
    pattern = {"a": SiLU, "b": SiLU}

    def fwd(self, x: Any) -> Any:
        return x, ()


def test_options_that_are_set_later_count() -> None:
    module = og.Sequential(Linear(4, 4), SiLU(), Linear(4, 4))
    expected = module(X)
    module.backends = ("reference",)
    assert {s.backend for s in module.plan().forward} == {"reference"}
    module.planner = "optimal"
    assert set(module.plan().costs) == {"greedy", "optimal"}
    kept = module.plan().saved_bytes_per_row
    module.checkpoint = True
    assert module.plan().saved_bytes_per_row < kept
    module.double_backward = True
    (x,) = torch.autograd.grad(module(X.requires_grad_()).sum(), X, create_graph=True)
    assert x.requires_grad
    X.requires_grad_(False)
    module.double_backward, module.delay_wgrad_compute = False, True
    module(X).sum().backward()
    assert module[0].weight.grad is None
    module.backward_dw()
    assert module[0].weight.grad is not None
    torch.testing.assert_close(module(X), expected)


def test_options_go_with_slices_and_copies() -> None:
    module = og.Sequential(Linear(4, 4), SiLU(), backends=["reference"], recompute=False)
    copies = (
        module[:1],
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
    )
    for other in copies:
        assert (other.backends, other.recompute, other.checkpoint) == (("reference",), False, False)
