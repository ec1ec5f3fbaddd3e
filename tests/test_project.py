"""The project itself: who imports whom, what is public, and that the README tells the truth."""

import ast
import re
from pathlib import Path

import pytest

import jbackprop as jb

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jbackprop"
ORDER = [
    ["factored", "checks", "mesh"], ["sweep"], ["structure"], ["layers"], ["compose"], ["losses"], ["gradient"],
    ["html", "objective", "observe", "sharding", "table"], ["averages", "capture", "per_example"], ["check"], ["curvature"], ["diagnose", "metrics", "optim", "summary"],
    ["credit"], ["saved"], ["train"], ["catalogue", "datasets", "bench"], ["demo"], ["cli"], ["__init__", "__main__"],
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
RANK["losses"] = RANK["layers"]  # neither may know the other


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def unit(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "jbackprop":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("jbackprop."):
                yield node.module.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_order_only(path):
    own = unit(path)
    for other in imported(path):
        if other != own and own not in ("__init__", "__main__"):
            assert RANK[other] < RANK[own], f"{path.name} imports {other}"


def test_quantities_and_the_checker_know_no_concrete_layer():
    for folder in ("check", "per_example", "curvature", "optim", "credit"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not {"layers", "compose"} & set(imported(path)), path
    for path in (PACKAGE / "factored").rglob("*.py"):
        assert set(imported(path)) <= {"factored"}, path
    for path in (PACKAGE / "capture").rglob("*.py"):
        assert set(imported(path)) <= {"capture", "checks", "factored", "mesh", "table"}, path
    assert set(imported(PACKAGE / "sweep.py")) == {"checks", "factored"}


def test_nothing_of_jax_that_is_private():
    for path in modules():
        assert "jax._src" not in path.read_text(), path


def test_every_public_name_has_a_docstring():
    for name, value in vars(jb).items():
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name
            assert len(value.__doc__) > 20, name


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.newest
def test_the_readme_runs_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    """All blocks in one namespace, top to bottom; a comment `# -> text` is what a line prints."""
    import jax

    monkeypatch.chdir(tmp_path)
    blocks = readme_blocks()
    assert len(blocks) >= 4
    space = {}
    source = "\n".join(blocks)
    expected = re.findall(r"# -> (.*)", source)
    assert expected
    strict = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard",
              "jax_numpy_rank_promotion": "allow"}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in strict}
    try:
        for name, value in strict.items():
            jax.config.update(name, value)
        exec(compile(source, "README.md", "exec"), space)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    (report,) = re.findall(r"```\n(jb\.check\..*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    words = [line.strip() for line in report.splitlines() if line.strip()]
    rows = [" ".join(line.split()[:4]) for line in words if "WRONG" in line]
    expected += [line for line in words if " gradient " not in line and "verdict" not in line]
    assert rows
    assert all(any(" ".join(p.split()[:4]) == row for p in printed) for row in rows)
    for line in expected:
        assert line.strip() in printed, f"{line!r} is not in\n" + "\n".join(printed)


def test_the_first_screen_has_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make run" in line for line in first)
    assert any("make test" in line for line in first)
