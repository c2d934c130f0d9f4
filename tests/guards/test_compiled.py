"""Generated functions: plans of one text share its code, and each has a file of its own."""

import linecache

import torch

import opsgraph as og
from opsgraph.ops import Linear, SiLU


def test_plans_of_one_text_have_a_file_each() -> None:
    modules = [og.Sequential(Linear(width, width), SiLU()) for width in (8, 16)]
    plans = [module.plan() for module in modules]
    assert plans[0].forward_source == plans[1].forward_source
    files = [plan.functions.forward.call.__code__.co_filename for plan in plans]
    assert files[0] != files[1]
    for file, plan in zip(files, plans, strict=True):
        assert "".join(linecache.getlines(file)) == plan.forward_source
    results = [module(torch.ones(2, width)) for module, width in zip(modules, (8, 16), strict=True)]
    assert [y.shape for y in results] == [(2, 8), (2, 16)]
