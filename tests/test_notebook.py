"""The notebook that a newcomer opens first runs, and prints what is committed.

    python tests/test_notebook.py

executes it anew and writes it. An output that says the same as before is left as it is, so that
the difference is that of the work.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
import pytest
import traitlets
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets.config import Config

pytestmark = pytest.mark.newest
ROOT = Path(__file__).parent.parent
PATH = ROOT / "examples" / "first_look.ipynb"
STRICT = "import warnings\n\nwarnings.simplefilter('error')"
LENIENT = "warnings.resetwarnings()"
CACHE = os.environ.get("JBACKPROP_TEST_CACHE", ROOT / ".cache" / "jax")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]\d+)?(?: %)?")


def read() -> Any:
    return nbformat.read(PATH, as_version=4)


class Kernel(AsyncKernelManager):
    """This Python, whatever kernels are installed: there is no folder to look for others in."""

    @traitlets.default("kernel_spec_manager")
    def _no_folders(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def executed(notebook: Any) -> Any:
    """A copy, run in a clean kernel in which every warning raises."""
    copy = nbformat.from_dict(notebook)
    added = map(nbformat.v4.new_code_cell, (STRICT, LENIENT))  # a kernel warns when it ends
    copy.cells = [next(added), *copy.cells, next(added)]
    with tempfile.TemporaryDirectory() as folder:
        config = Config()
        config.Kernel.connection_file = f"{folder}/kernel.json"
        if os.name == "posix":  # files to talk through: no ports, which are open to others
            config.Kernel.update(transport="ipc", ip=f"{folder}/kernel")
        client = NotebookClient(
            copy, kernel_manager_class=Kernel, config=config, timeout=300, record_timing=False,
            coalesce_streams=True,
        )  # fmt: skip
        client.execute(cwd=str(PATH.parent), env=environment(folder))
    copy.cells = copy.cells[1:-1]
    for count, cell in enumerate(code_cells(copy), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    return copy


def environment(settings: str) -> dict[str, str]:
    """As users have it, on a CPU, without anybody's settings."""
    own = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": settings, "MPLCONFIGDIR": settings,
    }  # fmt: skip
    for name in own.keys() & {"XLA_FLAGS", "MPLBACKEND", "PYTHONWARNINGS"}:
        del own[name]
    return own


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list[Any]) -> list[str]:
    """What is shown as text; in a picture's place its size is not said."""
    found = []
    for output in outputs:
        if output.output_type == "stream":
            found.append(f"{output.name}: {output.text}")
        elif "image/png" in output.data:
            found.append("a picture")
        else:
            found.append(output.data["text/plain"])
    return found


def pictures(outputs: list[Any]) -> list[str]:
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def same_text(one: str, other: str) -> bool:
    """Equal but for numbers in their last place, as hardware rounds differently."""
    words = NUMBER.split(one), NUMBER.split(other)
    numbers = NUMBER.findall(one), NUMBER.findall(other)
    return words[0] == words[1] and all(map(same_number, *numbers))


def same_number(one: str, other: str) -> bool:
    """Per cents, of what was learnt, to 3; others to one in the last place; integers exactly."""
    a, b = (float(number.removesuffix(" %")) for number in (one, other))
    step = 3 if one.endswith(" %") else max(last_place(one), last_place(other))
    return abs(a - b) <= 1.01 * step


def last_place(number: str) -> float:
    """What one more in the last place is: 0.01 in 0.25, 1e-19 in 3e-19; nothing in an integer."""
    mantissa, _, power = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.0 if decimals == 0 and not power else 10.0 ** (int(power or 0) - decimals)


def same_picture(one: str, other: str) -> bool:
    a, b = (matplotlib.image.imread(io.BytesIO(base64.b64decode(v))) for v in (one, other))
    return a.shape == b.shape and bool(np.mean(np.abs(a - b)) < 0.01)


def same(old: list[Any], new: list[Any]) -> bool:
    """Whether outputs say the same."""
    shown, now = texts(old), texts(new)
    if len(shown) != len(now) or not all(map(same_text, shown, now)):
        return False
    return all(map(same_picture, pictures(old), pictures(new)))


def test_it_prints_what_is_committed() -> None:
    notebook = read()
    for old, new in zip(code_cells(notebook), code_cells(executed(notebook)), strict=True):
        shown, now = texts(old.outputs), texts(new.outputs)
        assert len(shown) == len(now), f"{old.id}: {now}"
        for one, other in zip(shown, now, strict=True):
            assert same_text(one, other), f"{old.id} prints\n{other}\nand not\n{one}"


def test_it_is_committed_as_it_ran() -> None:
    """With outputs and small pictures, from top to bottom, without warnings or folders."""
    notebook = read()
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(o.name == "stdout" for o in outputs if o.output_type == "stream")
    sizes = [len(base64.b64decode(picture)) for picture in pictures(outputs)]
    assert len(sizes) >= 3
    assert max(sizes) <= 60_000
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", PATH.read_text())


def test_what_it_links_to_is_there() -> None:
    text = "".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 4
    for link in links:
        assert link.startswith("https://") or (PATH.parent / link).exists(), link


@pytest.mark.parametrize(
    ("one", "other", "due"),
    [
        ("output 0.6718", "output 0.6719", True),
        ("output 0.6718", "output 0.6721", False),
        ("first 4e-19", "first 5e-19", True),
        ("first 10e-19", "first 9e-19", True),
        ("first 4e-19", "first 4e-18", False),
        ("98 % right", "96 % right", True),
        ("98 % right", "90 % right", False),
        ("(1797, 64)", "(1798, 64)", False),
        ("equal: True", "equal: False", False),
    ],
)
def test_numbers_are_the_same_but_for_their_last_place(one: str, other: str, due: bool) -> None:
    assert same_text(one, other) == due


def main() -> None:
    old = read()
    new = executed(old)
    for before, now in zip(code_cells(old), code_cells(new), strict=True):
        if same(before.outputs, now.outputs):
            now.outputs = before.outputs
    new.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in new.cells:
        cell.metadata = {}
    nbformat.write(new, PATH)


if __name__ == "__main__":
    sys.exit(main())
