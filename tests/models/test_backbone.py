"""The atrous backbones: the peers' networks to the bit, the subsampling identity, where attention and fusion stand."""

import itertools
from functools import partial

import pytest
import torch
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn
from torchvision.models import get_model, list_models

from seg_attn.attention import build_attention
from seg_attn.fusion import build_fusion
from seg_attn.models import backbone as backbone_module
from seg_attn.models.backbone import BACKBONES, AtrousBackbone, check_backbone
from seg_attn.models.pretrained import plain_state_dict
from seg_attn.norm import BatchNorm2d

TORCHVISION = [name for name in BACKBONES if name in list_models()]
# Together these hold every kind of block but SENet-154's, which has no small network.
BLOCK_TYPES = ("resnet18", "resnet50", "se_resnet50", "se_resnext50_32x4d")
GIANTS = ("resnext101_32x16d", "resnext101_32x32d", "resnext101_32x48d")
SENET_BLOCKS = "senet14"


def convolutions(module):
    """Stride, padding and (of a kernel that has one) dilation of every convolution, by name."""
    return {
        name: (conv.stride, conv.padding, conv.dilation if conv.kernel_size > (1, 1) else (1, 1), conv.groups)
        for name, conv in module.named_modules()
        if isinstance(conv, nn.Conv2d)
    }


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


def without_gates(backbone):
    """Fix SE's gates at 1: they pool over positions, and another grid has other means."""
    for module in backbone.modules():
        if hasattr(module, "se_module"):
            module.se_module = nn.Identity()
    return backbone


@pytest.fixture
def senet_blocks(monkeypatch):
    """A network of SENet-154's blocks (3x3 shortcuts, three 3x3 in the stem), short enough to run."""
    entry = smp_encoders["senet154"]
    small = {"encoder": entry["encoder"], "params": {**entry["params"], "layers": [1, 1, 2, 2]}}
    monkeypatch.setattr(backbone_module, "BACKBONES", {**BACKBONES, SENET_BLOCKS: small})
    return SENET_BLOCKS


def deepest(backbone, output_stride, x):
    backbone.output_stride = output_stride
    with torch.no_grad():
        return backbone(x)[-1]


def subsampling_errors(name, sizes, randomise, images, error, **options):
    """Yield the error of C5(fine)[::2, ::2] against C5(coarse) for each pair of strides where the identity holds."""
    for multi_grid in ("auto", None):
        backbone = randomise(AtrousBackbone(name, multi_grid=multi_grid, **options)).double()
        without_gates(backbone)
        for size in sizes:
            x = images(1, 3, *size)
            at = {stride: deepest(backbone, stride, x) for stride in ((8, 16) if multi_grid else (8, 16, 32))}
            for fine, coarse in itertools.pairwise(at):
                yield error(at[fine][..., ::2, ::2], at[coarse])


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_convolution_is_torchvisions(name):
    # torchvision dilates bottlenecks only; for basic blocks its stride 32 remains.
    strides = {32: [False, False, False], 16: [False, False, True], 8: [False, True, True]}
    ours = on_meta(AtrousBackbone, name, multi_grid=None)
    for output_stride, replaced in strides.items():
        if name in ("resnet18", "resnet34") and output_stride < 32:
            continue
        theirs = on_meta(get_model, name, weights=None, replace_stride_with_dilation=replaced)
        ours.output_stride = output_stride
        assert convolutions(ours) == convolutions(theirs)
        assert shapes(ours.state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name", [name for name in BACKBONES if name in smp_encoders])
def test_every_convolution_is_smps_without_contraction(name):
    ours = on_meta(AtrousBackbone, name, multi_grid=None, contract_dilation=False)
    for output_stride in (8, 16, 32):
        theirs = on_meta(get_encoder, name, output_stride=output_stride)
        ours.output_stride = output_stride
        assert convolutions(ours) == convolutions(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert shapes(ours.state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name", [*BLOCK_TYPES, SENET_BLOCKS])
def test_features_are_smps(name, senet_blocks, randomise, images):
    ours = randomise(AtrousBackbone(name, output_stride=32, multi_grid=None)).double()
    entry = backbone_module.BACKBONES[name]
    theirs = entry["encoder"](**entry["params"]).double().eval()
    theirs.load_state_dict(dict(ours.state_dict()), strict=True)
    x = images(2, 3, 65, 97)
    with torch.no_grad():
        for actual, expected in zip(ours(x), theirs(x)[2:], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [*BLOCK_TYPES, SENET_BLOCKS])
def test_subsampling_identity(name, senet_blocks, randomise, images, error):
    errors = list(subsampling_errors(name, [(65, 97)], randomise, images, error))
    assert len(errors) == 3
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50", SENET_BLOCKS])
def test_whole_stage_dilation_violates_the_subsampling_identity(name, senet_blocks, randomise, images, error):
    options = {"contract_dilation": False}
    auto, fine, coarse = subsampling_errors(name, [(65, 97)], randomise, images, error, **options)
    assert min(fine, coarse) > 1e-2
    assert auto > 1e-2  # at 8 with multi-grid: layer3's first block


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in GIANTS])
def test_subsampling_identity_of_every_backbone(name, randomise, images, error):
    sizes = [(97, 129), (224, 224), (225, 225)]
    errors = list(subsampling_errors(name, sizes, randomise, images, error))
    assert len(errors) == 3 * len(sizes)
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("name", ["resnet18", SENET_BLOCKS])
def test_last_map_size_is_what_the_forward_gives(name, senet_blocks):
    backbone = on_meta(AtrousBackbone, name)
    for output_stride in (8, 16, 32):
        backbone.output_stride = output_stride
        for size in (32, 33, 63, 65, 97, 130, 513):
            last = backbone(torch.empty(1, 3, size, 35, device="meta"))[-1]
            assert (backbone.last_map_size(size), backbone.last_map_size(35)) == last.shape[-2:]


def test_feature_strides():
    backbone = on_meta(AtrousBackbone, "resnet50")
    assert backbone.out_channels == [256, 512, 1024, 2048]
    expected = {8: [4, 8, 8, 8], 16: [4, 8, 16, 16], 32: [4, 8, 16, 32]}
    for output_stride, strides in expected.items():
        backbone.output_stride = output_stride
        maps = backbone(torch.empty(1, 3, 65, 97, device="meta"))
        assert [(m.shape[1], m.shape[2], m.shape[3]) for m in maps] == [
            (channels, -(-65 // stride), -(-97 // stride))
            for channels, stride in zip(backbone.out_channels, strides, strict=True)
        ]


def test_plan_is_what_the_convolutions_have():
    backbone = on_meta(AtrousBackbone, "resnet50", output_stride=8)
    for block in backbone.dilation_plan():
        module = backbone.get_submodule(block.name)
        assert module.conv2.dilation == (block.dilation, block.dilation)
        assert module.conv2.stride == (block.stride, block.stride)
    assert [block.dilation for block in backbone.dilation_plan()[-3:]] == [4, 8, 16]


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_default_multi_grid_of_basic_blocks(name):
    backbone = on_meta(AtrousBackbone, name)
    for output_stride, base in ((16, 2), (8, 4), (32, 1)):
        backbone.output_stride = output_stride
        for index, block in enumerate(backbone.layer4):
            assert block.conv1.dilation == block.conv2.dilation == (base << index,) * 2
            assert block.conv1.padding == block.conv2.padding == (base << index,) * 2


@pytest.mark.parametrize("name", BACKBONES)
def test_every_normalisation_trains_at_one_value(name):
    norms = [m for m in on_meta(AtrousBackbone, name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {type(norm) for norm in norms} == {BatchNorm2d}


def test_shapes_tell_the_backbones_apart():
    known = {name: frozenset(shapes(on_meta(AtrousBackbone, name).state_dict()).items()) for name in BACKBONES}
    assert len(set(known.values())) == len(BACKBONES) == 19


@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_image_channels(in_channels, images):
    backbone = AtrousBackbone("resnet18", in_channels=in_channels).eval()
    assert backbone.conv1.weight.shape == (64, in_channels, 7, 7)
    with torch.no_grad():
        assert backbone(images(1, in_channels, 33, 33).float())[-1].isfinite().all()


@pytest.mark.parametrize("fusion", ["aff", "iaff"])
@pytest.mark.parametrize("name", ["resnet18", "se_resnext50_32x4d"])
def test_attentional_residuals_start_at_the_pretrained_function(name, fusion, randomise, images):
    plain = randomise(AtrousBackbone(name)).double()
    build = partial(build_fusion, fusion, gain=2, zero_init=True)
    fused = AtrousBackbone(name, block_fusion=build).double().eval()
    assert list(plain_state_dict(fused)) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=False)
    x = images(1, 3, 65, 97)
    with torch.no_grad():
        for actual, expected in zip(fused(x), plain(x), strict=True):
            assert torch.equal(actual, expected)
        for norm in fused.layer1[0].fusion.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.ones_(norm.weight)
        assert not torch.equal(fused(x)[0], plain(x)[0])


def test_attention_stands_where_it_is_said():
    backbone = AtrousBackbone(
        "resnet50",
        block_attention=partial(build_attention, "se"),
        stage_attention={"layer2": partial(build_attention, "cbam"), "layer4": partial(build_attention, ["eca", "se"])},
    )
    assert [len(stage) for stage in backbone.stages] == [3, 4, 6, 3]
    for stage, channels in zip(backbone.stages, (256, 512, 1024, 2048), strict=True):
        for block in stage:
            assert block.attention.fc1.in_channels == channels
    names = {stage: type(module).__name__ for stage, module in backbone.attention.items()}
    assert names == {"layer1": "Identity", "layer2": "CBAM", "layer3": "Identity", "layer4": "Sequential"}
    assert list(plain_state_dict(backbone)) == list(AtrousBackbone("resnet50").state_dict())


def test_block_attention_is_on_the_branch_and_stage_attention_on_the_output(images):
    class Double(nn.Module):
        def __init__(self, channels):
            super().__init__()

        def forward(self, x):
            return 2 * x

    torch.manual_seed(0)
    backbone = AtrousBackbone("resnet18", block_attention=Double, stage_attention={"layer1": Double}).double().eval()
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images(1, 3, 33, 33)))))
    with torch.no_grad():
        for block in backbone.layer1:
            branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            x = (x + 2 * branch).relu()
        assert torch.equal(backbone(images(1, 3, 33, 33))[0], 2 * x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "unknown backbone 'resnet51': did you mean 'resnet50'. Choices: resnet18, resnet34, resnet50, "),
        ("tu-resnet50", "backbone 'tu-resnet50' cannot change its output stride exactly: did you mean 'resnet50'"),
        ("timm-resnest50d", "backbone 'timm-resnest50d' cannot change .* exactly: did you mean 'resnet50'"),
        ("tu-wide_resnet50_2", "exactly: did you mean 'wide_resnet50_2'"),
        ("timm-skresnext50_32x4d", "exactly: did you mean 'resnext50_32x4d'"),
        ("mobilenet_v2", "backbone 'mobilenet_v2' cannot change its output stride exactly"),
        ("efficientnet-b0", "cannot change its output stride exactly"),
        ("se_resnext50", "unknown backbone 'se_resnext50': did you mean 'se_resnext50_32x4d'"),
        (None, "unknown backbone None"),
    ],
)
def test_unknown_backbones_are_refused_with_the_closest_name(name, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(name)
    with pytest.raises(ValueError, match=message):
        AtrousBackbone(name)


def test_a_refused_output_stride_changes_nothing():
    backbone = on_meta(AtrousBackbone, "resnet18", output_stride=8)
    before = convolutions(backbone)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        backbone.output_stride = 4
    assert (backbone.output_stride, convolutions(backbone)) == (8, before)
