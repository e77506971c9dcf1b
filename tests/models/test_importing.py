"""Peers' checkpoints: equal logits, every layout and wrapper, and errors that list keys."""

import re
import socket

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet50, resnet101, segmentation
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights, DeepLabV3_ResNet101_Weights

from seg_attn import import_weights
from seg_attn.errors import InputError
from seg_attn.models import DeepLabV3
from seg_attn.models.importing import detect_backbone, released_weights

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check_equal(ours, theirs, shape, images, error, logits=lambda output: output, tolerances=TOLERANCE):
    for dtype, tolerance in tolerances.items():
        x = images(*shape).to(dtype)
        with torch.no_grad():
            assert error(ours.to(dtype)(x), logits(theirs.to(dtype)(x))) <= tolerance
    ours.float()
    theirs.float()


# --- torchvision -----------------------------------------------------------------------------------------------------


def torchvision_model(name, randomise, aux=True, classes=21):
    build = getattr(segmentation, name)
    return randomise(build(weights=None, weights_backbone=None, aux_loss=aux, num_classes=classes))


def check_torchvision(name, sizes, randomise, images, error):
    theirs = torchvision_model(name, randomise)
    ours = import_weights(theirs.state_dict())
    assert (ours.output_stride, ours.aspp.rates, ours.config["separable"]) == (8, (12, 24, 36), False)
    for size in sizes:
        check_equal(ours, theirs, (1, 3, *size), images, error, lambda output: output["out"])
    x = images(1, 3, 65, 97)
    with torch.no_grad():
        logits, aux = ours.double().forward_with_aux(x)
        expected = theirs.double()(x)
        assert error(logits, expected["out"]) <= 1e-12
        assert error(aux, expected["aux"]) <= 1e-12


def test_torchvisions_resnet50(randomise, images, error):
    check_torchvision("deeplabv3_resnet50", [(129, 97)], randomise, images, error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_resnet101"])
def test_torchvisions_networks(name, randomise, images, error):
    check_torchvision(name, [(129, 97), (256, 256)], randomise, images, error)


def test_without_auxiliary_head_and_with_other_classes(randomise):
    theirs = torchvision_model("deeplabv3_resnet50", randomise, aux=False, classes=5)
    ours = import_weights(theirs.state_dict(), source="torchvision")
    assert (ours.num_classes, ours.aux_classifier, ours.training) == (5, None, False)
    assert ours.config["backbone"] == "resnet50"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


# --- SMP -------------------------------------------------------------------------------------------------------------


def smp_model(kind, randomise, encoder="resnet18", **options):
    return randomise(getattr(smp, kind)(encoder, encoder_weights=None, classes=7, **options))


def check_smp(kind, encoder, output_stride, sizes, randomise, images, error):
    theirs = smp_model(kind, randomise, encoder, encoder_output_stride=output_stride)
    ours = import_weights(theirs.state_dict(), output_stride=output_stride)
    assert (ours.output_stride, ours.aspp.rates) == (output_stride, (12, 24, 36))
    assert (ours.config["align_corners"], ours.config["contract_dilation"]) == (True, False)
    for size in sizes:
        # Gates and groups, on random weights, amplify float32's rounding; float64 shows that the function is the same.
        loose = {torch.float32: 1e-3, torch.float64: 1e-12}
        tolerances = TOLERANCE if encoder in ("resnet50", "resnet101") else loose
        check_equal(ours, theirs, (1, 3, *size), images, error, tolerances=tolerances)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("kind", "encoder"), [("DeepLabV3", "resnet50"), ("DeepLabV3Plus", "resnet50")])
def test_smps_networks(kind, encoder, output_stride, randomise, images, error):
    check_smp(kind, encoder, output_stride, [(128, 96)], randomise, images, error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("kind", ["DeepLabV3", "DeepLabV3Plus"])
@pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "se_resnet50", "se_resnext50_32x4d", "resnext50_32x4d"])
def test_smps_networks_on_many_encoders(encoder, kind, output_stride, randomise, images, error):
    sizes = [(128, 96), (256, 256)] if encoder == "resnet50" else [(128, 96)]
    check_smp(kind, encoder, output_stride, sizes, randomise, images, error)


@pytest.mark.parametrize(
    ("kind", "encoder", "options", "stride", "rates", "separable"),
    [
        ("DeepLabV3", "resnet18", {"decoder_aspp_separable": True}, None, None, "aspp"),
        ("DeepLabV3Plus", "resnet18", {"decoder_aspp_separable": False}, None, None, "decoder"),
        ("DeepLabV3Plus", "resnet18", {"decoder_channels": 64}, None, (3, 5, 7), True),
        ("DeepLabV3", "resnet18", {"in_channels": 4}, 8, (3, 5, 7), False),
        ("DeepLabV3Plus", "se_resnet50", {"in_channels": 1}, None, None, True),
        ("DeepLabV3", "resnext50_32x4d", {}, None, None, False),
    ],
)
def test_smps_options(kind, encoder, options, stride, rates, separable, randomise, images, error):
    theirs = smp_model(kind, randomise, encoder, decoder_atrous_rates=rates or (12, 24, 36), **options)
    ours = import_weights(theirs.state_dict(), "smp", output_stride=stride, atrous_rates=rates)
    assert ours.config["backbone"] == encoder
    assert ours.output_stride == (16 if kind == "DeepLabV3Plus" else 8)
    assert ours.aspp.rates == (rates or (12, 24, 36))
    assert ours.config["separable"] == separable
    check_equal(ours, theirs, (2, options.get("in_channels", 3), 64, 64), images, error)


def test_smps_old_decoder(randomise, images, error):
    theirs = smp_model("DeepLabV3", randomise)
    names = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    old = {}
    for key, value in theirs.state_dict().items():
        new = next((prefix for prefix in names if key.startswith(prefix)), "")
        old[names.get(new, "") + key.removeprefix(new)] = value
    assert "decoder.0.convs.4.1.weight" in old
    check_equal(import_weights(old), theirs, (1, 3, 64, 64), images, error)


def test_smps_lightning_checkpoint(randomise, images, error, tmp_path):
    """The state dict of SMP's own Lightning example: the network under `model.`, its normalisation beside it."""
    theirs = smp_model("DeepLabV3Plus", randomise)
    beside = {
        "mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        "std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
        "loss_fn.weight": torch.ones(7),
    }
    network = {f"model.{key}": value for key, value in theirs.state_dict().items()}
    path = tmp_path / "epoch=3.ckpt"
    torch.save({"epoch": 3, "state_dict": {**beside, **network}, "hyper_parameters": {"lr": 1e-3}}, path)
    said = (
        "left out of .*, beside the network under 'model.': "
        r"mean = \[0.485, 0.456, 0.406\], std = \[0.229, 0.224, 0.225\], loss_fn.weight$"
    )
    with pytest.warns(UserWarning, match=said):
        ours = import_weights(path)
    check_equal(ours, theirs, (1, 3, 64, 64), images, error)


def test_two_networks_in_one_file_are_not_guessed_between(randomise):
    state = smp_model("DeepLabV3", randomise).state_dict()
    twice = {f"{prefix}.{key}": value for prefix in ("model", "ema.module") for key, value in state.items()}
    with pytest.raises(
        InputError, match=r"holds 2 networks, under 'model.', 'ema.module.': pass the state dict of one"
    ):
        import_weights(twice)


def test_an_imported_model_moves_exactly(randomise, images, error):
    """Imported at 8, evaluated at 16: that is the subsampled network, where SMP's own at 16 is another."""
    theirs = torchvision_model("deeplabv3_resnet50", randomise, aux=False)
    ours = import_weights(theirs.state_dict()).double()
    x = images(1, 3, 65, 97)
    with torch.no_grad():
        dense = ours.backbone(x)[-1]
        ours.output_stride = 16
        assert ours.aspp.rates == (6, 12, 18)
        assert error(dense[..., ::2, ::2], ours.backbone(x)[-1]) <= 1e-12


# --- VainF: its layout by its keys, its network written here from its description ------------------------------------


class VainF(nn.Module):
    """DeepLabv3(+) on torchvision's dilated ResNet: rates 6, 12, 18 at stride 16 and 12, 24, 36 at 8, [low, high].

    Functional on purpose: it shares no module, and so no mistake, with the package; the tensors' names are VainF's.
    """

    def __init__(self, build, output_stride, plus, classes, separable=False):
        super().__init__()
        dilate = [False, output_stride == 8, True]
        self.backbone = build(weights=None, replace_stride_with_dilation=dilate)
        del self.backbone.fc, self.backbone.avgpool
        self.rates = (12, 24, 36) if output_stride == 8 else (6, 12, 18)
        self.plus, self.separable = plus, separable
        self.head = {}
        aspp = "classifier.aspp" if plus else "classifier.classifier.0"
        self.unit(f"{aspp}.convs.0", 2048, 256)
        for branch in (1, 2, 3):
            self.unit(f"{aspp}.convs.{branch}", 2048, 256, kernel=3)
        self.unit(f"{aspp}.convs.4", 2048, 256, first=1)
        self.unit(f"{aspp}.project", 5 * 256, 256)
        if plus:
            self.unit("classifier.project", 256, 48)
            self.unit("classifier.classifier", 304, 256, kernel=3)
            self.tensors("classifier.classifier.3", weight=(classes, 256, 1, 1), bias=(classes,))
        else:
            self.unit("classifier.classifier", 256, 256, kernel=3, first=1)
            self.tensors("classifier.classifier.4", weight=(classes, 256, 1, 1), bias=(classes,))

    def tensors(self, name, **shapes):
        for part, shape in shapes.items():
            self.head[f"{name}.{part}"] = torch.empty(shape)

    def unit(self, name, inputs, outputs, kernel=1, first=0):
        """Declare a convolution and the normalisation after it, at index `first` and the next of an nn.Sequential."""
        if kernel == 3 and self.separable:
            self.tensors(f"{name}.{first}.body.0", weight=(inputs, 1, 3, 3))
            self.tensors(f"{name}.{first}.body.1", weight=(outputs, inputs, 1, 1))
        else:
            self.tensors(f"{name}.{first}", weight=(outputs, inputs, kernel, kernel))
        parts = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (outputs,))
        self.tensors(f"{name}.{first + 1}", **parts, num_batches_tracked=())

    def state_dict(self):
        return {**{f"backbone.{key}": value for key, value in self.backbone.state_dict().items()}, **self.head}

    def apply_unit(self, name, x, dilation=1, first=0):
        get = {key: value.to(x.dtype) for key, value in self.head.items() if key.startswith(f"{name}.{first}")}
        if f"{name}.{first}.body.0.weight" in get:
            depthwise, pointwise = (get[f"{name}.{first}.body.{index}.weight"] for index in (0, 1))
            x = F.conv2d(x, depthwise, padding=dilation, dilation=dilation, groups=len(depthwise))
            x = F.conv2d(x, pointwise)
        else:
            kernel = get[f"{name}.{first}.weight"]
            x = F.conv2d(x, kernel, padding=dilation * (kernel.shape[-1] // 2), dilation=dilation)
        norm = [self.head[f"{name}.{first + 1}.{part}"].to(x.dtype) for part in ("running_mean", "running_var")]
        scale = [self.head[f"{name}.{first + 1}.{part}"].to(x.dtype) for part in ("weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, *scale))

    def forward(self, images):
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        low = net.layer1(x)
        x = net.layer4(net.layer3(net.layer2(low)))
        aspp = "classifier.aspp" if self.plus else "classifier.classifier.0"
        branches = [self.apply_unit(f"{aspp}.convs.0", x)]
        for index, rate in enumerate(self.rates, start=1):
            branches.append(self.apply_unit(f"{aspp}.convs.{index}", x, dilation=rate))
        pooled = self.apply_unit(f"{aspp}.convs.4", x.mean((2, 3), keepdim=True), first=1)
        branches.append(F.interpolate(pooled, size=x.shape[2:], mode="bilinear"))
        x = self.apply_unit(f"{aspp}.project", torch.cat(branches, 1))
        if self.plus:
            low = self.apply_unit("classifier.project", low)
            x = torch.cat([low, F.interpolate(x, size=low.shape[2:], mode="bilinear")], 1)
        x = self.apply_unit("classifier.classifier", x, first=0 if self.plus else 1)
        last = "classifier.classifier.3" if self.plus else "classifier.classifier.4"
        x = F.conv2d(x, *(self.head[f"{last}.{part}"].to(x.dtype) for part in ("weight", "bias")))
        return F.interpolate(x, size=images.shape[2:], mode="bilinear")


# Every key of VainF's heads and its tensor's shape, for 21 classes on a bottleneck ResNet; `norm` is a normalisation.
VAINF_ASPP = {
    "convs.0.0.weight": (256, 2048, 1, 1),
    "convs.0.1": "norm",
    "convs.1.0.weight": (256, 2048, 3, 3),
    "convs.1.1": "norm",
    "convs.2.0.weight": (256, 2048, 3, 3),
    "convs.2.1": "norm",
    "convs.3.0.weight": (256, 2048, 3, 3),
    "convs.3.1": "norm",
    "convs.4.1.weight": (256, 2048, 1, 1),
    "convs.4.2": "norm",
    "project.0.weight": (256, 1280, 1, 1),
    "project.1": "norm",
}
VAINF_V3 = {
    **{f"classifier.classifier.0.{key}": value for key, value in VAINF_ASPP.items()},
    "classifier.classifier.1.weight": (256, 256, 3, 3),
    "classifier.classifier.2": "norm",
    "classifier.classifier.4.weight": (21, 256, 1, 1),
    "classifier.classifier.4.bias": (21,),
}
VAINF_V3_PLUS = {
    "classifier.project.0.weight": (48, 256, 1, 1),
    "classifier.project.1": "norm",
    **{f"classifier.aspp.{key}": value for key, value in VAINF_ASPP.items()},
    "classifier.classifier.0.weight": (256, 304, 3, 3),
    "classifier.classifier.1": "norm",
    "classifier.classifier.3.weight": (21, 256, 1, 1),
    "classifier.classifier.3.bias": (21,),
}


def written_out(layout, separable=False):
    """Shapes by full key: normalisations unfolded, and separable 3x3s as their two kernels."""
    shapes = {}
    for key, shape in layout.items():
        if shape == "norm":
            width = layout.get(re.sub(r"\d+$", lambda index: f"{int(index.group()) - 1}", key) + ".weight")[0]
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{key}.{part}"] = (width,)
            shapes[f"{key}.num_batches_tracked"] = ()
        elif separable and shape[2:] == (3, 3):
            shapes[key.replace("weight", "body.0.weight")] = (shape[1], 1, 3, 3)
            shapes[key.replace("weight", "body.1.weight")] = (shape[0], shape[1], 1, 1)
        else:
            shapes[key] = shape
    return shapes


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize(("plus", "layout"), [(False, VAINF_V3), (True, VAINF_V3_PLUS)])
def test_vainfs_layouts_are_read_by_key_and_shape(plus, layout, separable):
    trunk = {f"backbone.{key}": value for key, value in resnet50(weights=None).state_dict().items() if "fc." not in key}
    generator = torch.Generator().manual_seed(0)
    head = {key: torch.rand(shape, generator=generator) for key, shape in written_out(layout, separable).items()}
    ours = import_weights({**trunk, **head}, source="vainf")
    assert (ours.output_stride, ours.aspp.rates, ours.config["align_corners"]) == (16, (6, 12, 18), False)
    assert (ours.config["separable"], ours.config["contract_dilation"]) == (separable, True)
    assert ours.skip_stages == (["layer1"] if plus else [])
    placed = [value for key, value in ours.state_dict().items() if not key.startswith("backbone.")]
    assert len(placed) == len(head)
    # Nothing was dropped, made up or put where another tensor belongs: [low, high] is our order too.
    if plus:
        index = 0 if separable else slice(None)
        first = ours.decoder.skips[0].refine[0]
        expected = head["classifier.classifier.0.body.0.weight" if separable else "classifier.classifier.0.weight"]
        assert torch.equal((first[index] if separable else first).weight, expected)
        assert torch.equal(ours.decoder.skips[0].project[0].weight, head["classifier.project.0.weight"])
    else:
        assert torch.equal(ours.decoder.refine[1].running_var, head["classifier.classifier.2.running_var"])
    # The network that is written here has the same keys and shapes.
    own = VainF(resnet50, 16, plus, 21, separable).state_dict()
    assert {key: tuple(value.shape) for key, value in own.items() if not key.startswith("backbone.")} == written_out(
        layout, separable
    )


def check_vainf(build, output_stride, plus, separable, size, randomise, images, error):
    theirs = randomise(VainF(build, output_stride, plus, 5, separable))
    ours = import_weights(theirs.state_dict(), output_stride=output_stride)
    assert ours.config["backbone"] == build.__name__
    assert ours.aspp.rates == theirs.rates
    check_equal(ours, theirs, (1, 3, *size), images, error)


@pytest.mark.parametrize(
    ("output_stride", "plus", "separable"), [(16, False, False), (8, True, True), (16, True, False)]
)
def test_vainfs_networks(output_stride, plus, separable, randomise, images, error):
    check_vainf(resnet50, output_stride, plus, separable, (65, 97), randomise, images, error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("build", [resnet50, resnet101])
def test_every_vainf_network(build, output_stride, plus, separable, randomise, images, error):
    check_vainf(build, output_stride, plus, separable, (129, 97), randomise, images, error)


def test_vainfs_checkpoint_file(randomise, images, error, tmp_path):
    """As its training script writes it: numbers, optimizer and scheduler beside the weights, a NumPy best score."""
    theirs = randomise(VainF(resnet50, 16, True, 21))
    checkpoint = {
        "cur_itrs": 30000,
        "model_state": {f"module.{key}": value for key, value in theirs.state_dict().items()},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.01}]},
        "scheduler_state": {"max_iters": 30000, "power": 0.9, "base_lrs": [0.001, 0.01], "last_epoch": 30000},
        "best_score": np.float64(0.7714),
    }
    torch.save(checkpoint, tmp_path / "best_deeplabv3plus_resnet50_voc_os16.pth")
    ours = import_weights(tmp_path / "best_deeplabv3plus_resnet50_voc_os16.pth")
    check_equal(ours, theirs, (1, 3, 33, 49), images, error)


def test_vainfs_mobilenet_is_refused():
    trunk = {
        "backbone.low_level_features.0.0.weight": torch.ones(32, 3, 3, 3),
        "backbone.high_level_features.4.conv.0.weight": torch.ones(144, 1, 3, 3),
    }
    head = {key: torch.ones(shape) for key, shape in written_out(VAINF_V3_PLUS).items()}
    with pytest.raises(
        InputError, match=r"the backbone of the given state dict is none of resnet18, .*: its first keys are"
    ):
        import_weights({**trunk, **head})


# --- released weights ------------------------------------------------------------------------------------------------

RELEASED_50 = "DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"


@pytest.mark.parametrize("name", [RELEASED_50, "deeplabv3_resnet50", "deeplabv3_resnet50_coco-cd0a2569.pth"])
def test_released_weights_are_found_in_the_hub_cache(name, randomise, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", None)  # whoever connects fails
    assert DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.url.endswith("/deeplabv3_resnet50_coco-cd0a2569.pth")
    state = torchvision_model("deeplabv3_resnet50", randomise).state_dict()
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(state, checkpoints / "deeplabv3_resnet50_coco-cd0a2569.pth")
    ours = import_weights(name)
    assert (ours.num_classes, ours.aux_classifier is not None) == (21, True)
    assert torch.equal(ours.classifier.weight, state["classifier.4.weight"])
    assert torch.equal(ours.aux_classifier[2].bias, state["aux_classifier.4.bias"])


def test_names_of_released_weights():
    first, second = DeepLabV3_ResNet50_Weights.DEFAULT, DeepLabV3_ResNet101_Weights.DEFAULT
    assert released_weights("DeepLabV3_ResNet50_Weights.DEFAULT") is released_weights(str(first)) is first
    assert released_weights("deeplabv3_resnet101") is second
    assert released_weights("deeplabv3_resnet101_coco-586e9e4e.pth") is second
    assert released_weights("deeplabv3_mobilenet_v3_large") is None
    assert released_weights("resnet50") is None


def test_released_weights_offline_in_one_line(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise OSError("the network is off")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(InputError) as raised:
        import_weights("deeplabv3_resnet101")
    said = str(raised.value)
    assert said.startswith(
        "DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1 is not in torchvision's hub cache and can"
    )
    assert said.endswith(f"put deeplabv3_resnet101_coco-586e9e4e.pth into {tmp_path / 'hub' / 'checkpoints'}")
    assert "\n" not in said
    assert capfd.readouterr() == ("", "")


# --- plain ResNets and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_a_plain_resnet_gives_a_backbone_and_says_so(prefix, randomise, images, tmp_path):
    theirs = randomise(resnet18(weights=None))
    torch.save({f"{prefix}{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "resnet18.pth")
    with pytest.warns(UserWarning, match="holds a backbone only: ASPP, decoder and classifier start at random"):
        ours = import_weights(tmp_path / "resnet18.pth", output_stride=32)
    assert (ours.config["backbone"], ours.output_stride, ours.aspp.rates) == ("resnet18", 32, (3, 6, 9))
    x = images(1, 3, 65, 97).float()
    with torch.no_grad():
        ours.backbone.multi_grid = None
        ours.output_stride = 32
        expected = theirs.layer1(theirs.maxpool(theirs.bn1(theirs.conv1(x)).relu()))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(expected)))
        assert torch.equal(ours.backbone(x)[-1], expected)


def test_half_precision_and_safetensors(randomise, tmp_path):
    theirs = smp_model("DeepLabV3", randomise)
    state = {key: value.half() if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    ours = import_weights(tmp_path / "model.safetensors")
    assert ours.classifier.weight.dtype == torch.float32
    assert torch.equal(ours.classifier.weight, state["segmentation_head.0.weight"].float())


def test_the_given_state_dict_is_left_alone_and_not_shared(randomise):
    theirs = smp_model("DeepLabV3Plus", randomise)
    state = theirs.state_dict()
    keys, kernel = list(state), state["decoder.block2.0.1.weight"].clone()
    ours = import_weights(state)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert list(state) == keys
    assert torch.equal(state["decoder.block2.0.1.weight"], kernel)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smp_state():
    torch.manual_seed(0)
    return smp.DeepLabV3("resnet18", encoder_weights=None, classes=7).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.bn.bias"), "do not fit the model: 1 missing: decoder.refine.1.bias"),
        (lambda s: s.update({"decoder.extra": torch.ones(1)}), "and nothing else: unexpected decoder.extra$"),
        (lambda s: s.update({"classification_head.3.bias": torch.ones(2)}), "unexpected classification_head.3.bias"),
        (lambda s: s.pop("segmentation_head.0.weight"), "is not a whole DeepLabv3 of smp: its classifier is missing"),
        (
            lambda s: s.pop("encoder.layer3.0.bn2.weight"),
            "is nearly resnet18, but not quite: 1 missing: layer3.0.bn2.weight",
        ),
        (
            lambda s: s.update({"encoder.layer3.0.conv1.weight": torch.ones(1, 1, 3, 3)}),
            r"nearly resnet18, .*: 1 of another shape: layer3.0.conv1.weight \(1, 1, 3, 3\) instead of \(256, 128,",
        ),
        (
            lambda s: s.update({"encoder.conv1.bias": torch.ones(64)}),
            "nearly resnet18, but not quite: 1 unexpected: conv1.bias",
        ),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.layer")], "the backbone of .* is none of"),
        (
            lambda s: s.update({"decoder.conv.weight": torch.ones(256, 256, 1, 1)}),
            r"1 of another shape: decoder.refine.0.weight \(256, 256, 1, 1\) instead of \(256, 256, 3, 3\)",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if ".convs.3." in k],
            "has 2 atrous branches: atrous_rates must name 2 rates",
        ),
    ],
)
def test_what_does_not_fit_is_listed(change, message, smp_state):
    state = dict(smp_state)
    change(state)
    with pytest.raises(InputError, match=message) as raised:
        import_weights(state)
    assert "\n" not in str(raised.value)


def test_wrong_sources_and_other_networks(smp_state):
    with pytest.raises(InputError, match="has the keys of smp, not of torchvision: take source='smp'"):
        import_weights(smp_state, source="torchvision")
    with pytest.raises(ValueError, match="source must be one of auto, torchvision, smp, vainf, got 'mmseg'"):
        import_weights(smp_state, source="mmseg")
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        import_weights(smp_state, output_stride=4)
    with pytest.raises(ValueError, match="atrous_rates must be an integer of at least 1, got 0"):
        import_weights(smp_state, atrous_rates=(0, 1, 2))
    with pytest.raises(InputError, match="has 3 atrous branches: atrous_rates must name 3 rates"):
        import_weights(smp_state, atrous_rates=(6, 12))
    with pytest.raises(InputError, match="is one of our own models: it needs no import"):
        import_weights({f"model.{key}": value for key, value in DeepLabV3("resnet18").state_dict().items()})
    unet = smp.Unet("resnet18", encoder_weights=None).state_dict()
    with pytest.raises(InputError, match=r"has neither the keys of a DeepLabv3 .* first keys are encoder.conv1.weight"):
        import_weights(unet)
    fcn = segmentation.fcn_resnet50(weights=None, weights_backbone=None).state_dict()
    with pytest.raises(InputError, match=r"neither the keys of a DeepLabv3 or v3\+ \(of torchvision, smp, vainf\) nor"):
        import_weights(fcn)


def test_files_that_are_not_there():
    with pytest.raises(InputError, match=r"no such file: deeplabv3_resnet34 .*deeplabv3_resnet101, deeplabv3_resnet50"):
        import_weights("deeplabv3_resnet34")


def test_backbones_are_told_apart_by_their_tensors():
    for name in ("resnet34", "wide_resnet50_2", "se_resnext50_32x4d"):
        with torch.device("meta"):
            state = DeepLabV3(name, in_channels=5).backbone.state_dict()
        assert detect_backbone(state, "w") == name
