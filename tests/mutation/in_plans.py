"""Faults in planning, in the generated code and in casts."""

from .form import Fault, fault

PLANS = "plan/test_planner.py", "plan/test_result.py", "plan/test_sources.py"
SOURCES = "plan/test_codegen.py", "plan/test_lines.py", "plan/test_sources.py"

PLANNER: tuple[Fault, ...] = (
    fault(
        "hidden-values", "A forward step may hide what the backward needs.",
        "plan/planner.py", "return not hidden\n", "return True\n", *PLANS,
    ),
    fault(
        "saved-range", "A value that the last op of a step saves counts as handed out.",
        "plan/claims.py", "return claim.start <= value.place < claim.stop",
        "return claim.start <= value.place < claim.stop - 1", *PLANS,
    ),
    fault(
        "inner-gradient", "A fused backward may have a gradient leave in its midst.",
        "plan/rejection.py", "if passes(program.kinds[i]) and i != match.stop - 1:",
        "if passes(program.kinds[i]) and i > match.stop:", "fusers/test_refusals.py",
    ),
    fault(
        "tee-without-gradient", "A backward reads the gradient of a Tee at which none arrives.",
        "plan/rejection.py", "if tee is not None and tee not in program.tapped:",
        "if tee is not None and tee > len(program.kinds):", *PLANS, "run/test_autograd.py",
    ),
    fault(
        "random-again", "What is random is made again.",
        "plan/claims.py", "if not any(self.program.kinds[i].random for i in claim.ops):",
        "if True:", "fusers/test_refusals.py",
    ),
    fault(
        "products-again", "Cheap recomputation runs matrix products again.",
        "plan/recompute.py", 'self.gemms = bool(options.get("checkpoint"))', "self.gemms = True",
        "plan/test_recompute.py", *PLANS,
    ),
    fault(
        "mode-of-dropout", "A fuser takes Dropout in evaluation as in training.",
        "plan/rejection.py", "if still and program.kinds[i].training_matters:",
        "if still and not program.kinds[i].training_matters:", "fusers/test_refusals.py",
    ),
    fault(
        "dtypes-of-fusers", "A fuser is given dtypes that its kernels do not take.",
        "plan/rejection.py", "if fuser.dtypes is not None and x.dtype not in fuser.dtypes:",
        "if fuser.dtypes is not None and not fuser.dtypes:", *PLANS, "fusers/test_fusers.py",
    ),
    fault(
        "later-tee", "An Add is joined to the first Tee of any name.",
        "plan/basic_ops.py", "self.sources[i, name] = producers[channel]",
        "self.sources[i, name] = next(iter(producers.values()))", *PLANS, "test_fuzz.py",
    ),
    fault(
        "flow-of-parameters", "Nothing flows back to an op that has parameters and no input grad.",
        "plan/program.py", "self.flows.append(self.flows[-1] or any(own) or any(read))",
        "self.flows.append(self.flows[-1] or any(read))", *PLANS, "run/test_autograd.py",
    ),
)  # fmt: skip

CODE: tuple[Fault, ...] = (
    fault(
        "gradients-added", "The second gradient of a value takes the place of the first.",
        "plan/codegen.py", 'self.add(Line("add", (value(name), value(gradient)), name))',
        'self.add(Line("bind", (value(gradient),), name))', "run/test_key.py",
    ),
    fault(
        "views-returned", "An input that is also an output is returned as it is.",
        "plan/codegen.py", 'Argument("view" if name in shared else "value", name)',
        'Argument("value", name)', *SOURCES, "run/test_eager.py",
    ),
    fault(
        "let-go-early", "A variable is let go before its last use.",
        "plan/lines.py", "for number, line in reversed([*enumerate(lines[:-1])]):",
        "for number, line in [*enumerate(lines[:-1])]:", *SOURCES,
    ),
    fault(
        "moved-values", "A callee that takes a value from a list is given the value itself.",
        "plan/lines.py",
        'return f"[{nested.text}]" if nested.moved and nested.text not in dead else nested.text',
        "return nested.text", *SOURCES, "fusers/cpu/test_products.py",
    ),
    fault(
        "saved-order", "The backward unpacks what was saved in another order.",
        "plan/codegen.py", 'Line("bind", (value("saved"),), tuple(self.free))',
        'Line("bind", (value("saved"),), tuple(sorted(self.free)))', *SOURCES,
        "run/test_autograd.py",
    ),
    fault(
        "wanted-gradients", "A step is not told which gradients are wanted of it.",
        "plan/codegen.py",
        'want = ["x"] * (dx == "dx") + [g.text for g, name in gradients if name != "_"]',
        'want = ["x"] + [g.text for g, name in gradients]', *SOURCES, "run/test_autograd.py",
    ),
    fault(
        "constants-baked", "A constant whose text is no literal is spelled as None.",
        "plan/program.py", 'text, category = called(value), "object"', 'text = "None"',
        "guards/test_constants.py", *SOURCES,
    ),
)  # fmt: skip

CASTS: tuple[Fault, ...] = (
    fault(
        "cast-input", "An input under autocast stays as it is where no stream has another dtype.",
        "features/casting.py", 'as_given = {"x0"} if streams else set()', 'as_given = {"x0"}',
        "features/test_casting.py", *SOURCES,
    ),
    fault(
        "cast-forward", "A cast under autocast leaves its input as it is.",
        "features/casting.py", "return x.to(to), ()", "return x, ()",
        "features/test_casting.py",
    ),
    fault(
        "cast-parameters", "Parameters are not cast under autocast.",
        "features/casting.py",
        "for i, name in (*run.slots, *(place[:2] for place in run.inputs)):\n"
        "        if name in",
        "for i, name in (*run.slots, *(place[:2] for place in run.inputs)):\n"
        "        if name == \"bias\" or name in",
        "features/test_casting.py",
    ),
    fault(
        "promoted-sum", "A sum has the dtype of its first term.",
        "plan/program.py", "y = y.like(dtype=torch.promote_types(y.dtype, dtype))",
        "y = y.like(dtype=y.dtype)", *SOURCES, "features/test_casting.py", "run/test_autograd.py",
    ),
)  # fmt: skip
