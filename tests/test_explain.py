import argparse
import io

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from seg_attn import DeepLabV3, Predictor, training
from seg_attn.checkpoint import DataInfo, save_model
from seg_attn.commands import explain as command
from seg_attn.data.images import normalize
from seg_attn.data.sample import SAMPLE_CLASSES, write_sample
from seg_attn.errors import InputError
from seg_attn.explain import (
    Explainer,
    Scene,
    draw,
    draw_branches,
    draw_channels,
    draw_features,
    draw_fusion,
    draw_residual_fusion,
    draw_rows,
    draw_spatial,
    draw_stages,
    figure_png,
)
from seg_attn.recording import AttentionRow, GateRecord, Recording

SMALL = {"backbone": "resnet18", "num_classes": 3, "decoder_channels": 8, "atrous_rates": [1, 2, 3]}
NAMES = ["ground", "left", "right"]


def _scene(height=40, width=60):
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 2 :] = 2
    return Scene(image, mask, NAMES, [[0, 0, 0], [128, 0, 0], [0, 128, 0]])


def _halves(left, right, channels=1, size=(4, 6)):
    """A map (1, C, H, W) of one value on the left and another on the right."""
    weights = torch.full((1, channels, *size), float(left))
    weights[..., size[1] // 2 :] = float(right)
    return weights


def _gate(kind, weights, name="decoder.skips.0.fusion.gate", block="AFF", **kwargs):
    return GateRecord(name, kind, block, weights, **kwargs)


def _caption(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def _panel(figure, index):
    """The picture in a panel, as brightness (H, W)."""
    return np.asarray(figure.axes[index].images[0].get_array(), dtype=float).mean(-1)


def _left_and_right(picture):
    width = picture.shape[1]
    return picture[:, : width // 4].mean(), picture[:, -(width // 4) :].mean()


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    attention = {"layer1": "sk", "layer2": ["cbam", "self"], "layer3": "ms_cam", "aspp": {"name": "se"}}
    model = DeepLabV3(**SMALL, attention=attention, residual_fusion="aff", image_pooling="attention")
    return Predictor(model, DataInfo.default(3, NAMES), device="cpu")


@pytest.fixture(scope="module")
def photograph():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_every_mechanism_has_its_picture(predictor, photograph):
    figures = Explainer(predictor).figures(photograph)
    mechanisms = ["stages", "fusion", "residual_fusion", "spatial", "self_attention", "channels", "branches"]
    stages = ["layer1", "layer2", "layer3", "layer4", "aspp", "decoder"]
    assert list(figures) == [*mechanisms, *(f"features_{stage}" for stage in stages)]
    for name, figure in figures.items():
        assert ("bar" if name in ("channels", "branches") else "Bright:") in _caption(figure), name
        picture = np.asarray(Image.open(io.BytesIO(figure_png(figure))).convert("RGB"))
        assert picture.std() > 10, name
        assert (picture[:4] > 250).all(), f"{name}: something is cut off at the top"
        assert (picture[-2:] > 250).all(), f"{name}: the caption is cut off at the bottom"


def test_the_recording_is_that_of_the_prediction(predictor, photograph):
    scene, recording = Explainer(predictor).record(photograph)
    assert np.array_equal(scene.mask, predictor(photograph))
    images = normalize(photograph, predictor.data.mean, predictor.data.std)[None]
    with torch.inference_mode():
        stages = predictor.model.backbone(images)
    assert torch.equal(recording.features["layer4"], stages[-1])


@pytest.mark.parametrize(("point", "position"), [(None, (3, 4)), ((0, 0), (0, 0)), ((63, 47), (5, 7))])
def test_the_point_is_in_pixels_of_the_image(predictor, photograph, point, position):
    _, recording = Explainer(predictor).record(photograph, point)
    row = recording.rows["backbone.attention.layer2.1"]
    assert row.weights.shape[-2:] == (6, 8)
    assert (row.row, row.column) == position


@pytest.mark.parametrize("point", [(64, 0), (0, 48), (-1, 5)])
def test_a_point_outside_is_said(predictor, photograph, point):
    with pytest.raises(InputError, match=r"lies outside the image: x must be 0 to 63 and y 0 to 47"):
        Explainer(predictor).record(photograph, point)


def test_a_plain_network_has_its_stages_and_nothing_else(photograph):
    model = DeepLabV3(**SMALL, fusion="add")
    figures = Explainer(Predictor(model, DataInfo.default(3), device="cpu")).figures(photograph)
    stages = ["layer1", "layer2", "layer3", "layer4", "aspp", "decoder"]
    assert list(figures) == ["stages", *(f"features_{stage}" for stage in stages)]


def test_fusion_is_bright_where_its_input_weighs_more():
    weights = torch.cat([_halves(0.9, 0.3), _halves(0.8, 0.4)], dim=1)
    figure = draw_fusion(_scene(), [_gate("fusion", weights)])
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles == [
        "AFF at decoder.skips.0",
        "weight of the low-level map",
        "weight of the high-level map",
        "channels in favour of the low-level map",
    ]
    low, high, share = (_left_and_right(_panel(figure, index)) for index in (1, 2, 3))
    assert low[0] > 2 * low[1]
    assert high[1] > 2 * high[0]
    assert share[0] > 2 * share[1]
    low_scale, high_scale, share_scale = (ax.child_axes[0].get_ylim() for ax in figure.axes[1:4])
    assert low_scale == pytest.approx((0.35, 0.85))
    assert high_scale == pytest.approx((0.15, 0.65))
    assert share_scale == pytest.approx((0, 1))


def test_both_passes_of_iaff_are_told_apart():
    gates = [
        _gate("fusion", _halves(0.6, 0.4), f"decoder.skips.1.fusion.{name}", "IterativeAFF")
        for name in ("gate", "gate2")
    ]
    figure = draw_fusion(_scene(), gates)
    titles = [ax.get_title() for ax in figure.axes[:8]]
    assert titles[0] == "IterativeAFF at decoder.skips.1"
    assert titles[4] == "IterativeAFF at decoder.skips.1, second pass"


def test_fusions_of_other_models_number_their_inputs():
    figure = draw_fusion(_scene(), [_gate("fusion", _halves(0.6, 0.4), "neck.fusion.gate")])
    assert figure.axes[1].get_title() == "weight of the first input"


def test_residual_fusion_has_a_panel_per_block():
    gates = [_gate("fusion", _halves(0.6, 0.4), f"backbone.layer1.{index}.fusion.gate") for index in range(5)]
    figure = draw_residual_fusion(_scene(), gates)
    assert [ax.get_title() for ax in figure.axes[:5]] == [f"AFF at layer1.{index}" for index in range(5)]
    left, right = _left_and_right(_panel(figure, 4))
    assert left > 2 * right


def test_spatial_gates_are_bright_where_features_are_kept():
    cbam = _gate("spatial", _halves(0.9, 0.1), "backbone.attention.layer2.spatial.gate", "CBAM")
    pool = _gate("spatial", _halves(0.02, 0.06), "aspp.branches.4.0.gate", "AttentionPool2d", over_positions=True)
    figure = draw_spatial(_scene(), [cbam, pool])
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        "photograph",
        "CBAM at layer2",
        "AttentionPool2d at aspp.branches.4.0",
    ]
    left, right = _left_and_right(_panel(figure, 1))
    assert left > 2 * right
    # Shares are shown as multiples of an average's: 24 positions.
    assert figure.axes[2].child_axes[0].get_ylim() == pytest.approx((24 * 0.02, 24 * 0.06))
    assert "Attention pooling:" in _caption(figure)
    assert "Attention pooling:" not in _caption(draw_spatial(_scene(), [cbam]))


def test_self_attention_marks_the_position_and_shows_where_it_looks():
    weights = torch.zeros(1, 2, 4, 6)
    weights[0, 0, :, :3] = 1 / 12
    weights[0, 1, :, 3:] = 1 / 12
    row = AttentionRow("aspp_attention", weights, row=3, column=0, gamma=0.5)
    figure = draw_rows(_scene(), [row])
    assert [ax.get_title() for ax in figure.axes[1:3]] == [
        "SelfAttention at aspp, head 1",
        "SelfAttention at aspp, head 2",
    ]
    assert _left_and_right(_panel(figure, 1))[0] > 2 * _left_and_right(_panel(figure, 1))[1]
    assert _left_and_right(_panel(figure, 2))[1] > 2 * _left_and_right(_panel(figure, 2))[0]
    for ax in figure.axes[:3]:
        x, y = ax.lines[0].get_data()
        assert (float(x[0]), float(y[0])) == pytest.approx((4.5, 34.5))  # the middle of the cell, 10 pixels a cell
    assert "γ is 0.5 at aspp" in _caption(figure)
    assert "no effect" not in _caption(figure)


def test_self_attention_without_effect_is_said():
    row = AttentionRow("aspp_attention", torch.full((1, 1, 2, 2), 0.25), 0, 0, gamma=0.0, strength=0.0)
    caption = _caption(draw_rows(_scene(), [row]))
    assert "Where γ is 0 the attention has no effect on the result." in caption
    assert "α is 0 in aspp; at 0 they have no effect" in caption


def test_bars_are_the_strongest_and_the_weakest_channels():
    values = torch.linspace(0.2, 0.8, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    figure = draw_channels([_gate("channel", values.view(1, 40, 1, 1), "aspp_attention.gate", "SqueezeExcite")])
    ax = figure.axes[0]
    order = values.argsort(descending=True).tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(c) for c in order[:12] + order[-4:]]
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert tops == pytest.approx([values[c].item() for c in order[:12] + order[-4:]])
    assert [bar.get_y() for bar in ax.patches] == pytest.approx([0.5] * 16)
    assert ax.get_title().startswith("SqueezeExcite at aspp\n40 channels, 0.200 to 0.800, mean 0.500")


def test_branches_share_out_all_of_a_channel():
    weights = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.5, 0.8]]).view(1, 2, 3, 1, 1)
    figure = draw_branches([_gate("branch", weights, "backbone.attention.layer1.gate", "SelectiveKernel")])
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["mean", "0", "2", "1"]
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, 4)
    assert heights[0] == pytest.approx([1.6 / 3, 0.9, 0.2, 0.5])
    assert heights.sum(0) == pytest.approx(np.ones(4))


def test_stages_show_photograph_prediction_and_channel_means():
    maps = torch.cat([_halves(3, 0), _halves(1, 0)], dim=1)
    figure = draw_stages(_scene(), {"layer1": maps})
    assert [ax.get_title() for ax in figure.axes[:3]] == ["photograph", "prediction", "layer1 (2 × 4 × 6)"]
    assert figure.axes[2].child_axes[0].get_ylim() == pytest.approx((0, 2))
    left, right = _left_and_right(_panel(figure, 2))
    assert left > 2 * right
    named = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert named == ["ground (not coloured)", "right"]
    right_half = np.asarray(figure.axes[1].images[0].get_array())[20, 45]
    assert right_half.tolist() == [64, 128, 64]  # half grey, half the class's green


def test_grids_order_channels_by_how_much_they_vary():
    maps = torch.zeros(1, 3, 4, 6)
    maps[0, 0] = 7.0  # constant
    maps[:, 2] = _halves(0, 5)[:, 0]
    maps[:, 1] = _halves(1, 0)[:, 0]
    figure = draw_features("layer1", maps)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["2", "1", "0"]
    mosaic = np.asarray(ax.images[0].get_array(), dtype=float)
    first, second, third = (mosaic[-4:, left : left + 6] for left in (0, 7, 14))
    assert first[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert second[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert third == pytest.approx(np.full((4, 6), 0.5))
    assert "3 of 3 channels" in _caption(figure)


@pytest.mark.parametrize("size", [(1000, 700), (30, 2000), (1, 1)])
def test_photographs_of_any_size(size):
    scene = _scene(*size)
    recording = Recording(features={"layer1": torch.rand(1, 40, 1, 1)})
    recording.gates["gate"] = _gate("spatial", torch.full((1, 1, 1, 1), 0.5), "gate", "CBAM")
    figures = draw(scene, recording)
    for figure in figures.values():
        width, height = Image.open(io.BytesIO(figure_png(figure))).size
        assert width < 3000
        assert height < 3000
    assert max(scene.thumbnail.shape[:2]) == min(640, max(size))


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("explain") / "small.ckpt"
    model = DeepLabV3(**SMALL, attention={"layer4": "cbam"})
    save_model(path, model, DataInfo.default(3, NAMES))
    return path


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def _photograph(path, seed=0, size=(32, 48)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def test_the_command_writes_one_file_per_picture(trained, tmp_path, capsys):
    image, output = _photograph(tmp_path / "street.png"), tmp_path / "out" / "deep"
    arguments = ("--ckpt_path", trained, "--input", image, "--output", output, "--device", "cpu")
    assert _run(*arguments, "--output_stride", 8, "--point", 3, 5) == 0
    stages = ["layer1", "layer2", "layer3", "layer4", "aspp", "decoder"]
    pictures = ["stages", "fusion", "spatial", "channels", *(f"features_{stage}" for stage in stages)]
    assert {path.name for path in output.iterdir()} == {f"street_{name}.png" for name in pictures}
    said = capsys.readouterr().out
    assert "street_fusion.png" in said
    assert "1 of 1 images explained" in said


def test_the_command_goes_on_after_a_broken_image(trained, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    _photograph(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    small = _photograph(folder / "small.png", size=(8, 8))
    arguments = ("--ckpt_path", trained, "--input", folder, "--output", tmp_path / "out", "--device", "cpu")
    assert _run(*arguments, "--point", 20, 20) == 1
    said = capsys.readouterr()
    assert f"{folder / 'bad.png'}: not a readable image" in said.err
    assert f"--point 20 20 lies outside {small}: x must be 0 to 7 and y 0 to 7" in said.err
    assert "1 of 3 images explained" in said.out
    assert {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()} == {"good"}


def test_wrong_input_is_said_in_a_line(trained, tmp_path):
    image = _photograph(tmp_path / "a.png")
    twin = _photograph(tmp_path / "a.jpg")
    arguments = ("--ckpt_path", trained, "--output", tmp_path / "out", "--device", "cpu", "--input")
    with pytest.raises(InputError, match=r"a\.png and .*a\.jpg would write the same pictures"):
        _run(*arguments, image, twin)
    with pytest.raises(InputError, match=r"lies outside .*a\.png"):
        _run(*arguments, image, "--point", 48, 0)
    with pytest.raises(InputError, match="is a file: name a folder"):
        _run("--ckpt_path", trained, "--output", image, "--input", image)
    with pytest.raises(InputError, match=r"no\.ckpt"):
        _run("--ckpt_path", tmp_path / "no.ckpt", "--output", tmp_path / "out", "--input", image)


@pytest.mark.exhaustive
def test_the_fusion_map_of_a_trained_network_is_not_constant(tmp_path):
    root = tmp_path / "data"
    write_sample(root, train=32, val=4)
    config = {
        "model": {
            "num_classes": len(SAMPLE_CLASSES),
            **{name: value for name, value in SMALL.items() if name != "num_classes"},
            "decoder_channels": 32,
            "attention": {"layer3": "cbam", "aspp": ["se", "self"]},
            "lr": 0.05,
            "backbone_lr_multiplier": 1.0,
        },
        "data": {
            "class_path": "VOCDataModule",
            "init_args": {"root": str(root), "batch_size": 4, "num_workers": 0, "crop_size": 96},
        },
        "trainer": {"max_epochs": 6, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    training.run(["fit", "--config", str(tmp_path / "config.yaml")])
    [best] = tmp_path.glob("fit/version_0/checkpoints/best.ckpt")
    image = sorted((root / "VOCdevkit/VOC2012/JPEGImages").glob("*val*"))[0]
    _, recording = Explainer(Predictor.from_checkpoint(best, device="cpu")).record(image)
    [gate] = recording.of_kind("fusion")
    low_level = gate.position_map()[0]
    assert low_level.std() > 0.005  # 0.0 for a gate that has learned nothing from places
    assert low_level.max() - low_level.min() > 0.03
    assert recording.rows["aspp_attention.1"].gamma != 0.0
    assert _run("--ckpt_path", best, "--input", image, "--output", tmp_path / "out", "--device", "cpu") == 0
    assert len(list((tmp_path / "out").iterdir())) == 11
