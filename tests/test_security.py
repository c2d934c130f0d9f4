"""What SECURITY.md promises; its sentences, in order."""

import ast
import builtins
import json
import os
import pickle
import re
import stat
import tokenize
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import opsgraph as og
from opsgraph.base.backend import Backend, add_backend
from opsgraph.kernels import choices, directories
from opsgraph.kernels.cpu import build
from opsgraph.ops import GELU, Add, Linear, RMSNorm, Tee

PACKAGE = Path(og.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
FIRED: list[str] = []


def _imports(path: Path) -> set[str]:
    found = re.findall(r"^ *(?:import|from) +([a-z_]\w*)", path.read_text(), re.MULTILINE)
    return {*found}


def _calls(path: Path) -> set[str]:
    """The names of all functions that a module calls."""
    return {*re.findall(r"(?<![\w.])(?<!def )([\w.]+)\(", path.read_text())}


def test_what_imports_and_calls_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import os.path\nif 1:\n    from pickle import loads\nx = torch.load(eval(y))\n"
    )
    assert {"os", "pickle"} <= _imports(path)
    assert {"torch.load", "eval"} <= _calls(path)


# -- nothing is unpickled --


def test_nothing_is_unpickled() -> None:
    """The one exception is the runner of tests on several ranks, whose processes are its own."""
    unpickling = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for name, path in MODULES.items():
        if not name.startswith("testing/"):
            assert not unpickling & _imports(path), name
            assert "torch.load" not in _calls(path), name


class Bomb:
    """Does something when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.fired_by_a_pickle = True",)


@pytest.mark.parametrize("kind", ["tensor", "bytes", "stream"])
def test_extra_state_of_a_checkpoint_stays_pickled(kind: str) -> None:
    made = pickle.dumps(Bomb())
    state: Any = torch.frombuffer(bytearray(made), dtype=torch.uint8)
    state = {"tensor": state, "bytes": made, "stream": BytesIO(made)}[kind]
    for module in (og.LayerNormMLP(8, 16, device="cpu"), Linear(8, 8), RMSNorm(8)):
        module.load_state_dict({**module.state_dict(), "_extra_state": state})
    assert not hasattr(builtins, "fired_by_a_pickle")
    pickle.loads(made)
    assert vars(builtins).pop("fired_by_a_pickle")


def test_state_dicts_load_with_weights_only() -> None:
    module, kept = og.Sequential(RMSNorm(32), Linear(32, 32)), BytesIO()
    with og.autocast(recipe=og.recipe.DelayedScaling()):
        module(torch.randn(4, 32)).sum().backward()
    torch.save(module.state_dict(), kept)
    kept.seek(0)
    og.Sequential(RMSNorm(32), Linear(32, 32)).load_state_dict(torch.load(kept, weights_only=True))


# -- generated source --


def test_source_is_executed_in_one_place() -> None:
    """The fuzzer of `testing` executes the scripts that it has written."""
    executing = {n for n, path in MODULES.items() if {"exec", "eval", "compile"} & _calls(path)}
    assert {n for n in executing if not n.startswith("testing/")} == {"guards/compiled.py"}


NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["x\n    raise SystemExit(3)\n#", "'); FIRED.append('x'); ('", '"""', "\\", "#",
         "x; import os",
         "__import__('os')", "\r\nFIRED", "lambda: 0", "{x}", "%s", "ops", "saved", "torch"]
    ),
)  # fmt: skip


class Doubled(og.Op):
    """`y = factor * x`"""

    constants = ("factor",)
    factor: Any = 2.0

    def fwd(self, x: Tensor, factor: Any) -> tuple[Tensor, tuple[()]]:
        return 2 * x, ()

    def bwd(self, dy: Tensor, factor: Any) -> tuple[Tensor, tuple[()]]:
        return 2 * dy, ()


class Twice(og.Fuser):
    """Two of them in one step."""

    backend = "reference"
    pattern = {"a": Doubled}

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return 2 * x, ()


def _verify_sources(plan: Any, expected: str) -> None:
    """The plan's source has the lines and tokens of one whose names are plain."""
    for source, plain in ((plan.forward_source, "forward"), (plan.backward_source, "backward")):
        tree = ast.parse(source)
        assert [type(node) for node in tree.body] == [ast.FunctionDef]
        assert tree.body[0].name == plain  # type: ignore[attr-defined]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            assert re.fullmatch(r"\w+(\.\w+)*", ast.unparse(call.func)), ast.unparse(call)
        shapes = [type(node).__name__ for node in ast.walk(tree)]
        assert not {"Import", "ImportFrom", "Lambda", "Raise", "Global"} & {*shapes}
        comments = [t.string for t in _tokens(source) if t.type == tokenize.COMMENT]
        assert all(re.fullmatch(r"# [\w+,: .-]+", comment) for comment in comments), comments


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return [*tokenize.tokenize(BytesIO(source.encode()).readline)]


@settings(max_examples=20)
@given(key=NAMES, kind=NAMES, channel=NAMES, constant=NAMES, function=NAMES)
def test_names_in_generated_source_carry_no_code(
    key: str, kind: str, channel: str, constant: str, function: str
) -> None:
    """Keys of a sequence, names of classes, channels, texts as constants, names of functions."""
    key = key.replace(".", "_") or "_"  # as nn.Module asks for

    def called() -> None: ...

    try:
        called.__name__ = called.__qualname__ = function
        op_kind: Any = type("Doubled", (Doubled,), {})
        op_kind.__name__ = op_kind.__qualname__ = kind
        fuser = type("Twice", (Twice,), {"pattern": {"a": op_kind}})
        fuser.__name__ = kind
    except (ValueError, UnicodeEncodeError):
        return  # Python takes no such name
    first, second = op_kind(), op_kind()
    first.factor, second.factor = constant, called
    ops = OrderedDict([(key, first), ("t", Tee(channel)), ("s", second), ("a", Add(channel))])
    with og.register(fuser):
        try:
            module = og.Sequential(ops, backends=("reference",))
        except KeyError:
            return  # nn.Module takes no such key
        x = torch.ones(2, 4, requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert torch.equal(y, torch.full((2, 4), 6.0))
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full((2, 4), 6.0))
        _verify_sources(module.plan(x=x), "")
    assert not FIRED


@settings(max_examples=25)
@given(names=st.lists(st.text("abcxyz_019", min_size=1, max_size=6), min_size=3, max_size=3))
def test_names_of_arguments_and_parameters_carry_no_code(names: list[str]) -> None:
    weight, constant, saved = names
    if len({*names, "x", "self"}) < 5 or not all(map(str.isidentifier, names)):
        return
    source = f"""
class Named(og.Op):
    saves = ("{saved}",)
    constants = ("{constant}",)
    def out(self, x): return x
    def saved(self, x): return {{"{saved}": x}}
    def fwd(self, x, {weight}, {constant}): return x * {weight}, (x + 0,)
    def bwd(self, dy, {saved}, {weight}): return dy * {weight}, ((dy * {saved}).sum(0),)
"""
    space: dict[str, Any] = {"og": og}
    exec(source, space)
    kind = space["Named"]
    op = kind()
    setattr(op, constant, 1.0)
    setattr(op, weight, nn.Parameter(torch.full((4,), 3.0)))
    x = torch.ones(2, 4, requires_grad=True)
    try:
        module = og.Sequential(op, GELU(), backends=("reference",))
        module(x).sum().backward()
    except og.OpsgraphError:
        return  # a name that means something already
    _verify_sources(module.plan(x=x), "")


@pytest.mark.parametrize("name", ["a\nimport os", "a b", "", "a#b", "it's"])
def test_a_backend_is_called_by_a_word(name: str) -> None:
    with pytest.raises(ValueError, match="is known already, or no word"):
        add_backend(Backend(name, "no backend"))


@given(
    text=st.one_of(NAMES, st.sampled_from(["<script>alert(1)</script>", "<img onerror=x>", "&lt;"]))
)
def test_names_in_pages_are_text(text: str) -> None:
    key = text.replace(".", "_") or "_"
    try:
        module = og.Sequential(OrderedDict([(key, Linear(4, 4)), ("b", GELU())]))
    except KeyError:
        return
    for shown in [module._repr_html_()]:
        assert "<script>alert" not in shown
        assert "<img onerror" not in shown


# -- caches --


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(directories.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    for name in ("tmp", "cache"):
        (tmp_path / name).mkdir(mode=0o700)
    return tmp_path / "cache" / "opsgraph"


def _store() -> choices.Choices:
    return choices.Choices("test", lambda: ("machine",), lambda runs: list(runs)[-1])


def _choose(store: choices.Choices) -> str:
    return store.choose("key", lambda: {"usual": lambda: None, "other": lambda: None})


def test_directories_and_files_are_the_users_alone(kept: Path) -> None:
    mask = os.umask(0o000)
    try:
        assert _choose(_store()) == "other"
    finally:
        os.umask(mask)
    (file,) = kept.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["choices"]["key"]["name"] == "other"


Expose = Callable[[Path], None]
EXPOSED: dict[str, Expose] = {
    "a file that others can write": lambda kept: next(kept.iterdir()).chmod(0o666),
    "a file that the group can write": lambda kept: next(kept.iterdir()).chmod(0o660),
    "a directory that others can write": lambda kept: kept.chmod(0o777),
    "one above that others can write": lambda kept: kept.parent.chmod(0o777),
}


@pytest.mark.parametrize("way", EXPOSED)
def test_choices_that_others_could_have_written_are_refused(kept: Path, way: str) -> None:
    """They are measured again, and kept where no one else writes."""
    _choose(_store())
    (file,) = kept.iterdir()
    file.write_text(file.read_text().replace('"other"', '"usual"'))
    assert _store().known("key") == "usual"
    EXPOSED[way](kept)
    with pytest.warns(UserWarning, match="belongs to another user or is writable by others"):
        assert _store().known("key") is None
    with pytest.warns(UserWarning, match="belongs to another user or is writable by others"):
        assert _choose(_store()) == "other"


def test_a_directory_of_another_user_is_refused(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(_store())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(directories, "ROOT", -1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert _store().known("key") is None


def test_what_is_kept_are_names_of_what_there_is(kept: Path) -> None:
    """A choice that names no candidate is measured again; nothing in a file is run or imported."""
    _choose(_store())
    (file,) = kept.iterdir()
    file.write_text(file.read_text().replace('"other"', '"os.system"'))
    assert _choose(_store()) == "other"


def test_a_library_is_known_by_the_digest_of_its_bytes(kept: Path) -> None:
    """`tests/kernels/test_cpu_build.py` has what becomes of others."""
    kept.mkdir(parents=True, mode=0o700)
    path = kept / f"norms-KEY-{build._digest(b'bytes')}.so"
    path.write_bytes(b"bytes")
    path.chmod(0o600)
    assert build._intact(path)
    path.write_bytes(b"other")
    assert not build._intact(path)


# -- the network, processes, what is imported --


def test_nothing_opens_a_connection() -> None:
    network = {
        "socket",
        "ssl",
        "urllib",
        "http",
        "requests",
        "httpx",
        "aiohttp",
        "ftplib",
        "smtplib",
    }
    for name, path in MODULES.items():
        if not name.startswith("testing/"):
            assert not network & _imports(path), name


def test_only_the_compiler_is_started() -> None:
    starting = {"subprocess", "multiprocessing", "pty", "popen2"}
    started = {name for name, path in MODULES.items() if starting & _imports(path)}
    assert {n for n in started if not n.startswith("testing/")} == {"kernels/cpu/build.py"}
    shells = {"os.system", "os.popen", "os.execv", "os.spawnv"}
    assert not any(shells & _calls(path) for path in MODULES.values())
    assert "shell=True" not in MODULES["kernels/cpu/build.py"].read_text()


def test_only_commands_import_what_they_are_told() -> None:
    names = {"importlib.import_module", "import_module", "__import__"}
    importing = {n for n, p in MODULES.items() if names & _calls(p)}
    own = {"kernels/lazy.py", "precision/recorded.py"}  # modules of opsgraph's, by constants
    assert importing - own == {"tune/command.py", "integrations/explain.py"}


def test_every_promise_has_a_test_here() -> None:
    text = (PACKAGE.parent / "SECURITY.md").read_text()
    promises = re.findall(r"^- (.*?)\.?\s*$", text, re.MULTILINE)
    assert len(promises) >= 8
    assert "github" in text.lower()
    assert "@" not in text.replace("@given", "")  # no address that nobody reads
