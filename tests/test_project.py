"""The project itself: who imports whom, what is public, and that its pages tell the truth."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jbackprop as jb

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jbackprop"
ORDER = [
    ["factored", "checks", "files", "mesh"], ["sweep"], ["structure"], ["layers"], ["compose"], ["losses"], ["calls"], ["gradient"],
    ["html", "objective", "observe", "sharding", "table"], ["averages", "capture", "per_example"], ["check"], ["curvature"], ["diagnose", "metrics", "optim", "summary"],
    ["credit", "inspect"], ["saved"], ["train"], ["catalogue", "datasets"], ["bench"], ["demo"], ["cli"], ["__init__", "__main__"],
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


@pytest.mark.newest
def test_nothing_is_computed_at_import():
    """With no device to be had, any array would be an error: also of the command line and the suite."""
    command = (
        "import sys, jbackprop.cli, jbackprop.bench.suite, jbackprop.catalogue\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'sklearn', 'orbax', 'flax')))"
    )
    env = os.environ | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_docstring():
    for name, value in vars(jb).items():
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name
            assert len(value.__doc__) > 20, name


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


# What the pages say --------------------------------------------------------------------------------

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PROVED_ELSEWHERE = {"derivations.md"}  # its derivations have a test of their own
AS_IT_COMES = {  # the tests' own settings are stricter
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fences(page):
    """(language, text, line of the text) of every fenced block of a page."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield found[1], found[2], text[: found.start(2)].count("\n")


def prose(page):
    """A page without its fenced blocks and code spans, in which brackets and hashes mean something."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def printing_pages():
    named = [page for page in PAGES if page.name not in PROVED_ELSEWHERE]
    return [page for page in named if any(language == "python" for language, *_ in fences(page))]


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_missing(promised, printed):
    """The first line that is promised and not printed in its turn; None if there is none."""
    rest = iter(printed)
    return next((line for line in promised if line not in rest), None)


@pytest.mark.newest
@pytest.mark.parametrize("page", printing_pages(), ids=lambda page: page.name)
def test_a_page_runs_and_prints_what_it_says(page, capsys, tmp_path, monkeypatch):
    """All python blocks of a page in one namespace, top to bottom, as a stranger would paste them.

    A comment `# -> text` is what a line prints, and a block of `text` what the code before it does.
    """
    import jax

    monkeypatch.chdir(tmp_path)
    before = {name: getattr(jax.config, name) for name in AS_IT_COMES}
    space, promised = {"__name__": page.stem}, []
    try:
        for name, value in AS_IT_COMES.items():
            jax.config.update(name, value)
        for language, text, line in fences(page):
            if language == "python":
                promised += re.findall(r"# -> (.*)", text)
                exec(compile("\n" * line + text, str(page), "exec"), space)
            elif language == "text":
                promised += lines(text)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    printed = lines(capsys.readouterr().out)
    missing = first_missing(map(str.strip, promised), printed)
    assert promised
    assert missing is None, f"{missing!r} is not, or not there, in\n" + "\n".join(printed)
    for report in re.findall(r"^```\n(jb\.check\..*?)^```$", page.read_text(), re.DOTALL | re.M):
        assert_printed_but_for_roundings(lines(report), printed)


def assert_printed_but_for_roundings(report, printed):
    """A report of jb.check: its verdicts and words, and no figure that another machine rounds otherwise."""
    rows = [" ".join(line.split()[:4]) for line in report if "WRONG" in line]
    words = [line for line in report if " gradient " not in line and "verdict" not in line]
    assert rows
    assert all(any(" ".join(line.split()[:4]) == row for line in printed) for row in rows)
    assert set(words) <= set(printed), set(words) - set(printed)


def test_the_check_report_is_shown_somewhere():
    shown = [page.name for page in PAGES if re.search(r"^```\njb\.check\.", page.read_text(), re.M)]
    assert shown == ["check.md"]


def test_every_relative_link_leads_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        if not page.exists():
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, heading = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text()), re.MULTILINE)
                assert heading in map(anchor, titles), f"{page.name}: {target}"


def anchor(title):
    """What GitHub makes of a title: `#how-do-i-get-the-deltas`."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_page_picture_and_example_is_referred_to():
    targets = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    }
    examples = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")]
    for path in [*DOCS.glob("*.md"), *DOCS.glob("*.png"), *examples]:
        assert path.resolve() in targets, path.name


def test_every_name_in_the_pages_exists():
    """`jb.fit`, `per_example.norms`, `cv.kfac`: what is said of the library is of this one."""
    short = {"jb": jb, "per_example": jb.per_example, "cv": jb.curvature}
    for page in PAGES:
        for name in re.findall(r"\b((?:jb|cv|per_example)(?:\.[A-Za-z_]\w*)+)", page.read_text()):
            first, *rest = name.split(".")
            if rest[-1] in ("json", "md", "py"):  # a file
                continue
            value = short[first]
            for part in rest:
                assert hasattr(value, part), f"{page.name}: {name}"
                value = getattr(value, part)


def test_the_first_screen_has_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make run" in line for line in first)
    assert any("make test" in line for line in first)


def test_the_readme_is_ten_questions_and_not_a_book():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 365
    assert len(re.findall(r"^## .*\?$", text, re.MULTILINE)) == 10
