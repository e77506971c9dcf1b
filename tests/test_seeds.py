"""Seeds are runs of one recipe, as long and on the same classes; best and last of one run, or imports, are none."""

from dataclasses import replace
from pathlib import Path

import pytest

from seg_attn.checkpoint import Checkpoint, DataInfo, load_checkpoint, save_model
from seg_attn.cli import main
from seg_attn.models import DeepLabV3
from seg_attn.seeds import planned_steps, recipes
from seg_attn.task import poly_factor

pytestmark = pytest.mark.filterwarnings("ignore:atrous rate", "ignore:.*does not have many workers")

DATA = DataInfo.default(3)


def trained(run, step=40, total=100, warmup=10, power=0.9, file="best.ckpt", data=DATA, crop=64):
    """What a run of so many steps has written at a step of it."""
    rate = 0.05 * min(1.0, (step + 1) / (warmup + 1)) * poly_factor(step, total, power)
    schedule = {"base_lrs": [0.0, 0.05], "last_epoch": step, "_last_lr": [0.0, rate]}
    how = {"crop_size": [crop, crop], "precision": "32-true"}
    training = {"global_step": step, "lr_schedulers": [schedule], "run": {"id": run, "training": how}}
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
    "other",
    [
        trained("b", total=1000),
        trained("b", power=0.8),
        trained("b", data=replace(DATA, class_names=[*"xyz"])),
        trained("b", crop=96),
    ],
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


def test_a_runs_checkpoint_tells_its_recipe_and_steps(checkpoint):
    checkpoint = load_checkpoint(checkpoint)
    assert planned_steps(checkpoint) == 6  # six images in batches of two, twice
    how = checkpoint.training["run"]["training"]
    assert (how["batch_size"], how["train_split"], how["precision"]) == (2, "train", "32-true")
    assert recipes([checkpoint]) != [None]


def test_a_run_that_goes_on_elsewhere_is_the_same_run_and_a_crop_is_another_recipe(checkpoint, config, tmp_path):
    def fit(folder, *arguments):
        command = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path / folder, *arguments]
        assert main([str(argument) for argument in command]) == 0
        [last] = (tmp_path / folder).rglob("last.ckpt")
        return load_checkpoint(last)

    first = load_checkpoint(checkpoint)
    resumed = fit("resumed", "--ckpt_path", checkpoint, "--trainer.max_epochs", 3)
    assert resumed.training["run"] == first.training["run"]
    other, cropped = fit("other", "--seed_everything", 1), fit("cropped", "--data.crop_size", 48)
    one, another, third = recipes([first, other, cropped])
    assert one == another is not None
    assert third not in (None, one)
