"""The promises of the layout: who imports whom, which packages, and what no file may contain."""
import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = {"losses", "model", "clip_text", "labels", "data", "metrics"}
COMMANDS = {"train", "infer"}
SUPPORT = {f"support.{path.stem}" for path in (ROOT / "support").glob("*.py")} - {
    "support.__init__"}
OURS = CORE | COMMANDS | SUPPORT
PACKAGES = {"torch", "numpy", "nibabel", "scipy", "tqdm", "ftfy", "regex"}
COPYABLE = {"losses", "model", "clip_text", "labels", "metrics"}       # need no other file of ours


def text_of(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(text_of(module))) if isinstance(node, ast.Call)]


def imports(module: str, *, inside_functions: bool) -> set[str]:
    """The modules that a file imports: ours as "data" or "support.files", others by package.

    inside_functions  also those that are imported when a function runs
    """
    tree = ast.parse(text_of(module))
    nodes = list(ast.walk(tree)) if inside_functions else list(tree.body)
    for node in tree.body:
        if isinstance(node, ast.Try):
            nodes += node.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name if name in OURS else name.split(".")[0] for name in found}


def test_the_top_level_holds_the_core_and_its_two_commands():
    assert {path.stem for path in ROOT.glob("*.py")} == CORE | COMMANDS


def test_only_the_agreed_packages_are_imported():
    """matplotlib is optional: it is imported where a picture is drawn. Nobody imports experiments.
    """
    for module in OURS:
        allowed = set(sys.stdlib_module_names) | PACKAGES | OURS
        assert imports(module, inside_functions=False) <= allowed, module
        assert imports(module, inside_functions=True) <= allowed | {"matplotlib"}, module


def test_arrows_point_from_the_commands_to_support_to_the_core():
    graph = {module: imports(module, inside_functions=False) & OURS for module in OURS}
    list(graphlib.TopologicalSorter(graph).static_order())       # raises CycleError
    assert graph["data"] <= {"labels"} and "train" not in graph["infer"]
    for module in COPYABLE:
        assert not graph[module], module
    for module in SUPPORT:
        assert not imports(module, inside_functions=True) & COMMANDS, module
    for module in CORE:                      # the commands at the end of metrics, clip_text, labels
        inside = imports(module, inside_functions=True) & OURS
        assert inside <= SUPPORT | {"labels"}, module


def test_training_takes_nothing_from_inference_but_the_sliding_window():
    used = {node.attr for node in ast.walk(ast.parse(text_of("train")))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "infer"}
    assert used <= {"sliding_window"}


def test_a_name_is_defined_once():
    """Functions and classes of two files have different names, but for what a command consists of
    and for the files that people copy alone."""
    homes: dict[str, set[str]] = {}
    for module in OURS - COPYABLE:
        for node in ast.parse(text_of(module)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in (
                    "main", "parse", "segment"):
                homes.setdefault(node.name, set()).add(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_model_is_plain_pytorch():
    """No custom gradient, no memory layout, no branch on the device, as in support/fast.py."""
    for word in ("autograd.Function", "memory_format", ".device.type", "autocast"):
        assert word not in text_of("model"), word


def test_nothing_looks_outside_the_repository():
    """Only tests/conftest.py knows where the reference files may lie."""
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT)
        if inside.parts[0] != ".venv" and path.name not in ("conftest.py", Path(__file__).name):
            assert '"shared"' not in path.read_text(encoding="utf-8"), path


def test_torch_load_always_with_weights_only():
    for module in OURS:
        for call in calls(module):
            if ast.unparse(call.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True"
                           for k in call.keywords), module


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text: open(...), PATH.open(...), read_text or write_text."""
    name = ast.unparse(call.func)
    if name.endswith((".read_text", ".write_text")):
        return name != "clip_text.read_text"
    if not (name == "open" or name.endswith(".open")) or name in ("gzip.open", "archive.open"):
        return False                                     # those two are binary unless asked
    modes = call.args[1:2] if name == "open" else call.args[:1]
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any("b" in ast.unparse(mode) for mode in modes)


def test_text_is_utf_8_whatever_the_locale():
    for module in OURS:
        for call in filter(opens_text, calls(module)):
            assert any(k.arg == "encoding" for k in call.keywords), f"{module}:{call.lineno}"
