"""Writes plan.svg and plan.html, the plan in README and docs: python docs/images/plan.py."""

from pathlib import Path

import opsgraph as og
from opsgraph.ops import Add, LayerNorm, Linear, ReLU, Tee

LAYERS = Tee("r"), LayerNorm(256), Linear(256, 1024), ReLU(), Linear(1024, 256), Add("r")
plan = og.Sequential(*LAYERS, backends=("aten", "reference")).plan()
for kind in (".svg", ".html"):
    plan.draw(Path(__file__).with_suffix(kind))
