"""The notebook: its cells run from the first to the last, show their pages, and are committed without outputs."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from optional import needs

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "calculator.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), (
        "clear the outputs of all cells before you commit"
    )


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, *, model: bool) -> list[Any]:
    """Run the cells in `folder`, those on a model too if `model` is set; returns the outputs of all cells."""
    import nbformat
    from nbclient import NotebookClient

    kernel = folder / "kernels" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(NOTEBOOK.parents[2]), os.getenv("PYTHONPATH")))))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    if not model:
        notebook.cells = [cell for cell in notebook.cells if "model" not in cell.metadata.get("tags", ())]
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pages(outputs: list[Any]) -> list[tuple[str, str]]:
    """(HTML, the page at which it opens) of each frame of the viewer."""
    frames = [
        output["data"]["text/html"] for output in outputs if "iframe" in output.get("data", {}).get("text/html", "")
    ]
    addresses = [frame.partition('src="data:text/html;charset=utf-8;base64,')[2].partition('"')[0] for frame in frames]
    return [(base64.b64decode(a.partition("#")[0]).decode(), a.partition("#")[2]) for a in addresses]


def check_pages(outputs: list[Any], *kinds: str) -> None:
    """Check that each frame opens at a page of its kind that is in the file, and that tokens are shown."""
    opened = pages(outputs)
    assert [page.partition("-train-")[0] for _, page in opened] == [*kinds]
    for html, page in opened:
        _, found, rest = html.partition(f'<section class="page" id="{page}">')
        assert found, f"{page} is in the file"
        assert ('class="tok' in rest.partition('<section class="page"')[0]) == page.startswith("page-tokens")


def pictures(outputs: list[Any]) -> list[bytes]:
    return [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]


@pytest.mark.stack
@needs("nbclient", "ipykernel")
def test_the_agent_of_the_notebook_learns_on_the_toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(tmp_path, monkeypatch, model=False)
    assert "held-out reward  0.000" in "".join(output.get("text", "") for output in outputs)
    (picture,) = pictures(outputs)
    assert picture.startswith(b"\x89PNG")
    check_pages(outputs, "page-group", "page-tokens")
    (run,) = (tmp_path / "runs").glob("*/summary.json")
    summary = json.loads(run.read_text())
    assert summary["val_reward_last"] > summary["val_reward_first"]
    assert summary["rollouts"]["failed"] == {}


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.timeout(1800)
@needs("nbclient", "ipykernel")
def test_the_notebook_shows_curves_groups_and_tokens_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = execute(tmp_path, monkeypatch, model=True)
    assert len(pictures(outputs)) == 2
    check_pages(outputs, *["page-group", "page-tokens"] * 2)
