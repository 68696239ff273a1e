"""Rules of the code base: where imports may point, and what is never called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "star_elastic"
FILES = sorted(SRC.rglob("*.py"))
LEVELS = [  # imports point to a lower line
    {"families", "dtypes"},
    {"shapes", "folder"},
    {"symbols"},
    {"layout"},
    {"submodel", "scan", "conv", "records", "corner", "packed", "hub", "precision"},
    {"card", "configs", "sources", "transfer", "fewer"},
    {"checkpoint", "budget", "stock", "align"},
    {"tensors", "grid", "slicing"},
    {"coded"},
    {"model", "adopt", "between", "verify", "rings"},
    {"rank", "evaluate", "latency"},
    {"search", "audit"},
    {"train"},  # training may rank and evaluate
    {"report", "demo", "serve", "export", "quantize"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ENTRY = {"__init__", "__main__"}  # the package's own doors


def part(path: Path) -> str:
    """The module or subpackage of star_elastic that a file belongs to."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Parts of star_elastic that a file imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("star_elastic."):
                yield name.split(".")[1]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def test_every_module_has_a_level() -> None:
    assert {part(path) for path in FILES} - ENTRY <= LEVEL.keys()
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_downward_only(path: Path) -> None:
    here = part(path)
    if here in ENTRY:
        return
    for other in imported(parsed(path)):
        if other != here:
            assert LEVEL[other] < LEVEL[here], f"{here} imports {other}"


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    modules, calls = set(), set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call):
            calls.add(called(node))
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not calls & {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_remote_code_is_never_trusted(path: Path) -> None:
    """Every stock loader is told so, lest it ask on the terminal."""
    loaders = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and called(node).endswith(".from_pretrained"):
            if called(node).split(".")[0] not in loaders:
                continue
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 320


def test_no_drawers() -> None:
    names = {step for path in FILES for step in path.relative_to(SRC).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "base", "manager", "helpers", "misc"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_state_is_global(path: Path) -> None:
    assert not [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Global)]


def test_families_are_data() -> None:
    """Tables know neither torch nor transformers."""
    for path in (SRC / "families").glob("*.py"):
        tree = parsed(path)
        roots = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        roots |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        allowed = {"collections.abc", "dataclasses", "typing"}
        assert {r for r in roots if r and not r.startswith("star_elastic.families")} <= allowed


@pytest.mark.parametrize("module", ["star_elastic", "star_elastic.cli"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


def test_the_package_offers_the_model_lazily() -> None:
    import star_elastic
    from star_elastic.model import ElasticModel

    assert star_elastic.ElasticModel is ElasticModel
    with pytest.raises(AttributeError, match="no attribute 'SuperNet'"):
        star_elastic.SuperNet  # noqa: B018
