"""The promises of the layout: who imports whom, and which packages."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {"labels", "clip_text", "data", "model", "losses", "metrics", "train", "infer"}
PACKAGES = {"torch", "numpy", "nibabel", "scipy", "tqdm", "ftfy", "regex", "matplotlib"}
ALONE = {"model", "losses", "metrics", "clip_text"}       # people copy these


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
    order = ["labels", "model", "losses", "metrics", "clip_text", "data", "infer", "train"]
    for path in files():
        mine = (set(imports(path)) & OURS) - {path.stem}
        if path.stem in ALONE:
            assert not set(imports(path, top_only=True)) & OURS, path.name
            assert mine <= {"labels"}, path.name
        else:
            assert all(order.index(m) < order.index(path.stem) for m in mine), path.name


def test_torch_load_always_with_weights_only():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True"
                           for k in node.keywords), path.name
