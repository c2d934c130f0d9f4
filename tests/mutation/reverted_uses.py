"""Mends that are taken back, of uses that went wrong: wrong arguments, transforms, numbers."""

from .form import Edit, Fault, fault

SCALES = (
    fault(
        "state-dict-without-scales", "A layer that never ran has no scales to load.",
        "ops/linear.py", "        meet(self, *self.scaled_weights)\n", "",
        "precision/test_delayed_state.py",
    ),
    Fault(
        "scales-of-inference", "What calls without grad see moves scales.",
        (
            Edit("features/recipes.py",
                 "                if not grad:\n"
                 "                    return whole.silent(), scales\n",
                 ""),
            Edit("run/eager.py",
                 "outputs = stage.recipe.record(plan, outputs, torch.is_grad_enabled())",
                 "outputs = stage.recipe.record(plan, outputs, True)"),
        ),
        ("precision/test_delayed.py",),
    ),
    fault(
        "reentrant-without-recipe", "A reentrant checkpoint recomputes without the recipe.",
        "precision/recomputed.py",
        "if last != active.key and tapes.replaying is None and torch.is_grad_enabled():",
        "if False:",
        "precision/test_recomputed.py",
    ),
)  # fmt: skip

PARAMETERS = (
    fault(
        "marks-of-new-parameters", "A parameter that is set has no marks.",
        "ops/parameters.py",
        "        if param is not None and \"marked\" in self.__dict__:\n"
        "            self._mark_parameters()\n",
        "        pass\n",
        "layernorm_mlp/test_settings.py",
    ),
    fault(
        "default-device", "A LayerNormMLP does not follow PyTorch's default device.",
        "layernorm_mlp/settings.py",
        "    if any(isinstance(mode, DeviceContext) for mode in modes):\n        return None\n"
        "    return \"cuda\" if torch.cuda.is_available() else None\n",
        "    del modes\n    return \"cuda\" if torch.cuda.is_available() else \"cpu\"\n",
        "layernorm_mlp/test_settings.py",
    ),
    fault(
        "foreign-keys", "Keys of TransformerEngine's ops do not load.",
        "ops/linear.py", "super()._own_keys(keys_of_basic_ops(state_dict, prefix), prefix)",
        "super()._own_keys(state_dict, prefix)",
        "layernorm_mlp/test_checkpoints.py", "ops/test_ops.py", "guards/test_watched.py",
    ),
    fault(
        "given-main-grad", "get_main_grad() is not asked.",
        "ops/main_grad.py", "    get = getattr(weight, \"get_main_grad\", None)\n",
        "    get = None\n",
        "ops/test_main_grad.py",
    ),
    fault(
        "told-of-delayed", "Nobody is told that delayed gradients have arrived.",
        "ops/delayed.py", "                    late.arrive()\n        _tell(gradients)\n",
        "                    late.arrive()\n",
        "ops/test_delayed.py",
    ),
)  # fmt: skip

TRANSFORMS = (
    fault(
        "torch-func", "torch.func finds no way through a module.",
        "run/stage.py", "if transforms() or forward_ad._current_level >= 0 or tracing():",
        "if forward_ad._current_level >= 0 or tracing():",
        "features/test_followed.py",
    ),
    fault(
        "tangents", "Forward-mode AD loses its tangents.",
        "run/stage.py", "if transforms() or forward_ad._current_level >= 0 or tracing():",
        "if transforms() or tracing():",
        "features/test_followed.py",
    ),
    fault(
        "traced", "torch.jit.trace records memory that nothing has written to.",
        "run/stage.py", "if transforms() or forward_ad._current_level >= 0 or tracing():",
        "if transforms() or forward_ad._current_level >= 0:",
        "features/test_followed.py",
    ),
    fault(
        "wide-stream", "A residual stream in fp32 beside branches of 16 bits is refused.",
        "ops/residual.py", "extra_inputs = passes = promotes = (\"other\",)",
        "extra_inputs = passes = (\"other\",)",
        "features/test_casting.py", "run/test_autograd.py", "plan/test_lines.py",
    ),
    fault(
        "derivative-of-a-base", "An op that overrides fwd keeps the derivative of its base.",
        "op/functions.py", "held[name] = fwd is None or fwd is kind.fwd", "held[name] = True",
        "op/test_functions.py",
    ),
)  # fmt: skip

ARGUMENTS = (
    fault(
        "blocks-below-1", "Blocks of -1 columns are taken, of which no end comes.",
        "ops/activations.py",
        "self.glu_interleave_size = size(type(self).__name__, name, glu_interleave_size)",
        "self.glu_interleave_size = glu_interleave_size",
        "ops/test_ops.py", "bad_input",
    ),
    fault(
        "sizes-of-norms", "A norm takes sizes that are none.",
        "ops/norms.py", "return tuple(whole(who, name, n, 0, \", or several\") for n in given)",
        "return tuple(int(n) for n in given)",
        "bad_input",
    ),
    fault(
        "numbers-in-tensors", "A scale in a tensor of one element is refused.",
        "guards/validation.py",
        "return value if value.is_meta or value.numel() != 1 else value.item()", "return value",
        "guards/test_validation.py",
    ),
    fault(
        "constants-as-text", "A constant without a literal is written as its repr.",
        "guards/constants.py",
        "return repr(value) if type(value) is float or type(value) in _EXACT else None",
        "return repr(value)",
        "guards/test_constants.py",
    ),
    fault(
        "half-an-edit", "An edit of ops that raises leaves a part of it.",
        "guards/watched.py",
        "            self.__dict__[\"_modules\"] = before\n            raise\n",
        "            raise\n",
        "guards/test_watched.py",
    ),
    fault(
        "deep-chains", "Planning recurses once for each op of a chain.",
        "plan/recompute.py", "if not size or not makers or depth >= DEPTH:",
        "if not size or not makers:",
        "plan/test_recompute.py",
    ),
    fault(
        "sources-stay", "The source of a plan that is gone stays.",
        "guards/compiled.py",
        "    finalize(function, linecache.cache.pop, file, None).atexit = False\n", "",
        "run/test_table.py",
    ),
    fault(
        "check-of-nans", "OPSGRAPH_CHECK calls a NaN wrong that both sides have.",
        "features/expected.py",
        "(wide == reference) | (reference.isnan() & ~wide.isfinite())",
        "wide == reference",
        "features/test_expected.py",
    ),
)  # fmt: skip

NUMBERS = (
    Fault(
        "overflow-saturates", "A cast to FP8 makes a finite number of an infinite one.",
        (
            Edit("kernels/reference/quantize.py", ".masked_fill(value.isinf(), torch.nan)", ""),
            Edit("kernels/cpu/source/quantize.h",
                 "to[j] = widened(magnitude(x[j])) == INFINITE ? 0x7f : to[j];",
                 "to[j] = to[j];"),
        ),
        ("precision/test_overflows.py",),
    ),
    Fault(
        "limits-of-gelu", "The tanh GELU is NaN far from 0.",
        (
            Edit("kernels/cpu/source/activations.h",
                 "        float above = x < LOW ? LOW : x, inner = above > HIGH ? HIGH : above;\n"
                 "        float square = inner * inner;\n",
                 "        float above = x, inner = x;\n        float square = inner * inner;\n"),
        ),
        ("kernels/test_edge_numbers.py",),
    ),
    fault(
        "masked-infinities", "The gradient of a ReLU is NaN where it is 0 times inf.",
        "kernels/cpu/source/activations.h",
        "return {x <= 0.0f ? 0.0f : x, 1.0f, x <= 0.0f};  // a NaN stays one",
        "return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};",
        "kernels/test_edge_numbers.py",
    ),
    fault(
        "level-rows", "LayerNorm's weight has a gradient from rows of equal values.",
        "kernels/reference/norms.py",
        "elif x.device.type == \"cpu\" or first not in (None, h.dtype):",
        "elif first not in (None, h.dtype):",
        "kernels/test_edge_numbers.py",
    ),
)  # fmt: skip

USES: tuple[Fault, ...] = (*SCALES, *PARAMETERS, *TRANSFORMS, *ARGUMENTS, *NUMBERS)
