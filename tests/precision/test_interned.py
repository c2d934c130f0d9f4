"""Recipes as values: their fields are checked, equal ones are one, and those of lambdas end."""

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_cases import RECIPES, by_hand, example, mlp

import opsgraph as og
from opsgraph.precision import interned
from opsgraph.precision import recipe as r

WRONG: dict[str, list[Any]] = {
    "bool": ["yes", None, 2, 0.5, torch.ones(3)],
    "int": ["1", 1.5, None, True, 1.0, [1], np.float32(2)],
    "float": ["0", None, False, [0.0], -1.0, float("nan"), float("inf")],
    "Format": ["E4M3", None, 1, True, torch.float8_e4m3fn],
}
KINDS = [r.DelayedScaling, r.Float8CurrentScaling, r.Float8BlockScaling, r.MXFP8BlockScaling,
         r.NVFP4BlockScaling]  # fmt: skip
CASES = [(kind, f.name, v) for kind in KINDS for f in fields(kind) for v in WRONG.get(f.type, [])]
CASES += [(kind, "backward_override", v) for kind in KINDS for v in ("fp64", ["high_precision"], 1)]
CASES += [(r.DelayedScaling, "amax_compute_algo", v) for v in ("min", None, 3, np.ones(2))]
CASES += [(r.DelayedScaling, "margin", 127), (r.DelayedScaling, "amax_history_len", -1)]
CASES += [(r.CustomRecipe, "qfactory", v) for v in (None, "mx", r.MXFP8BlockScaling())]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_every_field_is_checked(kind: type[r.Recipe], name: str, value: Any) -> None:
    before = len(interned._entries)
    with pytest.raises(og.OpsgraphError, match=rf"^{kind.__name__}: got {name}.*, expected "):
        kind(**{name: value})
    assert len(interned._entries) == before


def test_numbers_of_other_kinds_are_taken_as_pythons() -> None:
    given = r.DelayedScaling(
        margin=np.int64(2), amax_history_len=torch.tensor(5), reduce_amax=np.True_
    )
    expected = r.DelayedScaling(margin=2, amax_history_len=5)
    assert (given, given.key, type(given.margin)) == (expected, expected.key, int)
    assert type(r.Float8CurrentScaling(amax_epsilon=np.float32(0.5)).amax_epsilon) is float


def test_a_recipe_of_ones_own_is_checked_before_it_is_known() -> None:
    @dataclass(frozen=True)
    class Own(r.Recipe):
        rows: bool = True

        def check(self) -> None:
            if self.rows and self.backward_override:
                self._fail("rows with an override", "one of them")

    assert Own().key != r.MXFP8BlockScaling().key
    with pytest.raises(og.OpsgraphError, match="Own: got rows='no', expected True or False"):
        Own(rows="no")  # type: ignore[arg-type]
    with pytest.raises(og.OpsgraphError, match="rows with an override"):
        Own(backward_override="dequantized")


@pytest.mark.parametrize("name", RECIPES)
def test_equal_recipes_are_one(name: str) -> None:
    recipe = RECIPES[name]
    for twin in (replace(recipe), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert twin is not recipe
        assert (twin, twin.key) == (recipe, recipe.key)
    assert interned.recipe_of(recipe.key) == recipe


def test_a_pickled_recipe_gets_its_number_where_it_is_loaded() -> None:
    recipe = r.DelayedScaling(amax_history_len=31, margin=3)
    kept = recipe.__getstate__()
    assert kept.keys() == {f.name for f in fields(recipe)}
    object.__setattr__(recipe, "key", -1)
    assert pickle.loads(pickle.dumps(recipe)).key == replace(recipe).key


def factory(role: str) -> og.quantizers.Quantizer:
    return by_hand(role)


def test_recipes_of_lambdas_end_with_them() -> None:
    module, x = mlp(), example()
    lasting = r.CustomRecipe(factory)
    with og.autocast(recipe=lasting):
        module(x)
    for _ in range(5):
        known = len(interned._entries)
        recipe = r.CustomRecipe(lambda role: by_hand(role))
        with og.autocast(recipe=recipe), torch.no_grad():
            module(x)
        del recipe
    assert len(interned._entries) <= known + 1
    assert len(module._recipes) <= 3
    assert lasting.key in module._recipes
    (plans,) = {id(stages[0].plans) for stages in module._recipes.values()}
    assert plans, "equal quantizers share their plans"


def test_a_recipe_ends_though_its_quantizers_hold_its_function() -> None:
    @dataclass(frozen=True)
    class Held(og.quantizers.TensorQuantizer):
        owner: Any = None

    class Owner:
        def made(self, role: str) -> og.quantizers.Quantizer:
            return Held(torch.float8_e4m3fn, owner=self)

    owner = Owner()
    gone = weakref.ref(owner)
    with og.autocast(recipe=r.CustomRecipe(owner.made)):
        mlp()(example())
    del owner
    gc.collect()
    assert gone() is None


class Method:
    def made(self, role: str) -> og.quantizers.Quantizer:
        return by_hand(role)


@pytest.mark.parametrize("kind", ["function", "method", "partial"])
def test_recipes_of_lasting_functions_stay_the_same(kind: str) -> None:
    """A recipe made anew in each step makes no new stages, whether the last one is gone or not."""
    owner, partial = Method(), functools.partial(factory)
    make: dict[str, Callable[[], Any]] = {
        "function": lambda: factory, "method": lambda: owner.made, "partial": lambda: partial
    }  # fmt: skip
    keys = set()
    for _ in range(3):
        recipe = r.CustomRecipe(make[kind]())
        twin = r.CustomRecipe(make[kind]())
        keys |= {recipe.key, twin.key}
        del recipe
        assert interned.recipe_of(twin.key) == twin
        del twin
    assert len(keys) == 1
