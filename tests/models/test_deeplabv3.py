"""The whole network: shapes, live output stride, training at batch 1, what may stand where, errors."""

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18, resnet50

from seg_attn.attention import ATTENTION
from seg_attn.fusion import AFF, FUSION, Add, Concat, IterativeAFF
from seg_attn.models import DeepLabV3
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS

SMALL = {"backbone": "resnet18", "num_classes": 3, "decoder_channels": 16}
FUSIONS = tuple(FUSION)
RESIDUAL_FUSIONS = ("add", "aff", "iaff")


def small(**options):
    return DeepLabV3(**{**SMALL, **options})


def attention_keys(model):
    """The keys that attention adds, without batch counters, which PyTorch does not report as missing."""
    ours = re.compile(r"(.+\.attention|aspp_attention|decoder_attention)\..+(?<!num_batches_tracked)")
    return {key for key in model.state_dict() if ours.fullmatch(key)}


def train_step(model, x):
    """One step on random labels; returns the logits."""
    model.train()
    logits = model(x)
    target = torch.randint(0, logits.shape[1], (x.shape[0], *x.shape[2:]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cross_entropy(logits, target).backward()
    optimizer.step()
    return logits


# --- live output stride ----------------------------------------------------------------------------------------------


def test_there_and_back_is_bit_equal_and_touches_no_weight(randomise, images):
    model = randomise(small(attention={"layer2": "self", "blocks": "se"}, image_pooling="attention"))
    before = copy.deepcopy(model.state_dict())
    x = images(1, 3, 65, 97).float()
    logits = {}
    for output_stride in (8, 16, 32):
        model.output_stride = output_stride
        with torch.no_grad():
            logits[output_stride] = model(x)
    for output_stride in (16, 8, 32, 8):
        model.output_stride = output_stride
        assert model.output_stride == model.backbone.output_stride == output_stride
        assert model.aspp.rates == tuple(rate * 16 // output_stride for rate in (6, 12, 18))
        with torch.no_grad():
            assert torch.equal(model(x), logits[output_stride])
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.allclose(logits[8], logits[16])


def test_a_change_of_stride_in_training_is_a_model_built_at_that_stride(images):
    torch.manual_seed(0)
    moved = small(output_stride=16).train()
    built = small(output_stride=8).train()
    built.load_state_dict(moved.state_dict(), strict=True)
    moved.output_stride = 8
    x = images(2, 3, 33, 49).float()
    for model in (moved, built):
        torch.manual_seed(1)  # the same dropout
        train_step(model, x)
    for (name, one), two in zip(moved.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert all(torch.equal(one, two) for one, two in zip(moved.buffers(), built.buffers(), strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_own_stride(duplicate, randomise, images):
    model = randomise(small(fusion="iaff"))
    model.output_stride = 8
    copied = duplicate(model)
    x = images(1, 3, 33, 49).float()
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))
        copied.output_stride = 32
        assert (model.output_stride, copied.output_stride) == (8, 32)
        assert (model.config["output_stride"], copied.config["output_stride"]) == (8, 32)
        assert not torch.equal(copied(x), model(x))
        model.output_stride = 32
        assert torch.equal(copied(x), model(x))


def test_config_rebuilds_the_model(randomise, images):
    model = randomise(
        small(multi_grid=(2, 3), fusion={"name": "aff", "reduction": 2}, attention={"skip": ["eca", {"name": "se"}]})
    )
    model.output_stride = 8
    assert model.config["multi_grid"] == [2, 3]
    rebuilt = DeepLabV3(**model.config).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    x = images(1, 3, 33, 33).float()
    with torch.no_grad():
        assert torch.equal(rebuilt(x), model(x))


# --- every choice, by hypothesis -------------------------------------------------------------------------------------


@st.composite
def choices(draw, backbones):
    fusion = draw(st.sampled_from(FUSIONS))
    return {
        "backbone": draw(st.sampled_from(backbones)),
        "output_stride": draw(st.sampled_from((8, 16, 32))),
        "multi_grid": draw(st.sampled_from(("auto", None))),
        "contract_dilation": draw(st.booleans()),
        "atrous_rates": draw(st.sampled_from(((2,), (6, 12, 18), (2, 4, 6, 8)))),
        "image_pooling": draw(st.sampled_from(("average", "attention"))),
        "skip_strides": draw(st.sampled_from(((), (4,), (8,), (8, 4), (16, 8, 4)))),
        "skip_channels": draw(st.sampled_from((None, 5))) if fusion == "concat" else None,
        "fusion": fusion,
        "residual_fusion": draw(st.sampled_from(RESIDUAL_FUSIONS)),
        "separable": draw(st.sampled_from((False, True, "aspp", "decoder"))),
        "align_corners": draw(st.booleans()),
        "refine_aspp": draw(st.booleans()),
        "dropout": 0.0,
    }


def check_choice(options, batch, height, width, randomise, images, error):
    """Output size, finiteness, independence of the batch, and gradients at the start and after randomising."""
    torch.manual_seed(0)
    model = small(**options)
    x = images(batch, 3, height, width).float()
    logits = train_step(model, x)
    assert logits.shape == (batch, 3, height, width)
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    def independence():
        with torch.no_grad():
            together = model.eval()(x)
            alone = torch.cat([model(image[None]) for image in x])
        assert together.isfinite().all()
        return error(alone, together)

    assert independence() <= 1e-5
    # Random gates and statistics amplify rounding by what no trained network does: in float64 it stays small.
    randomise(model).double()
    x = images(batch, 3, height, width)
    assert independence() <= 1e-8

    # A single value per channel is normalised with running statistics, two values to ±1: both are dead ends by design.
    last = model.backbone.last_map_size(height), model.backbone.last_map_size(width)
    if batch >= 2 and min(last) >= 4:
        without = set(dict(model.named_parameters()))
        for seed in range(5):
            model.zero_grad()
            randomise(model, seed).train()
            (model(x) * images(batch, 3, height, width, seed=seed + 1)).sum().backward()
            without -= {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() > 0}
            if not without:
                break
        assert not without


odd_sizes = st.integers(16, 48).map(lambda half: 2 * half + 1)
by_hypothesis = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=12, **by_hypothesis)
@given(options=choices(["resnet18"]), batch=st.integers(1, 3), height=odd_sizes, width=odd_sizes)
def test_any_choice(options, batch, height, width, randomise, images, error):
    check_choice(options, batch, height, width, randomise, images, error)


@pytest.mark.exhaustive
@settings(max_examples=60, **by_hypothesis)
@given(
    options=choices(["resnet18", "resnet34", "resnet50", "se_resnet50", "resnext50_32x4d", "se_resnext50_32x4d"]),
    batch=st.integers(1, 3),
    height=odd_sizes,
    width=odd_sizes,
)
def test_any_choice_on_many_backbones(options, batch, height, width, randomise, images, error):
    check_choice(options, batch, height, width, randomise, images, error)


@pytest.mark.parametrize("size", [(65, 97), (375, 500)])
def test_output_has_the_images_size(size):
    with torch.device("meta"):
        model = small(skip_strides=(8, 4), num_classes=7)
        for output_stride in (8, 16, 32):
            model.output_stride = output_stride
            assert model(torch.empty(2, 3, *size)).shape == (2, 7, *size)


# --- training at batch 1 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": name, "residual_fusion": name} for name in ("aff", "iaff")),
        {"attention": dict(zip(ATTENTION_POSITIONS, itertools.cycle(["sk", "ms_cam", "self"]), strict=False))},
        {"image_pooling": "attention", "skip_strides": (), "aux_head": True},
        {"backbone": "se_resnext50_32x4d"},
    ],
)
def test_one_small_image_trains_where_maps_are_one_by_one(options, images):
    torch.manual_seed(0)
    model = small(output_stride=32, **options).train()
    x = images(1, 3, 32, 32).float()
    assert model.backbone.last_map_size(32) == 1
    before = copy.deepcopy(model.state_dict())
    if model.aux_classifier is None:
        train_step(model, x)
    else:
        sum(logits.square().mean() for logits in model.forward_with_aux(x)).backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    assert not torch.equal(model.backbone.layer1[0].conv1.weight, before["backbone.layer1.0.conv1.weight"])
    # Where there was one value, statistics stayed; where there were more, they moved.
    pooled = model.aspp.branches[-1][1][1]
    assert torch.equal(pooled.running_mean, torch.zeros_like(pooled.running_mean))
    assert pooled.num_batches_tracked == 0
    assert model.backbone.layer1[0].bn1.num_batches_tracked == 1


# --- residual fusion and attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["aff", "iaff"])
def test_attentional_residuals_start_at_the_pretrained_network(fusion, randomise, images, tmp_path):
    pretrained = randomise(resnet18(weights=None))
    torch.save(pretrained.state_dict(), tmp_path / "resnet18.pth")
    torch.manual_seed(0)
    plain = small(backbone_weights=tmp_path / "resnet18.pth").eval()
    fused = small(backbone_weights=tmp_path / "resnet18.pth", residual_fusion=fusion)
    missing, unexpected = fused.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(re.match(r"backbone\.layer\d\.\d\.fusion\.", key) for key in missing)
    x = images(2, 3, 65, 97).float()
    with torch.no_grad():
        assert torch.equal(fused.eval()(x), plain(x))
    assert torch.equal(fused.backbone.conv1.weight, pretrained.conv1.weight)
    # And it is no dead end: what weighs the two inputs gets a gradient.
    fused(x).square().mean().backward()
    last = fused.backbone.layer4[1].fusion
    weighs = last.local_att if fusion == "aff" else last.local_att2
    assert weighs[-1].weight.grad.abs().max() > 0


def test_residual_fusion_options_win_over_the_start():
    blocks = [block.fusion for stage in small(residual_fusion="aff").backbone.stages for block in stage]
    assert all(type(fusion) is AFF and fusion.gain == 2 for fusion in blocks)
    assert all(torch.count_nonzero(fusion.local_att[-1].weight) == 0 for fusion in blocks)
    options = {"name": "iaff", "gain": 1, "zero_init": False, "reduction": 8}
    custom = small(residual_fusion=options).backbone.layer1[0].fusion
    assert (type(custom), custom.gain) == (IterativeAFF, 1)
    assert torch.equal(custom.local_att[-1].weight, torch.ones(64))
    assert custom.local_att[0].out_channels == 8
    assert type(small().backbone.layer1[0].fusion) is Add


def check_attention(position, name, backbone, state, images, randomise):
    """Builds, keeps the backbone's keys, starts as the identity on demand, trains at batch 1 and 2."""
    spec = {"name": name, "identity_init": True}
    torch.manual_seed(0)
    plain = randomise(small(backbone=backbone))
    model = small(backbone=backbone, attention={position: spec})
    missing, unexpected = model.backbone.load_state_dict(state, strict=False)
    assert [key for key in unexpected if not key.startswith("fc.")] == []
    assert all(".attention." in f".{key}" for key in missing)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) == attention_keys(model) != set()
    x = images(2, 3, 33, 49).float()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
        for key, value in model.named_parameters():
            if key.endswith("alpha"):
                value.fill_(0.5)
            if key.endswith("gamma"):
                value.fill_(1.0)
        assert not torch.equal(model(x), plain(x))
    for batch in (x, x[:1]):
        model.zero_grad()
        train_step(model, batch)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Each position and each block at least once.
SOME = [*zip(ATTENTION_POSITIONS, itertools.cycle(ATTENTION), strict=False)]


@pytest.mark.parametrize(("position", "name"), SOME)
def test_attention_anywhere(position, name, images, randomise):
    check_attention(position, name, "resnet18", resnet18(weights=None).state_dict(), images, randomise)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backbone", [resnet18, resnet50])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("position", ATTENTION_POSITIONS)
def test_every_attention_everywhere(position, name, backbone, images, randomise):
    if backbone is resnet50 or (position, name) not in SOME:
        check_attention(position, name, backbone.__name__, backbone(weights=None).state_dict(), images, randomise)


def test_attention_positions_take_chains_and_see_the_right_channels():
    attention = {"skip": ["se", {"name": "eca", "kernel_size": 3}], "aspp": "cbam", "decoder": "se", "layer3": None}
    model = small(attention=attention, skip_strides=(8, 4), fusion="concat")
    for skip in model.decoder.skips:
        assert [type(block).__name__ for block in skip.attention] == ["SqueezeExcite", "ECA"]
        assert skip.attention[0].fc1.in_channels == 48
        assert type(skip.fusion) is Concat
    assert type(model.aspp_attention).__name__ == "CBAM"
    assert model.decoder_attention.fc1.in_channels == 16
    assert type(model.backbone.attention["layer3"]) is nn.Identity


def test_attention_after_aspp_and_before_the_classifier(images):
    torch.manual_seed(0)
    model = small(skip_strides=()).double().eval()
    x = images(1, 3, 33, 33)
    with torch.no_grad():
        aspp = model.aspp(model.backbone(x)[-1])
        model.aspp_attention, model.decoder_attention = nn.Tanh(), nn.Sigmoid()
        small_logits = model.classifier(model.decoder.refine(aspp.tanh()).sigmoid())
        expected = nn.functional.interpolate(small_logits, size=(33, 33), mode="bilinear", align_corners=False)
        assert torch.equal(model(x), expected)


# --- skips, heads, sizes ---------------------------------------------------------------------------------------------


def test_skips_are_named_by_nominal_stride_and_run_deep_to_shallow():
    model = small(skip_strides=(16, 8, 4), fusion="concat", skip_channels=7, output_stride=8)
    assert model.skip_stages == ["layer3", "layer2", "layer1"]
    assert [skip.project[0].in_channels for skip in model.decoder.skips] == [256, 128, 64]
    assert [skip.project[0].out_channels for skip in model.decoder.skips] == [7, 7, 7]
    assert [skip.refine[0].in_channels for skip in model.decoder.skips] == [23, 23, 23]
    assert type(model.decoder.refine) is nn.Identity
    assert len(small(skip_strides=()).decoder.skips) == 0


def test_skip_features_reach_the_logits(images):
    torch.manual_seed(0)
    model = small(skip_strides=(8, 4)).eval()
    seen = []
    for skip in model.decoder.skips:
        skip.project.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = images(1, 3, 33, 49).float()
    with torch.no_grad():
        features = model.backbone(x)
        model(x)
    assert torch.equal(seen[0], features[1])
    assert torch.equal(seen[1], features[0])


def test_auxiliary_head_reads_layer3_and_forward_ignores_it(images):
    torch.manual_seed(0)
    model = small(aux_head=True).double().eval()
    x = images(2, 3, 33, 49)
    with torch.no_grad():
        logits, aux = model.forward_with_aux(x)
        assert torch.equal(model(x), logits)
        expected = model.aux_classifier(model.backbone(x)[2])
        assert expected.shape == (2, 3, 3, 4)
        assert torch.equal(aux, nn.functional.interpolate(expected, size=(33, 49), mode="bilinear"))
    with pytest.raises(ValueError, match="forward_with_aux needs a model built with aux_head=True"):
        small().forward_with_aux(x)


@pytest.mark.parametrize(("output_stride", "size"), [(16, (97, 193)), (16, (97, 200)), (8, (97, 193)), (32, (64, 96))])
def test_oversized_rates_are_those_whose_branch_is_a_1x1(output_stride, size):
    model = small(output_stride=output_stride)
    rows, columns = (model.backbone.last_map_size(side) for side in size)
    seen = []
    for branch in model.aspp.branches[1:-1]:
        conv = branch.spatial_conv
        weight = torch.zeros_like(conv.weight)
        weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 1  # every tap but the centre
        ones = torch.ones(1, conv.in_channels, rows, columns)
        reached = nn.functional.conv2d(ones, weight, padding=conv.padding, dilation=conv.dilation)
        seen.append(bool(reached.abs().max() > 0))
    assert model.oversized_rates(*size) == tuple(
        rate for rate, sees in zip(model.aspp.rates, seen, strict=True) if not sees
    )


def test_oversized_rates():
    model = small()
    assert model.oversized_rates(513, 513) == ()
    assert model.oversized_rates(257, 289) == ()  # 17 x 19 positions: 18 reaches along the longer side
    assert model.oversized_rates(257, 257) == (18,)
    assert model.oversized_rates(65, 97) == (12, 18)
    model.output_stride = 8
    assert model.oversized_rates(257, 257) == (36,)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        ({"in_channels": -1}, "in_channels must be an integer of at least 1, got -1"),
        ({"decoder_channels": 2.5}, "decoder_channels must be an integer of at least 1, got 2.5"),
        ({"backbone": "resnet20"}, "unknown backbone 'resnet20': did you mean 'resnet"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"multi_grid": (1, 2, 4)}, r"one rate for each of the 2 blocks of the last stage, got 3: \[1, 2, 4\]"),
        ({"atrous_rates": (6, 0)}, "atrous_rates must be positive integers"),
        ({"image_pooling": "max"}, "image_pooling must be one of average, attention, got 'max'"),
        ({"skip_strides": (4, 8)}, r"skip_strides must be taken from 16, 8, 4, in this order .* got \[4, 8\]"),
        ({"skip_strides": (32,)}, r"skip_strides must be taken from 16, 8, 4.* got \[32\]"),
        ({"skip_strides": (4, 4)}, "skip_strides must be taken from"),
        ({"skip_channels": 48}, "skip_channels must be the decoder's width, 16, unless fusion is 'concat', got 48"),
        ({"skip_channels": 0, "fusion": "concat"}, "skip_channels must be an integer of at least 1, got 0"),
        ({"fusion": "affs"}, "unknown fusion 'affs': did you mean 'aff'"),
        ({"fusion": {"name": "aff", "reductions": 2}}, "reductions"),
        ({"residual_fusion": "concat"}, "residual_fusion must keep the channels: one of add, aff, iaff, got 'concat'"),
        ({"separable": "skip"}, "separable must be True, False, 'aspp' or 'decoder', got 'skip'"),
        (
            {"attention": {"layer5": "se"}},
            "unknown attention position 'layer5': did you mean 'layer4'. Choices: blocks",
        ),
        ({"attention": {"layer4": "sse"}}, "unknown attention block 'sse': did you mean 'se'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_changing_the_stride_warns_of_rates_that_round():
    model = small(atrous_rates=(3, 6))
    with pytest.warns(UserWarning, match="atrous_rates 3 .* not whole at output stride 32"):
        model.output_stride = 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.output_stride = 16
    assert model.aspp.rates == (3, 6)
