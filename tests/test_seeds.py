"""Seeds are runs of one recipe, as long and on the same classes; best and last of one run, or imports, are none."""

from dataclasses import replace
from pathlib import Path

import pytest

from seg_attn.checkpoint import Checkpoint, DataInfo, load_checkpoint, save_model
from seg_attn.models import DeepLabV3
from seg_attn.seeds import planned_steps, recipes, run_folder
from seg_attn.task import poly_factor

pytestmark = pytest.mark.filterwarnings("ignore:atrous rate", "ignore:.*does not have many workers")

DATA = DataInfo.default(3)


def trained(run, step=40, total=100, warmup=10, power=0.9, file="best.ckpt", data=DATA):
    """What a run of so many steps has written at a step of it."""
    rate = 0.05 * min(1.0, (step + 1) / (warmup + 1)) * poly_factor(step, total, power)
    schedule = {"base_lrs": [0.0, 0.05], "last_epoch": step, "_last_lr": [0.0, rate]}
    training = {"global_step": step, "callbacks": {"checkpoint": {"dirpath": run}}, "lr_schedulers": [schedule]}
    arguments = {"backbone": "resnet18", "warmup_steps": warmup, "poly_power": power}
    return Checkpoint(Path(run) / file, arguments, {}, data, training)


@pytest.mark.parametrize("step", [1, 5, 40, 99, 100])
@pytest.mark.parametrize(("total", "warmup", "power"), [(100, 0, 0.9), (100, 10, 0.9), (123_457, 500, 2.0)])
def test_the_schedule_tells_how_long_a_run_was_to_be(step, total, warmup, power):
    assert planned_steps(trained("a", step, total, warmup, power)) == total


def test_without_a_schedule_the_steps_taken_count():
    one = trained("a")
    assert planned_steps(replace(one, training={**one.training, "lr_schedulers": None})) == 40
    assert planned_steps(trained("a", power=0.0)) == 40
    assert planned_steps(trained("a", step=0)) == 0


def test_best_checkpoints_of_other_epochs_are_seeds():
    one, other = recipes([trained("a", step=40), trained("b", step=70)])
    assert one == other is not None


@pytest.mark.parametrize(
    "other", [trained("b", total=1000), trained("b", power=0.8), trained("b", data=replace(DATA, class_names=[*"xyz"]))]
)
def test_another_length_recipe_or_data_is_no_seed(other):
    one, another = recipes([trained("a"), other])
    assert one != another


def test_one_run_twice_and_no_run_are_no_seeds(tmp_path):
    assert recipes([trained("a"), trained("a", file="last.ckpt"), None]) == [None, None, None]
    assert recipes([trained("a"), trained("a")]) != [None, None]  # one file in two rows
    paths = [tmp_path / "one.ckpt", tmp_path / "two.ckpt"]
    for path in paths:
        save_model(path, DeepLabV3("resnet18", num_classes=3), DATA)
    assert recipes([load_checkpoint(path) for path in paths]) == [None, None]


def test_a_runs_checkpoints_tell_its_folder_and_steps(checkpoint):
    folder, checkpoint = checkpoint.parent, load_checkpoint(checkpoint)
    assert run_folder(checkpoint) == str(folder)
    assert planned_steps(checkpoint) == 6  # six images in batches of two, twice
