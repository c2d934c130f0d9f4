"""Writes plan.svg, the picture of a plan in README: python docs/images/plan.py."""

from pathlib import Path

import opsgraph as og
from opsgraph.ops import Add, LayerNorm, Linear, ReLU, Tee

LAYERS = Tee("r"), LayerNorm(256), Linear(256, 1024), ReLU(), Linear(1024, 256), Add("r")
plan = og.Sequential(*LAYERS, backends=("aten", "reference")).plan()
plan.draw(Path(__file__).with_suffix(".svg"))
