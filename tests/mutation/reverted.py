"""Mends that are taken back: the faults that were there before them.

`python -m tests.mutation.found_again` lives lives with each. `SEEDS` has those that it found.
"""

from .form import Edit, Fault, fault
from .reverted_uses import USES

STATES = (
    fault(
        "argument-set-later", "LayerNormMLP's arguments that are set later change nothing.",
        "layernorm_mlp/module.py",
        "            self._take({**self._given, name: value}, tp)\n"
        "            self._sequences = self._build()\n",
        "            self._take({**self._given, name: value}, tp)\n",
        "layernorm_mlp/test_settings.py",
    ),
    fault(
        "plain-checkpoint", "Keys of scales that a plain checkpoint lacks are missing.",
        "precision/delayed.py", "strict, [], *args", "strict, missing, *args",
        "precision/test_delayed_state.py",
    ),
    fault(
        "sizes-found-in-inference", "Sizes completed in inference mode leave untrainable weights.",
        "ops/sizes.py", "with torch.inference_mode(False):", "with torch.no_grad():",
        "guards/test_watched.py",
    ),
    fault(
        "recipe-of-a-checkpoint", "A call under a delayed recipe reads scales that are updated.",
        "precision/tapes.py", "        scale = tapes.replaying.read(place)\n",
        "        tapes.replaying.read(place)\n",
        "precision/test_recomputed.py",
    ),
    fault(
        "unseen-modes", "Calls of a known kind do not see train() and eval().",
        "features/known.py", "            and [*map(_training, self.modes)] == last.trains\n", "",
        "features/test_known.py",
    ),
    fault(
        "unseen-attributes", "Attributes of ops that are set after the first call change nothing.",
        "guards/watched.py",
        "        if old is not value and (constant or not _same(old, value)):\n"
        "            self.touch()\n",
        "        del old, constant\n",
        "run/test_autograd.py",
    ),
    fault(
        "unseen-edits", "Edits of a list of ops after the first call are not seen.",
        "guards/watched.py", "        finally:\n            self._forget()\n",
        "        finally:\n            pass\n",
        "run/test_sequential.py",
    ),
    Fault(
        "unseen-residual", "Ops that are added to a Residual after the first call do not run.",
        (
            Edit("ops/residual.py", "    def _forget(self) -> None:\n        self.touch()\n",
                 "    def _forget(self) -> None:\n        pass\n"),
            Edit("ops/residual.py",
                 "        super().add_module(name, self._checked(module))\n        self.touch()\n",
                 "        super().add_module(name, self._checked(module))\n"),
        ),
        ("guards/test_watched.py",),
    ),
    Fault(
        "unseen-bias", "A bias that a Linear gets after the first call is not added.",
        (
            Edit("guards/watched.py", "if before is self or (before is None) != (param is None):",
                 "if before is self:"),
            Edit("features/known.py",
                 "            and [*map(dict.get, map(_parameters, self.absent), self.appearing)]"
                 " == self.nothing\n", ""),
            Edit("run/stage.py",
                 "            if module._parameters.get(name) is not None:\n",
                 "            if False:\n"),
            Edit("run/parameters.py", "getattr(*place, None) is not None for place in self.absent",
                 "False for place in self.absent"),
        ),
        ("guards/test_watched.py",),
    ),
    fault(
        "stale-parameters", "What replaces a parameter after the first call is not read.",
        "features/known.py",
        "        weights: list[Any] = [*map(dict.get, map(_parameters, self.modules), self.names)]"
        "\n",
        "        now = [*map(dict.get, map(_parameters, self.modules), self.names)]\n"
        "        weights: list[Any] = [*self.__dict__.setdefault(\"first\", now)]\n",
        "run/test_sequential.py",
    ),
    fault(
        "unseen-hooks", "An op's own hooks inside a Sequential do not fire.",
        "features/called.py",
        'return "hooks" if any(op.__dict__[hooks] for hooks in HOOKS) else None', "return None",
        "features/test_called.py",
    ),
    fault(
        "copied-sequence", "A copy of a LayerNormMLP computes with the original's parameters.",
        "layernorm_mlp/module.py",
        'return state | {"_sequences": (), "_queue": Queue()}',
        'return state | {"_queue": Queue()}',
        "layernorm_mlp/test_settings.py",
    ),
    fault(
        "copied-stages", "A copy of a Sequential keeps the stages of the original.",
        "run/sequential.py",
        "return own_state(self, frozenset()) | _UNPREPARED | own",
        "return own_state(self, frozenset()) | own",
        "run/test_sequential.py",
    ),
    fault(
        "copied-parameters", "A shallow copy shares its table of parameters with the original.",
        "guards/watched.py",
        "key: value.copy() if key in MODULE_ATTRIBUTES and isinstance(value, dict) else value",
        "key: value",
        "guards/test_watched.py",
    ),
    fault(
        "grad-mode", "Calls of a known kind do not see whether grad is enabled.",
        "features/known.py", "            and torch.is_grad_enabled() is last.grad\n", "",
        "features/test_known.py",
    ),
)  # fmt: skip

GRADIENTS = (
    fault(
        "delayed-overwrites", "backward_dw puts a gradient in the place of the one that was there.",
        "ops/delayed.py", "        parameter.grad.add_(gradient)\n",
        "        parameter.grad = gradient\n",
        "ops/test_delayed.py",
    ),
    fault(
        "delayed-in-parts", "One backward_dw does a part of a backward that several modules share.",
        "ops/delayed.py", "queues = [queue for queue in _all_queues(self) if queue]\n",
        "queues = [queue for queue in _all_queues(self) if queue][:1]\n",
        "ops/test_delayed.py",
    ),
    fault(
        "delayed-newest", "backward_dw does the latest backward before the oldest.",
        "ops/delayed.py", "oldest = min(queue[0] for queue in queues).backward",
        "oldest = max(queue[-1] for queue in queues).backward",
        "ops/test_delayed.py",
    ),
    fault(
        "delayed-frozen", "Gradients of weights that were frozen since arrive all the same.",
        "ops/delayed.py", "if parameter.requires_grad and id(parameter) not in self.unwanted:",
        "if id(parameter) not in self.unwanted:",
        "ops/test_delayed.py",
    ),
    fault(
        "delayed-alias", "Under a checkpoint a weight counts as an operand of its own gradient.",
        "ops/delayed.py", "if t.data_ptr() != own and", "if t is not weight and",
        "fuzz/test_fuzz_lives.py",
    ),
    fault(
        "main-grad-again", "After a first microbatch each gradient overwrites main_grad.",
        "ops/main_grad.py", "expected = weight.__dict__.pop(EXPECTED, False)",
        "expected = weight.__dict__.get(EXPECTED, False)",
        "ops/test_main_grad.py",
    ),
    fault(
        "main-grad-never", "A first microbatch adds to what main_grad holds of the step before.",
        "ops/main_grad.py", "        setattr(weight, EXPECTED, True)\n",
        "        setattr(weight, EXPECTED, False)\n",
        "ops/test_main_grad.py",
    ),
    fault(
        "main-grad-each-use", "Each use of a tied weight overwrites main_grad in one backward.",
        "ops/main_grad.py", "return expected or backward < 0 or backward != latest",
        "return expected or latest is None or latest is not None",
        "ops/test_main_grad.py",
    ),
    fault(
        "gradient-views", "Gradients of an input and of what is added to it share memory.",
        "features/dimensions.py", "            view = shaped.get(id(gradient))\n",
        "            view = None\n",
        "run/test_eager.py",
    ),
    fault(
        "written-over", "A kernel writes its result over memory that others read.",
        "guards/owned.py",
        "if owners(x) == _owners_of_one() and x.untyped_storage().resizable():",
        "if x.untyped_storage().resizable():",
        "guards/test_owned.py",
    ),
    fault(
        "output-is-a-view", "An output in training may not be changed in place.",
        "features/dimensions.py", "        return (views[0].detach(),)\n",
        "        return (views[0],)\n",
        "run/test_eager.py",
    ),
    fault(
        "output-is-the-input", "An output that is also an input is no view of it.",
        "plan/codegen.py",
        "shared = {n for n in outputs if outputs.count(n) > 1 or n in program.activations}",
        "shared = set[str]()",
        "plan/test_codegen.py",
    ),
)  # fmt: skip

INPUTS = (
    fault(
        "weight-of-another-length", "A parameter of another length is read past its end.",
        "features/declared_ops.py", "if len(got) != len(expected) or not all(fits):", "if False:",
        "guards/test_watched.py",
    ),
    fault(
        "surplus-inputs", "Extra inputs that no op asks for are dropped without a word.",
        "features/inputs.py",
        "if got != len(needed := [name for _, _, name in _needed(stages)]):",
        "if got < len(needed := [name for _, _, name in _needed(stages)]):",
        "features/test_inputs.py",
    ),
    fault(
        "no-tensor", "An input that is no tensor meets an AttributeError.",
        "features/inputs.py", '        verify_tensor(x, "input", f"a tensor [*, {width}]")\n',
        "        del width\n",
        "features/test_inputs.py",
    ),
    fault(
        "epsilon-of-the-dtype", "RMSNorm without an epsilon takes that of 16 bits.",
        "ops/norms.py",
        "torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps",
        "torch.finfo(x.dtype).eps",
        "ops/test_norms.py",
    ),
    fault(
        "module-twice", "from_torch drops a module that stands at two places.",
        "features/convert.py",
        "OrderedDict((n, made[m]) for n, m in module._modules.items())",
        "OrderedDict((n, made[m]) for n, m in module.named_children())",
        "features/test_convert.py",
    ),
    Fault(
        "names-that-end-in-digits", "A saved value of op 1 has the name of one of op 11.",
        (
            Edit("guards/names.py", '    stem += "_" * stem[-1].isdigit()\n', ""),
            Edit("guards/names.py", '"_" * base[-1].isdigit()', '""'),
            Edit("guards/names.py",
                 '    while root(text := f"{stem}{number}") in taken or _OWN.fullmatch(text):\n'
                 '        stem += "_"\n    return text\n',
                 '    return f"{stem}{number}"\n'),
        ),
        ("guards/test_names.py",),
    ),
)  # fmt: skip

REPORTS = {
    "A1": ("state-dict-without-scales",), "A3": ("plain-checkpoint",),
    "A4": ("scales-of-inference",), "A6": ("recipe-of-a-checkpoint",),
    "B1": ("marks-of-new-parameters",), "B2": ("argument-set-later",), "B3": ("default-device",),
    "C1": ("told-of-delayed",), "C3": ("given-main-grad",),
    "C2": ("main-grad-again", "main-grad-never", "main-grad-each-use"),
    "D1": ("epsilon-of-the-dtype",), "D2": ("foreign-keys",),
    "E1": ("level-rows",), "E2": ("overflow-saturates",), "E3": ("limits-of-gelu",),
    "F1": ("torch-func",), "F2": ("wide-stream",), "F3": ("sizes-of-norms",),
    "G": ("numbers-in-tensors",), "H1": ("module-twice",),
    "H3": ("delayed-in-parts", "delayed-newest", "delayed-frozen"), "H4": ("gradient-views",),
    "H5": ("unseen-edits", "unseen-residual", "unseen-bias", "unseen-attributes"),
    "H6": ("weight-of-another-length",), "H7": ("names-that-end-in-digits",), "H8": ("tangents",),
    "H9": ("derivative-of-a-base",), "H10": ("unseen-hooks",), "H11": ("traced",),
    "H12": ("copied-sequence", "copied-stages", "copied-parameters"),
    "H13": ("reentrant-without-recipe",), "H16": ("masked-infinities",),
    "H17": ("output-is-a-view", "output-is-the-input"), "I4": ("blocks-below-1",),
    "I5": ("sizes-found-in-inference",), "I6": ("deep-chains",), "I7": ("constants-as-text",),
    "I8": ("half-an-edit",), "I9": ("sources-stay",), "I10": ("check-of-nans",),
    "J": ("surplus-inputs", "no-tensor"),
}  # fmt: skip
"""By the number under which a fault was reported, of what was mended then the faults above."""

SEEDS = {
    "argument-set-later": 64,
    "blocks-below-1": 9,
    "check-of-nans": 777,
    "constants-as-text": 1,
    "copied-parameters": 37,
    "copied-sequence": 16,
    "copied-stages": 5,
    "deep-chains": 1911,
    "default-device": 73,
    "delayed-newest": 16,
    "delayed-overwrites": 98,
    "derivative-of-a-base": 1,
    "epsilon-of-the-dtype": 131,
    "foreign-keys": 3,
    "given-main-grad": 45,
    "grad-mode": 0,
    "gradient-views": 6,
    "half-an-edit": 13,
    "limits-of-gelu": 0,
    "main-grad-again": 128,
    "main-grad-never": 11,
    "marks-of-new-parameters": 34,
    "masked-infinities": 59,
    "module-twice": 21,
    "names-that-end-in-digits": 57,
    "no-tensor": 1,
    "numbers-in-tensors": 21,
    "output-is-a-view": 6,
    "output-is-the-input": 5,
    "overflow-saturates": 3,
    "plain-checkpoint": 113,
    "recipe-of-a-checkpoint": 7,
    "reentrant-without-recipe": 21,
    "scales-of-inference": 108,
    "sizes-found-in-inference": 197,
    "sizes-of-norms": 100,
    "sources-stay": 3,
    "stale-parameters": 2,
    "state-dict-without-scales": 49,
    "surplus-inputs": 7,
    "tangents": 5,
    "told-of-delayed": 129,
    "torch-func": 12,
    "traced": 17,
    "unseen-attributes": 29,
    "unseen-bias": 12,
    "unseen-edits": 17,
    "unseen-hooks": 1,
    "unseen-residual": 607,
    "weight-of-another-length": 10,
    "wide-stream": 6,
}
"""Lives that have found a fault. Of those that are not here none is known yet."""

REVERTED: tuple[Fault, ...] = tuple(
    each._replace(seed=SEEDS.get(each.name, 0)) for each in (*STATES, *GRADIENTS, *INPUTS, *USES)
)
