"""Faults in what modules, stages and recipes remember from one call to the next."""

from .form import Fault, fault

RUN = "run/test_sequential.py", "run/test_table.py"
DELAYED = "precision/test_delayed.py", "precision/test_delayed_state.py"

MODULES: tuple[Fault, ...] = (
    fault(
        "modes-of-known-calls", "A call of a known kind does not see `train()` and `eval()`.",
        "features/known.py", "and [*map(_training, self.modes)] == last.trains\n", "",
        "features/test_known.py", *RUN,
    ),
    fault(
        "grad-of-known-calls", "A call of a known kind does not see that grad is off.",
        "features/known.py", "and torch.is_grad_enabled() is last.grad\n", "",
        "features/test_known.py", *RUN,
    ),
    fault(
        "appearing-parameters", "A call of a known kind does not see that a parameter appeared.",
        "features/known.py",
        "and [*map(dict.get, map(_parameters, self.absent), self.appearing)] == self.nothing\n", "",
        "features/test_known.py", *RUN,
    ),
    fault(
        "attributes-seen", "A module does not see that an op changed.",
        "run/sequential.py", 'self.__dict__["_epoch"] = self.__dict__["_prepared"] = -1\n',
        "pass\n", *RUN, "guards/test_watched.py",
    ),
    fault(
        "key-of-modes", "Training and evaluation share a plan.",
        "run/key.py", "trains = tuple([op.training for op in modes]) if modes else ()",
        "trains = tuple([True for op in modes]) if modes else ()", "run/test_key.py", *RUN,
    ),
    fault(
        "key-of-frozen", "Frozen and trained weights share a plan.",
        "run/key.py", "grad and w.requires_grad,", "grad,", "run/test_key.py", *RUN,
        "run/test_autograd.py",
    ),
    fault(
        "key-of-autocast", "Calls with and without autocast share a plan.",
        "run/key.py", "compute = torch.get_autocast_dtype(kind)", "compute = None",
        "run/test_key.py", *RUN,
        "features/test_casting.py",
    ),
    fault(
        "settings-in-tables", "Modules whose settings differ share their plans.",
        "run/table.py", "parts += kind, type(op), *settings, *keys", "parts += kind, type(op)",
        *RUN,
    ),
    fault(
        "fusers-in-tables", "A registered fuser leaves plans of before in use.",
        "run/table.py", "fusers = tuple(fuser.serial for fuser in registered())", "fusers = ()",
        *RUN, "test_fuser.py",
    ),
    fault(
        "rows-of-gradients", "A gradient of three dimensions comes back flattened.",
        "features/dimensions.py", "gradients[0] = whole[0] if same else dx.view(shape)",
        "gradients[0] = dx", "run/test_autograd.py", "run/test_eager.py",
    ),
    fault(
        "saved-overwritten", "A kept block of memory counts as idle while a tensor has it.",
        "kernels/cpu/memory.py", "return _references(block) == _ALONE",
        "return True", "kernels/test_cpu_memory.py",
    ),
    fault(
        "kept-threads", "Recipes of one thread are those of all.",
        "precision/autocast.py", "class Active(threading.local):", "class Active:",
        "precision/test_autocast.py",
    ),
)  # fmt: skip

SCALES: tuple[Fault, ...] = (
    fault(
        "inner-context", "Leaving an inner context brings back no recipe.",
        "precision/autocast.py", "self.key = self.stack[-1].key if self.stack else None",
        "self.key = None", "precision/test_autocast.py",
    ),
    fault(
        "scales-unrecorded", "Amaxes of activations are not noted in training.",
        "features/recipes.py",
        'record([*self.states.values()], "activation", outputs[count:], grad)',
        'record([*self.states.values()], "activation", outputs[count:], False)', *DELAYED,
    ),
    fault(
        "scales-in-evaluation", "Calls without grad move scales.",
        "precision/delayed.py", "                self.recorded = False\n            return False\n",
        "                self.recorded = False\n            return True\n", *DELAYED,
    ),
    fault(
        "gradient-scales", "Scales of gradients are never updated.",
        "precision/updates.py", "(BACKWARD, FORWARD)[: 1 + late]", "(FORWARD,)[:late]", *DELAYED,
    ),
    fault(
        "previous-scales", "A recomputation reads the scales of now.",
        "precision/delayed.py", "            if column < 2:\n"
        "                return snapshot(self.previous, column, (self, column))\n", "",
        "precision/test_recomputed.py", *DELAYED,
    ),
    fault(
        "scales-by-order", "A checkpoint's n-th scale is the n-th that its forward read.",
        "precision/delayed.py", "return taken(fixed.views()[3 * place + column], (self, column))",
        "return taken(fixed.views()[3 * place + column], None)",
        "precision/test_recomputed.py", "fuzz/test_fuzz_lives.py",
    ),
    fault(
        "loaded-scales", "Scales start anew once they are loaded.",
        "precision/delayed.py",
        "                    self._buffers[name] = "
        "value.clone(memory_format=torch.contiguous_format)\n"
        "        self.fix()\n",
        "                    self._buffers[name] = "
        "value.clone(memory_format=torch.contiguous_format)\n"
        "        self.reset_parameters()\n",
        *DELAYED,
    ),
    fault(
        "copied-scales", "A copy starts with the scales of a new layer.",
        "precision/delayed.py",
        "        self._known = {}\n        self.fix()\n",
        "        self._known = {}\n        self.reset_parameters()\n",
        *DELAYED,
    ),
    fault(
        "kept-weights", "A later microbatch quantizes its weights again.",
        "features/recipes.py",
        "if first is False:\n                operands = self._kept(plan, operands)\n",
        "", "precision/test_weights.py", "layernorm_mlp/test_module.py", "precision/test_recipe.py",
    ),
)  # fmt: skip
