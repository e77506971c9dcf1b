import csv
import json
import math
import signal
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from seg_attn import training, variants
from seg_attn.attention import ATTENTION
from seg_attn.callbacks import RunInterruptedError, StopOnSignal
from seg_attn.checkpoint import load_checkpoint
from seg_attn.commands.variants import run
from seg_attn.data.sample import SAMPLE_CLASSES
from seg_attn.errors import InputError
from seg_attn.fusion import FUSION
from seg_attn.models.deeplabv3 import DeepLabV3
from seg_attn.variants import (
    DEFAULT_VARIANTS,
    Comparison,
    Recipe,
    Row,
    Run,
    Variant,
    base_model,
    resolve_variants,
    run_variants,
)

CONFIGS = Path(__file__).parents[1] / "configs"


def _models(names, position="aspp", base=None):
    return {v.name: v.overlay["model"] for v in resolve_variants(names, position, base or {})}


def _run(seed, miou, seconds=60.0):
    return Run(seed, miou, {"a": miou, "b": None}, seconds, "last.ckpt", "0")


# --- what is compared ------------------------------------------------------------------------------------------------


def test_the_default_is_every_block_and_every_fusion():
    assert DEFAULT_VARIANTS == ("none", "se", "eca", "cbam", "sk", "ms_cam", "self", "add", "concat", "aff", "iaff")
    models = _models(DEFAULT_VARIANTS)
    assert models["none"] == {"attention": None, "fusion": "aff"}
    assert all(models[name] == {"attention": {"aspp": name}, "fusion": "aff"} for name in ATTENTION)
    assert all(models[name] == {"attention": None, "fusion": name} for name in FUSION)


def test_blocks_keep_the_base_fusion_and_fusions_the_base_attention():
    base = {"fusion": {"name": "iaff", "reduction": 8}, "attention": {"layer4": "eca"}}
    assert _models(["none", "se", "add"], "decoder", base) == {
        "none": {"attention": None, "fusion": {"name": "iaff", "reduction": 8}},
        "se": {"attention": {"decoder": "se"}, "fusion": {"name": "iaff", "reduction": 8}},
        "add": {"attention": {"layer4": "eca"}, "fusion": "add"},
    }


def test_a_block_may_have_a_position_of_its_own_and_an_overlay_a_file(tmp_path):
    overlay = tmp_path / "wide.yaml"
    overlay.write_text("model: {decoder_channels: 64, attention: {aspp: [se, self]}}\n")
    models = _models(["se@layer3", str(overlay)])
    assert models["se@layer3"] == {"attention": {"layer3": "se"}, "fusion": "aff"}
    assert models["wide"] == {"decoder_channels": 64, "attention": {"aspp": ["se", "self"]}}


@pytest.mark.parametrize(
    ("names", "position", "message"),
    [
        (["cban"], "aspp", r"unknown variant 'cban': did you mean 'cbam'\? Choices: none, se, .*, or a YAML overlay"),
        (["se"], "asp", "unknown attention position 'asp': did you mean 'aspp'"),
        (["se@layer7"], "aspp", "unknown attention position 'layer7'"),
        (["se", "se"], "aspp", "--variants names 'se' twice"),
        (["no.yaml"], "aspp", r"no\.yaml: cannot be read \(No such file or directory\)"),
    ],
)
def test_wrong_names(names, position, message):
    with pytest.raises(InputError, match=message):
        resolve_variants(names, position, {})


def test_later_configs_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {backbone: resnet18, fusion: add}\n")
    second.write_text("model: {fusion: iaff}\ntrainer: {max_epochs: 3}\n")
    assert base_model([first, second]) == {"backbone": "resnet18", "fusion": "iaff"}
    second.write_text("- a list\n")
    with pytest.raises(InputError, match=r"b\.yaml: not a config"):
        base_model([first, second])
    second.write_text("model: {fusion: [\n")
    with pytest.raises(InputError, match=r"b\.yaml: not YAML"):
        base_model([first, second])


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    rows = [
        Row("none", None, "aff", runs=[_run(0, 0.50), _run(1, 0.54)], parameters=2_000_000, flops=3 * 10**9),
        Row("se", {"aspp": "se"}, "aff", runs=[_run(0, 0.53, 30.0), _run(1, 0.55, 90.0)], seconds_per_image=0.0123),
        Row("iaff", runs=[_run(1, 0.60)], errors={0: "out of memory"}),
        Row("sk", errors={0: "out of memory", 1: "out of memory"}),
    ]
    return Comparison("A title", [0, 1], rows, measured="one image of 8 × 9, CPU with 1 thread")


def test_mean_and_deviation_over_seeds_and_differences_seed_by_seed(table):
    none, se, iaff, sk = table.records()
    assert none["miou_mean"] == pytest.approx(0.52)
    assert none["miou_std"] == pytest.approx(statistics.stdev([0.50, 0.54]))
    assert se["difference_mean"] == pytest.approx(0.02)
    assert se["difference_std"] == pytest.approx(statistics.stdev([0.03, 0.01]))
    assert iaff["difference_mean"] == pytest.approx(0.06)  # against seed 1 alone
    assert (iaff["miou_std"], iaff["difference_std"], iaff["seeds"]) == (None, None, 1)
    assert (sk["miou_mean"], sk["difference_mean"], sk["fit_seconds"], sk["seeds"]) == (None, None, None, 0)
    assert se["fit_seconds"] == 60


def test_markdown(table):
    lines = table.markdown().splitlines()
    assert lines[0] == "A title"
    assert lines[4:8] == [
        "| `none` | 52.00 ± 2.83 | – | 2.000 | 3.000 | – | 1.0 |",
        "| `se` | 54.00 ± 1.41 | +2.00 ± 1.41 | – | – | 12.3 | 1.0 |",
        "| `iaff` | 60.00 | +6.00 | – | – | – | 1.0 |",
        "| `sk` | – | – | – | – | – | – |",
    ]
    assert lines[-3:] == [f"- failed: `{n}`, seed {s}: out of memory" for n, s in (("iaff", 0), ("sk", 0), ("sk", 1))]
    assert "over the seeds 0, 1." in table.markdown()
    assert "one image of 8 × 9, CPU with 1 thread." in table.markdown()


def test_csv_and_json_hold_full_precision(table, tmp_path):
    table.rows[0].runs[0] = _run(0, 1 / 3)
    table.write(tmp_path)
    with (tmp_path / "variants.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == ["none", "se", "iaff", "sk"]
    assert float(lines[0]["miou_seed_0"]) == 1 / 3
    assert lines[2]["miou_seed_0"] == ""
    assert (lines[1]["attention"], lines[1]["fusion"]) == ('{"aspp": "se"}', "aff")
    assert lines[3]["error"] == "out of memory"
    content = json.loads((tmp_path / "variants.json").read_text())
    assert content["rows"][0]["runs"][0]["miou"] == 1 / 3
    assert content["rows"][0]["runs"][0]["per_class"] == {"a": 1 / 3, "b": None}
    assert content["seeds"] == [0, 1]
    assert not any(math.isnan(v) for row in content["rows"] for v in row.values() if isinstance(v, float))


# --- the runs: training is replaced by what it leaves in its folder --------------------------------------------------


class FakeTraining:
    """Does what `training.run` does, as far as files go; scores follow from seed and attention."""

    def __init__(self, monkeypatch, networks=False):
        self.calls = []
        self.fail = {}
        self.networks = networks
        monkeypatch.setattr(training, "run", self)

    def __call__(self, arguments):
        configs = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "--config"]
        options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        folder = Path(options["--trainer.default_root_dir"])
        variant, seed = folder.parent.name, int(options["--seed_everything"])
        self.calls.append((arguments[0], variant, seed, options.get("--ckpt_path")))
        if arguments[0] == "fit":
            self._fit(folder, variant, seed, yaml.safe_load(Path(configs[-1]).read_text())["model"])
        else:
            report = {"miou": 0.5 + 0.01 * seed + 0.02 * (variant == "se"), "per_class": {"a": 0.5}}
            (folder / "test/version_0").mkdir(parents=True)
            (folder / "test/version_0/test_metrics.json").write_text(json.dumps(report))

    def _fit(self, folder, variant, seed, model):
        version = folder / "fit" / f"version_{len(list(folder.glob('fit/*')))}"
        (version / "checkpoints").mkdir(parents=True)
        (version / "config.yaml").write_text("data: {init_args: {crop_size: 33}}\n")
        error = self.fail.get((variant, seed))
        if isinstance(error, RunInterruptedError):
            (version / "checkpoints/interrupted.ckpt").touch()
        if error is not None:
            raise error
        (version / "checkpoints/final.ckpt").touch()
        if not self.networks:
            return
        arguments = {"backbone": "resnet18", "num_classes": 2, "decoder_channels": 8} | model
        network = DeepLabV3(**arguments)
        state = {f"model.{key}": value for key, value in network.state_dict().items()}
        content = {"hyper_parameters": dict(network.config), "state_dict": state}
        torch.save(content, version / "checkpoints/final.ckpt")

    def fits(self):
        return [(variant, seed) for command, variant, seed, _ in self.calls if command == "fit"]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(variants, "_measure", lambda table: None)  # builds and times every network
    return FakeTraining(monkeypatch)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text("model: {backbone: resnet18}\n")
    return Recipe([path], ["--trainer.max_epochs", "1"])


def test_every_variant_runs_with_every_seed(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "TIMED_FORWARDS", 1)
    fake, said = FakeTraining(monkeypatch, networks=True), []
    names = resolve_variants(["none", "se", "aff"], "aspp", {})
    table = run_variants(recipe, names, [0, 1], tmp_path / "out", say=said.append)
    assert fake.fits() == [("none", 0), ("se", 0), ("none", 1), ("se", 1)]
    none, se, aff = table.rows
    assert [run.miou for run in se.runs] == [0.52, 0.53]
    assert se.difference(none) == pytest.approx((0.02, 0.0))
    assert (se.attention, se.fusion) == ({"aspp": "se"}, "aff")
    assert se.parameters - none.parameters == 2 * 8  # SE at 8 channels: one hidden channel
    assert se.flops > none.flops
    assert none.seconds_per_image > 0
    # The network of `aff` is that of `none`: it is not trained a second time.
    assert aff.same_as == "none"
    assert aff.runs == none.runs
    assert "one image of 33 × 33, CPU with 1 thread" in table.markdown()
    assert "`aff` (is `none`)" in table.markdown()
    assert said[1].startswith("[1/4] none, seed 0: mIoU 50.00 %, ")
    command, variant, seed, checkpoint = fake.calls[1]
    assert (command, variant, seed) == ("test", "none", 0)
    assert checkpoint.endswith("none/seed_0/fit/version_0/checkpoints/final.ckpt")
    assert yaml.safe_load((tmp_path / "out/se/overlay.yaml").read_text()) == dict(names[1].overlay)


def test_what_is_finished_is_not_run_again(fake, recipe, tmp_path):
    names = resolve_variants(["none", "se"], "aspp", {})
    before = run_variants(recipe, names[:1], [0], tmp_path / "out", say=lambda _: None)
    said = []
    table = run_variants(recipe, names, [0, 1], tmp_path / "out", say=said.append)
    assert fake.fits() == [("none", 0), ("se", 0), ("none", 1), ("se", 1)]
    assert said[0].endswith("from an earlier call")
    assert table.rows[0].runs[0] == before.rows[0].runs[0]


def test_a_stopped_run_goes_on_from_its_checkpoint(fake, recipe, tmp_path):
    names = resolve_variants(["none", "se"], "aspp", {})
    fake.fail["se", 0] = RunInterruptedError(2, None)
    with pytest.raises(RunInterruptedError):
        run_variants(recipe, names, [0], tmp_path / "out", say=lambda _: None)
    assert fake.fits() == [("none", 0), ("se", 0)]
    assert json.loads((tmp_path / "out/variants.json").read_text())["rows"][0]["miou_mean"] == 0.5
    clock = tmp_path / "out/se/seed_0/fit_seconds.txt"
    clock.write_text("100.0")
    del fake.fail["se", 0]
    table = run_variants(recipe, names, [0], tmp_path / "out", say=lambda _: None)
    assert fake.fits() == [("none", 0), ("se", 0), ("se", 0)]
    assert fake.calls[-2][3].endswith("se/seed_0/fit/version_0/checkpoints/interrupted.ckpt")
    assert fake.calls[-1][3].endswith("se/seed_0/fit/version_1/checkpoints/final.ckpt")
    assert table.rows[1].runs[0].fit_seconds > 100  # both parts


def test_a_failing_variant_does_not_stop_the_rest(fake, recipe, tmp_path):
    names = resolve_variants(["none", "se", "eca"], "aspp", {})
    fake.fail["se", 0] = RuntimeError("out of\nmemory")
    table = run_variants(recipe, names, [0, 1], tmp_path / "out", say=lambda _: None)
    assert fake.fits()[-1] == ("eca", 1)
    assert table.rows[1].errors == {0: "out of memory"}
    assert [run.seed for run in table.rows[1].runs] == [1]
    assert "- failed: `se`, seed 0: out of memory" in (tmp_path / "out/variants.md").read_text()


def test_runs_of_other_settings_are_not_mixed_in(fake, recipe, tmp_path):
    names = resolve_variants(["none", "se"], "aspp", {})
    run_variants(recipe, names, [0], tmp_path / "out", say=lambda _: None)
    other = Recipe(recipe.configs, ["--trainer.max_epochs", "2"])
    with pytest.raises(InputError, match="none/seed_0 holds a run with other settings: name another --output"):
        run_variants(other, names, [0], tmp_path / "out", say=lambda _: None)
    assert len(fake.fits()) == 2


def test_a_reason_that_all_share_is_said_once(fake, recipe, tmp_path):
    names = resolve_variants(["none", "se"], "aspp", {})
    fake.fail |= {(name, 0): InputError("no data at /nowhere") for name in ("none", "se")}
    with pytest.raises(InputError, match="every variant failed: no data at /nowhere"):
        run_variants(recipe, names, [0], tmp_path / "out", say=lambda _: None)


def test_the_command(fake, recipe, tmp_path, capsys):
    arguments = ["variants", "--config", str(recipe.configs[0]), "--output", str(tmp_path / "out")]
    arguments += ["--variants", "none", "se", "--seeds", "3", "--trainer.max_epochs", "1"]
    assert run(arguments) == 0
    assert fake.fits() == [("none", 3), ("se", 3)]
    said = capsys.readouterr().out
    assert "| `se` | 55.00 | +2.00 |" in said
    written = {path.name for path in (tmp_path / "out").glob("*.*")}
    assert written == {"variants.md", "variants.json", "variants.csv"}
    fake.fail["sk", 3] = RuntimeError("no")
    assert run([*arguments[:5], "--variants", "none", "sk", *arguments[-4:]]) == 1
    assert "error: sk, seed 3: no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.fusion", "add"], "--model.fusion is set by `variants` itself"),
        (["--ckpt_path=x"], "--ckpt_path=x is set by `variants` itself"),
        (["--seeds", "1", "1"], "--seeds must be different numbers from 0 on, got 1 1"),
        (["--seeds", "one"], "invalid int value: 'one'"),
    ],
)
def test_wrong_command_lines(recipe, tmp_path, extra, message):
    arguments = ["variants", "--config", str(recipe.configs[0]), "--output", str(tmp_path / "out"), *extra]
    with pytest.raises(InputError, match=message):
        run(arguments)
    assert not (tmp_path / "out").exists()


# --- the overlays ----------------------------------------------------------------------------------------------------


def test_every_block_and_every_fusion_has_an_overlay():
    overlays = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "attention").glob("*.yaml")}
    for name in ATTENTION:
        assert overlays[name] == {"model": {"attention": {"aspp": name}}}
    for name in FUSION:
        assert overlays[name] == {"model": {"fusion": name}}


@pytest.mark.parametrize("path", sorted((CONFIGS / "attention").glob("*.yaml")), ids=lambda path: path.stem)
def test_overlays_build(path):
    text = path.read_text()
    assert f"configs/attention/{path.name}" in text
    overlay = yaml.safe_load(text)
    assert list(overlay) == ["model"]
    with torch.device("meta"):
        model = DeepLabV3("resnet18", decoder_channels=32, **overlay["model"])
    for name, value in overlay["model"].items():
        assert model.config[name] == value


# --- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_config(devkit, tmp_path_factory):
    """A config for a very small network, whose atrous rates fit its crops."""
    model = {"backbone": "resnet18", "num_classes": len(SAMPLE_CLASSES), "decoder_channels": 16}
    data = {"root": str(devkit), "batch_size": 2, "num_workers": 0, "crop_size": 64}
    content = {
        "model": model | {"atrous_rates": [1, 2, 3], "lr": 0.05},
        "data": {"class_path": "VOCDataModule", "init_args": data},
        "trainer": {"max_epochs": 1},
    }
    path = tmp_path_factory.mktemp("variants") / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_training_for_real(small_config, tmp_path):
    arguments = ["variants", "--config", str(small_config), "--output", str(tmp_path), "--seeds", "0"]
    assert run([*arguments, "--variants", "none", "se@layer4", "--trainer.max_epochs", "2"]) == 0
    content = json.loads((tmp_path / "variants.json").read_text())
    none, se = content["rows"]
    assert se["attention"] == {"layer4": "se"}
    assert se["parameters"] - none["parameters"] == 2 * 512 * 32
    trained = se["runs"][0]
    checkpoint = load_checkpoint(trained["checkpoint"])
    assert checkpoint.model_arguments["attention"] == {"layer4": "se"}
    assert checkpoint.hyper_parameters["lr"] == 0.05  # the base config's
    assert 0 <= trained["miou"] <= 1
    assert list(trained["per_class"]) == list(SAMPLE_CLASSES)
    assert trained["fit_seconds"] > 0
    assert torch.load(trained["checkpoint"], weights_only=True)["epoch"] == 1  # the last, not the best
    assert "64 × 64" in content["measured"]


@pytest.mark.exhaustive
def test_every_default_variant_trains(small_config, tmp_path):
    arguments = ["variants", "--config", str(small_config), "--output", str(tmp_path), "--seeds", "0", "1"]
    assert run(arguments) == 0
    rows = json.loads((tmp_path / "variants.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(DEFAULT_VARIANTS)
    assert all(row["seeds"] == 2 and row["parameters"] for row in rows)
    assert rows[DEFAULT_VARIANTS.index("aff")]["same_as"] == "none"


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", sorted((CONFIGS / "attention").glob("*.yaml")), ids=lambda path: path.stem)
def test_overlays_train(path, small_config, tmp_path):
    arguments = ["fit", "--config", str(small_config), "--config", str(path)]
    training.run([*arguments, f"--trainer.default_root_dir={tmp_path}"])
    [best] = tmp_path.glob("fit/version_0/checkpoints/best.ckpt")
    arguments = load_checkpoint(best).model_arguments
    for name, value in yaml.safe_load(path.read_text())["model"].items():
        assert arguments[name] == value


def test_variants_are_immutable_values():
    variant = Variant("se", {"model": {"fusion": "add"}})
    assert Recipe([], []).fingerprint(variant, 0) != Recipe([], []).fingerprint(variant, 1)
    assert Recipe([], []).fingerprint(variant, 0) == Recipe([], []).fingerprint(Variant("x", variant.overlay), 0)


@pytest.mark.exhaustive
def test_a_stopped_comparison_ends_as_one_that_was_not(small_config, tmp_path, monkeypatch):
    """Stop the second run within its training, go on, and compare with a comparison that was left alone."""
    arguments = ["variants", "--config", str(small_config), "--variants", "none", "eca", "--seeds", "0"]
    arguments += ["--trainer.max_epochs", "3", "--trainer.deterministic", "true"]
    assert run([*arguments, "--output", str(tmp_path / "whole")]) == 0
    started = []

    def stop_the_second(callback, trainer, *_):
        started.append(trainer.global_step)
        if len(started) == 9 + 5:  # the first run has 3 epochs of 3 batches
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_start", stop_the_second, raising=False)
    with pytest.raises(RunInterruptedError):
        run([*arguments, "--output", str(tmp_path / "stopped")])
    monkeypatch.undo()
    assert run([*arguments, "--output", str(tmp_path / "stopped")]) == 0
    whole, stopped = (json.loads((tmp_path / name / "variants.json").read_text()) for name in ("whole", "stopped"))
    for left, right in zip(whole["rows"], stopped["rows"], strict=True):
        assert left["miou_mean"] == right["miou_mean"], left["variant"]
    first, second = (
        load_checkpoint(content["rows"][1]["runs"][0]["checkpoint"]).state_dict for content in (whole, stopped)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
