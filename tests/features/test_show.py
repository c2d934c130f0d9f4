"""Plans as graphs and pictures; what is printed is in `tests/plan/plans`."""

from pathlib import Path

import pytest
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import BasicLinear, Bias, Linear, RMSNorm, SiLU


class Greedy(og.Fuser):
    """Linear, bias and SiLU in one; it cannot hand out what SiLU's backward needs."""

    backend, pattern = "reference", dict(fc=BasicLinear, bias=Bias, act=SiLU)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> tuple[Tensor, tuple[()]]:
        return nn.functional.silu(nn.functional.linear(x, fc_weight, bias_bias)), ()


@pytest.fixture
def plan() -> og.Plan:
    """A plan with a refusal."""
    with og.register(Greedy):
        return og.Sequential(RMSNorm(8), Linear(8, 4), SiLU(), backends=("reference",)).plan()


def test_graph_has_an_edge_for_every_step_and_refusal(plan: og.Plan) -> None:
    edges = list(plan.graph.edges(data=True))
    taken = {(e["name"], e["ops"]) for _, _, e in edges if e["taken"]}
    assert taken == {(s.name, s.ops) for s in (*plan.forward, *plan.backward)}
    refused = [(e["name"], e["ops"], e["reason"]) for _, _, e in edges if not e["taken"]]
    assert refused == [(r.name, r.ops, r.reason) for r in plan.rejected if r.ops]
    assert refused


def test_pictures(plan: og.Plan, tmp_path: Path) -> None:
    plan.draw(tmp_path / "new folder" / "plan.svg")
    svg = (tmp_path / "new folder" / "plan.svg").read_text()
    assert svg.startswith("<svg")
    for step in (*plan.forward, *plan.backward):
        assert step.name in svg
    assert "backward needs x3" in svg
    with pytest.raises(
        ValueError, match=r"got 'plan.png', expected a name ending in .svg or .html"
    ):
        plan.draw(tmp_path / "plan.png")
