import argparse
import time

import pytest
import torch
from torch import nn

from seg_attn import DeepLabV3
from seg_attn.attention import ATTENTION, build_attention
from seg_attn.commands import prices as command
from seg_attn.errors import InputError
from seg_attn.fusion import FUSION
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS
from seg_attn.prices import attention_modules, forward_seconds, price_items, price_list


def _parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


class Convs(nn.Module):
    """Two convolutions whose cost is known, and a wait that the clock must find."""

    def __init__(self, wait=0.0):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = Waiting(wait)

    def forward(self, x):
        return self.second(self.first(x))


class Waiting(nn.Conv2d):
    def __init__(self, wait):
        super().__init__(4, 2, 1)
        self.wait = wait

    def forward(self, x):
        time.sleep(self.wait)
        return super().forward(x)


def test_time_is_that_of_the_parts():
    models = [Convs(0.1).eval(), Convs(0.0).eval()]
    slow, fast = forward_seconds(models, torch.zeros(1, 3, 8, 8), [["second"], ["first"]], repeats=3)
    assert 0.1 <= slow.parts < slow.whole
    assert fast.parts < fast.whole < slow.parts
    assert not models[0].second._forward_hooks
    assert not models[0].second._forward_pre_hooks


def test_no_repeats_are_no_time():
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1, got 0"):
        forward_seconds([Convs()], torch.zeros(1, 3, 8, 8), [[]], repeats=0)


@pytest.mark.parametrize("position", ATTENTION_POSITIONS)
def test_the_modules_of_a_position_are_its_blocks(position):
    model = DeepLabV3("resnet18", decoder_channels=8, skip_strides=(8, 4), attention={position: "eca"})
    modules = [model.get_submodule(name) for name in attention_modules(model, position)]
    found = [module for module in model.modules() if isinstance(module, ATTENTION["eca"])]
    assert {id(module) for module in modules} == {id(module) for module in found}
    assert len(modules) == {"blocks": 8, "skip": 2}.get(position, 1)


@pytest.fixture(scope="module")
def prices():
    with pytest.MonkeyPatch.context() as patch:  # fewer of each: every item is a network to build
        patch.setattr("seg_attn.prices.ATTENTION", {name: ATTENTION[name] for name in ("se", "eca")})
        patch.setattr("seg_attn.prices.FUSION", {name: FUSION[name] for name in ("add", "iaff")})
        return price_list("resnet18", (33, 33), ("skip",), num_classes=5, repeats=1)


@pytest.fixture(scope="module")
def untimed():
    return price_list("resnet18", (33, 33), ("aspp", "blocks"), num_classes=5, repeats=0)


@pytest.fixture(scope="module")
def counted(untimed):
    return {(price.item.name, price.item.place): (price.parameters, price.flops) for price in untimed.prices}


def test_prices_are_those_of_the_blocks(counted):
    assert len(counted) == 2 * len(ATTENTION) + (len(FUSION) - 1) + 2 + 1
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    for name in ATTENTION:
        assert counted[name, "aspp"][0] == _parameters(build_attention(name, 256))
        assert counted[name, "blocks"][0] == sum(_parameters(build_attention(name, width)) for width in widths)
        assert counted[name, "aspp"][1] > 0
    # SE at C = 256, r = 16, on one vector.
    assert counted["se", "aspp"] == (2 * 256 * 16, 2 * 2 * 256 * 16)
    assert counted["attention", "image_pooling"][0] == 512
    # Concatenation: 48 instead of 256 skip channels, and 304 instead of 256 into the 3x3.
    assert counted["concat", "fusion"][0] == (48 - 256) * (64 + 2) + 48 * 256 * 9
    assert counted["iaff", "fusion"][0] == 2 * counted["aff", "fusion"][0]
    assert counted["aff", "residual_fusion"][0] == counted["ms_cam", "blocks"][0]


def test_time_is_measured_for_every_item(prices):
    seconds = {(price.item.name, price.item.place): price.seconds for price in prices.prices}
    places = [("se", "skip"), ("eca", "skip"), ("iaff", "fusion"), ("iaff", "residual_fusion")]
    assert list(seconds) == [*places, ("attention", "image_pooling")]
    assert seconds["se", "skip"] > 0
    assert seconds["iaff", "residual_fusion"] > 0
    assert prices.seconds > seconds["eca", "skip"]


def test_plain_is_the_network_without(prices):
    assert prices.plain.parameters == _parameters(DeepLabV3("resnet18", num_classes=5, fusion="add"))


def test_the_table_holds_every_price(prices):
    lines = prices.markdown().splitlines()
    assert lines[0].startswith("DeepLabV3 resnet18, output stride 16, one image of 33 × 33, CPU with 1 thread. ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == ["block", "where", "parameters", "MFLOPs", "ms", "% of the time"]
    assert len(rows) == 2 + len(prices.prices)
    assert rows[2][:4] == ["`se`", "`skip`", "+8,192", "+0.0164"]
    assert float(rows[2][4]) == pytest.approx(1e3 * prices.prices[0].seconds, rel=0.06)
    share = 100 * prices.prices[0].seconds / prices.seconds
    assert float(rows[2][5]) == pytest.approx(share, rel=0.06)


def test_time_can_be_left_out(untimed):
    table = untimed.markdown()
    assert "| block | where | parameters | MFLOPs |\n" in table
    assert " ms" not in table
    assert "| `eca` | `aspp` | +5 | " in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": ["asp"]}, "unknown attention position 'asp': did you mean 'aspp'?"),
        ({"size": (0, 33)}, "height must be an integer of at least 1, got 0"),
        ({"repeats": -1}, "repeats must not be negative, got -1"),
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        price_list(**({"backbone": "resnet18", "size": (33, 33), "repeats": 0} | arguments))


def test_a_new_block_is_priced(monkeypatch):
    monkeypatch.setitem(ATTENTION, "mine", ATTENTION["se"])
    assert ("mine", "skip") in [(item.name, item.place) for item in price_items(["skip"])]


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_and_writes_the_table(untimed, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(command, "price_list", lambda *arguments: asked.append(arguments) or untimed)
    path = tmp_path / "prices.md"
    arguments = ("--backbone", "resnet18", "--size", 33, 40, "--position", "skip", "aspp", "--repeats", 0)
    assert _run(*arguments, "--output", path) == 0
    assert asked == [("resnet18", (33, 40), ["skip", "aspp"], 16, 21, 0, "cpu")]
    assert path.read_text() == capsys.readouterr().out == untimed.markdown()
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        _run(*arguments, "--output", tmp_path / "none" / "prices.md")


@pytest.mark.exhaustive
def test_every_block_at_every_position_of_resnet50():
    prices = price_list("resnet50", (65, 65), ATTENTION_POSITIONS, repeats=0)
    assert len(prices.prices) == len(ATTENTION) * len(ATTENTION_POSITIONS) + 3 + 2 + 1
    assert all(price.parameters > 0 and price.flops > 0 for price in prices.prices)
