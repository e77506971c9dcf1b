"""A device that is not there is said in one line, whoever asks for it."""

import pytest
import torch

from seg_attn import Predictor
from seg_attn.cli import main
from seg_attn.errors import InputError
from seg_attn.prediction.device import resolve_device


def test_devices_that_are_there():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["foo", "", "cuda:99", "meta", "mps", "xpu", "hpu", torch.device("cuda", 99)])
def test_devices_that_are_not(device, model, data):
    with pytest.raises(InputError, match=r"device '.*' is not on this machine: take one of auto, cpu"):
        Predictor(model, data, device=device)


@pytest.mark.parametrize("command", ["predict", "predict --devices 2", "explain", "prices --repeats 0"])
def test_commands_say_so_in_one_line(trained, tmp_path, capsys, command):
    arguments = [*command.split(), "--device", "cuda:99"]
    if "prices" not in command:
        (tmp_path / "a.png").touch()
        arguments += [
            "--ckpt_path",
            str(trained),
            "--input",
            str(tmp_path / "a.png"),
            "--output",
            str(tmp_path / "out"),
        ]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "device 'cuda:99' is not on this machine: take one of auto, cpu" in lines[0]
    assert not (tmp_path / "out").exists()
