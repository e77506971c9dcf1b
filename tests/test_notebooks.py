import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from seg_attn import DeepLabV3
from seg_attn.checkpoint import DataInfo, save_model

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def _execute(name, folder, **parameters):
    """Run a notebook in a folder with other values in its cell of parameters; return the executed notebook."""
    [path] = [path for path in NOTEBOOKS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    [index] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    unknown = [key for key in parameters if f"\n{key} = " not in f"\n{notebook.cells[index].source}"]
    assert not unknown, "a parameter that the notebook does not have"
    settings = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(settings))
    return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


def _outputs(notebook, kind):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def _text(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # what Jupyter otherwise warns about
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


def test_there_are_notebooks():
    names = ["attention_tour", "channel_attention_cnn", "compare_output_stride", "quickstart"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    nbformat.validate(nbformat.read(path, as_version=4))


def test_attention_tour(tmp_path):
    scenes = {"train": 6, "val": 3, "size": (96, 72)}
    notebook = _execute("attention_tour", tmp_path, SCENES=scenes, CROP=64, EPOCHS=1, REPEATS=0)
    said = _text(notebook)
    assert "every value lies between its inputs: True" in said
    assert "starts as the addition, to the bit: True" in said
    assert "mIoU " in said
    # Kernel regression, then stages, fusion, spatial, self-attention, channels, branches and layer1.
    assert len(_outputs(notebook, "image/png")) == 8
    tables = _outputs(notebook, "text/markdown")
    assert "| `eca` | ECA | 5 |" in tables[0]
    assert "| `iaff` | `residual_fusion` |" in tables[1]
    assert "| `decoder.skips.0.fusion.gate` | fusion | 1 × 64 × 18 × 24 |" in tables[2]
    assert "{64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}" in _outputs(notebook, "text/plain")
    assert (tmp_path / "runs/attention_tour/fit/version_0/metrics.csv").exists()


@pytest.mark.exhaustive
def test_attention_tour_of_a_checkpoint(tmp_path):
    model = DeepLabV3("resnet18", num_classes=3, decoder_channels=8, attention={"aspp": "cbam"})
    save_model(tmp_path / "cbam.ckpt", model, DataInfo.default(3))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    settings = {"CHECKPOINT": "cbam.ckpt", "IMAGE": "photograph.png", "REPEATS": 0}
    notebook = _execute("attention_tour", tmp_path, **settings)
    assert len(_outputs(notebook, "image/png")) == 6  # kernel regression, stages, fusion, spatial, channels, layer1
    assert "| `aspp_attention.spatial.gate` | spatial | 1 × 1 × 3 × 4 |" in _outputs(notebook, "text/markdown")[2]
    assert not (tmp_path / "runs").exists()


SMALL = {"SCENES": {"train": 8, "val": 3, "size": (96, 72)}, "CROP": 64, "EPOCHS": 1, "PRECISION": "32-true"}


def test_quickstart(tmp_path):
    notebook = _execute("quickstart", tmp_path, **SMALL)
    said = _text(notebook)
    assert "background, fish, butterfly" in said
    assert "best checkpoint: " in said
    # The table's mean is that of the checkpoint that was kept.
    best, tested = (re.search(pattern, said)[1] for pattern in (r"mIoU ([\d.]+) %", r"mean IoU +([\d.]+)"))
    assert float(best) == pytest.approx(float(tested), abs=0.06)
    assert len(_outputs(notebook, "image/png")) == 2


def test_compare_output_stride(tmp_path):
    notebook = _execute("compare_output_stride", tmp_path, **SMALL)
    said = _text(notebook)
    assert "16: layer4 has dilations (2, 4, 8), (32, 64, 128) px; ASPP has rates (6, 12, 18)" in said
    assert " 8: layer4 has dilations (4, 8, 16), (32, 64, 128) px; ASPP has rates (12, 24, 36)" in said
    assert said.count("for this checkpoint, on these 3 images") == 2
    [table] = _outputs(notebook, "text/markdown")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["16", "8", "32"]
    # Taps, paths, accuracy and cost, disagreement.
    assert len(_outputs(notebook, "image/png")) == 4


def test_channel_attention_cnn(tmp_path):
    notebook = _execute("channel_attention_cnn", tmp_path, EPOCHS=2, SEEDS=(0, 1))
    [table] = _outputs(notebook, "text/markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [(row[0], row[2], row[3]) for row in rows] == [("none", "2", "24,058"), ("se", "2", "24,730")]
    assert all(float(row[1].split(" ± ")[0]) > 70 for row in rows)
    assert len(_outputs(notebook, "image/png")) == 1
    logs = sorted(path.parent.name for path in tmp_path.glob("runs/channel_attention_cnn/digits/*/metrics.csv"))
    assert logs == ["none_seed0", "none_seed1", "se_seed0", "se_seed1"]
