"""The promises of the layout: who imports whom, and which packages."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {"labels", "clip_text", "data", "model", "losses", "metrics", "train", "infer",
        "support"}
PACKAGES = {"torch", "numpy", "nibabel", "scipy", "tqdm", "ftfy", "regex", "matplotlib"}
ALONE = {"model", "losses", "metrics", "clip_text"}       # people copy these
# What the commands (not the top level) of a file may import of ours
INSIDE = {"labels": {"data"}, "metrics": {"support"}, "clip_text": {"data", "labels"}}


def imports(path, top_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def files():
    return [p for p in ROOT.glob("*.py")]


def test_top_level_holds_only_the_agreed_files():
    assert {p.stem for p in files()} <= OURS


def test_only_the_agreed_packages_are_imported():
    for path in files():
        foreign = set(imports(path)) - set(sys.stdlib_module_names) - OURS
        assert foreign <= PACKAGES, (path.name, foreign)
        assert "matplotlib" not in set(imports(path, top_only=True)), path.name


def test_imports_point_one_way():
    """At the top level of a file; the commands at its end may import what INSIDE names."""
    order = ["labels", "model", "losses", "metrics", "clip_text", "support", "data",
             "infer", "train"]
    for path in files():
        top = (set(imports(path, top_only=True)) & OURS) - {path.stem}
        everywhere = (set(imports(path)) & OURS) - {path.stem}
        if path.stem in ALONE:
            assert not top, path.name
        assert all(order.index(m) < order.index(path.stem) for m in top), path.name
        assert everywhere - top <= INSIDE.get(path.stem, set()), path.name
    assert set(imports(ROOT / "support/fast.py")) & OURS == {"model", "support"}
    assert set(imports(ROOT / "support/extension.py")) & OURS == {"model"}


def test_experiments_are_imported_by_nobody():
    for path in files():
        assert "experiments" not in set(imports(path)), path.name


def test_model_is_plain_pytorch():
    """No custom gradient, no memory layout, no branch on the device: that is in support/."""
    text = (ROOT / "model.py").read_text()
    for word in ("autograd.Function", "memory_format", ".device.type", "autocast"):
        assert word not in text, word


def test_nothing_looks_outside_the_repository():
    """Only the fixture in tests/conftest.py knows where the reference files may lie."""
    for folder in (ROOT, ROOT / "experiments", ROOT / "tests"):
        for path in folder.glob("*.py"):
            if path.name not in ("conftest.py", "test_structure.py"):
                assert '"shared"' not in path.read_text(), path
                assert "parents[2]" not in path.read_text(), path


def test_torch_load_always_with_weights_only():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True"
                           for k in node.keywords), path.name


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text: open(...), PATH.open(...), read_text or write_text."""
    name = ast.unparse(call.func)
    if name.endswith((".read_text", ".write_text")):
        return name != "clip_text.read_text"                         # text embeddings, no text file
    if name != "open" and not name.endswith(".open"):
        return False
    arguments = call.args[1:] if name == "open" or name.startswith("gzip") else call.args
    arguments += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes = [node.value for argument in arguments[:1] for node in ast.walk(argument)
             if isinstance(node, ast.Constant)]
    if name in ("gzip.open", "archive.open"):                        # binary unless asked
        return any("t" in mode for mode in modes if name == "gzip.open")
    return not modes or not all("b" in mode for mode in modes)


def test_what_opens_text():
    calls = {"p.read_text()": True, "clip_text.read_text(p, names)": False,
             "open(p)": True, "open(p, 'w')": True, "p.open()": True,
             "open(p, mode='a')": True, "gzip.open(p, 'rt')": True, "open(p, 'rb')": False,
             "p.open('wb')": False, "gzip.open(p)": False, "archive.open('data.pkl')": False,
             "open(p, 'ab' if more else 'wb')": False, "opened(p)": False}
    for text, is_text in calls.items():
        assert opens_text(ast.parse(text).body[0].value) == is_text, text


def test_text_is_utf_8_whatever_the_locale():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                assert any(k.arg == "encoding" and k.value.value.startswith("utf-8")
                           for k in node.keywords), f"{path.name}:{node.lineno}"
