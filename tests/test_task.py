"""The Lightning module: optimiser, schedule, freezing, resuming, batches of one, and its checkpoints."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from seg_attn.checkpoint import DataInfo
from seg_attn.errors import InputError
from seg_attn.task import SegmentationTask, poly_factor

SMALL = {"backbone": "resnet18", "num_classes": 3, "decoder_channels": 8, "atrous_rates": [2, 4, 6]}


class Scenes(Dataset):
    """Images of large random patches whose label is a threshold of their brightness."""

    def __init__(self, count, size=(32, 32)):
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn(count, 3, 3, 3, generator=generator)
        self.images = nn.functional.interpolate(patches, size=size)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        mask = (image.mean(0) > 0).long() + (image.mean(0) > 0.5).long()
        mask[0] = 255
        return {"image": image, "mask": mask}


# The maps of 32 x 32 images are smaller than most rates; the test of that warning catches it before this filter.
pytestmark = pytest.mark.filterwarnings("ignore:atrous rate")


def _trainer(tmp_path, **kwargs):
    options = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    return pl.Trainer(**(options | kwargs))


def _loader(count=4, batch_size=2, **kwargs):
    # A generator of its own: otherwise each epoch takes a number from the stream that dropout draws from.
    return DataLoader(Scenes(count, **kwargs), batch_size=batch_size, generator=torch.Generator())


def _task(**kwargs):
    torch.manual_seed(0)
    return SegmentationTask(**(SMALL | {"lr": 0.05} | kwargs))


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 101, 10_000])
def test_poly_is_the_formula_and_never_below_zero(step):
    factor = poly_factor(step, 100, 0.9)
    assert isinstance(factor, float)
    assert factor == pytest.approx((1 - step / 100) ** 0.9 if step < 100 else 0.0, abs=1e-15)


def test_every_parameter_is_in_one_group(tmp_path):
    task = _task(aux_head=True, attention={"blocks": "se", "skip": "eca"}, residual_fusion="aff")
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(task, _loader())
    groups = trainer.optimizers[0].param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in task.parameters()}
    backbone = {id(parameter) for parameter in task.model.backbone.parameters()}
    assert {id(parameter) for parameter in groups[0]["params"]} == backbone
    assert groups[0]["initial_lr"] == pytest.approx(0.1 * groups[1]["initial_lr"])


def test_learning_rate_follows_poly_per_step(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    _trainer(tmp_path, callbacks=[Watch()]).fit(_task(), _loader())
    assert seen == [pytest.approx([0.005 * poly_factor(t, 4, 0.9), 0.05 * poly_factor(t, 4, 0.9)]) for t in range(4)]


def test_ten_steps_equal_five_and_five(tmp_path):
    whole = _task()
    _trainer(tmp_path, max_steps=10).fit(whole, _loader(10))
    first = _task()

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    _trainer(tmp_path, max_steps=10, callbacks=[Save()]).fit(first, _loader(10))
    resumed = _task(lr=0.05)
    _trainer(tmp_path, max_steps=10).fit(resumed, _loader(10), ckpt_path=tmp_path / "5.ckpt")
    for (name, expected), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name


def test_a_model_left_in_eval_mode_trains_in_training_mode(tmp_path):
    task = _task().eval()
    before = copy.deepcopy(task.model.backbone.bn1.running_mean)
    _trainer(tmp_path, max_steps=1).fit(task, _loader())
    assert not torch.equal(before, task.model.backbone.bn1.running_mean)


def test_frozen_batch_norm_stays_as_it_is(tmp_path):
    task = _task(freeze_bn=True)
    norms = {
        name: {key: value.clone() for key, value in module.state_dict().items()}
        for name, module in task.model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    weight = task.model.backbone.conv1.weight.detach().clone()
    _trainer(tmp_path, max_steps=-1, max_epochs=2).fit(task, _loader(), _loader(2, 1))
    assert len(norms) > 20
    for name, state in norms.items():
        for key, value in task.model.get_submodule(name).state_dict().items():
            assert torch.equal(value, state[key]), f"{name}.{key}"
    assert not torch.equal(weight, task.model.backbone.conv1.weight)


@pytest.mark.parametrize("fusion", ["add", "concat", "aff", "iaff"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_a_batch_of_one_trains(tmp_path, fusion, size):
    task = _task(fusion=fusion, aux_head=True, output_stride=32)
    before = task.model.classifier.weight.detach().clone()
    # Three images in batches of two: the last batch holds one.
    _trainer(tmp_path, max_steps=-1, max_epochs=1).fit(task, _loader(3, 2, size=size))
    assert not torch.equal(before, task.model.classifier.weight)
    assert all(torch.isfinite(value).all() for value in task.state_dict().values())


def test_training_reduces_the_loss(tmp_path):
    task = _task(aux_head=True, dropout=0.0, backbone_lr_multiplier=1.0)
    batch = next(iter(_loader(4, 4)))
    first = task._losses(batch, training=True)[1].item()
    _trainer(tmp_path, max_steps=20).fit(task, _loader(4, 4))
    task.train()
    assert task._losses(batch, training=True)[1].item() < 0.7 * first


def test_auxiliary_loss_has_its_weight():
    batch = next(iter(_loader(2, 2)))
    values = {}
    for weight in (0.0, 0.4, 1.0):
        task = _task(aux_head=True, aux_weight=weight, dropout=0.0).eval()
        values[weight] = task._losses(batch, training=True)[1].item()
        plain = task._losses(batch, training=False)[1].item()
        assert values[0.0] == pytest.approx(plain, rel=1e-6)
    assert values[0.4] - values[0.0] == pytest.approx(0.4 * (values[1.0] - values[0.0]), rel=1e-4)


def test_checkpoint_describes_itself(tmp_path):
    task = _task(fusion={"name": "aff", "reduction": 2}, attention={"aspp": ["se", {"name": "eca", "kernel_size": 5}]})
    task.data_info = DataInfo(["a", "b", "c"], [[0, 0, 0], [1, 2, 3], [4, 5, 6]], [0.1] * 3, [0.9] * 3)
    trainer = _trainer(tmp_path)
    trainer.fit(task, _loader())
    task.model.output_stride = 8
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    content = torch.load(tmp_path / "task.ckpt", weights_only=True)
    assert content["hyper_parameters"]["output_stride"] == 8
    assert content["hyper_parameters"]["lr"] == 0.05
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "task.ckpt")
    assert loaded.data_info == task.data_info
    images = torch.randn(1, 3, 33, 40)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(images), task.eval()(images))


def test_loading_never_looks_for_backbone_weights(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    trainer = _trainer(tmp_path)
    trainer.fit(_task(), _loader())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    content = torch.load(tmp_path / "task.ckpt", weights_only=True)
    content["hyper_parameters"]["backbone_weights"] = "imagenet"
    torch.save(content, tmp_path / "imagenet.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "imagenet.ckpt")
    assert loaded.hparams["backbone_weights"] == "imagenet"
    with pytest.raises(InputError, match="ImageNet weights of resnet18 are neither cached nor reachable"):
        _task(backbone_weights="imagenet")


def test_too_large_rates_are_said_once(tmp_path):
    with pytest.warns(UserWarning, match="atrous rates 6, 12 of ASPP at output stride 16") as caught:
        _trainer(tmp_path, max_steps=3).fit(_task(atrous_rates=[1, 6, 12]), _loader())
    assert sum("atrous rates" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0]}, "class_weights must hold one weight for each of the 3 classes, got 1"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"loss": "dice"}, "unknown loss 'dice'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _task(**arguments)


def test_training_starts_from_a_checkpoint(tmp_path, no_network):
    from seg_attn.checkpoint import save_model

    source = _task()
    save_model(tmp_path / "source.ckpt", source.model, source.data_info)
    torch.manual_seed(1)
    task = SegmentationTask(
        **SMALL, output_stride=8, init_from=str(tmp_path / "source.ckpt"), backbone_weights="imagenet"
    )
    assert task.model.output_stride == 8
    for key, value in source.model.state_dict().items():
        assert torch.equal(value, task.model.state_dict()[key]), key
    with pytest.raises(InputError, match="do not fit the model"):
        _task(init_from=str(tmp_path / "source.ckpt"), num_classes=4)
    trainer = _trainer(tmp_path)
    trainer.fit(task, _loader())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    (tmp_path / "source.ckpt").unlink()
    SegmentationTask.load_from_checkpoint(tmp_path / "tuned.ckpt")


def test_adamw_and_warm_up(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[1]["lr"])

    task = _task(optimizer="adamw", warmup_steps=2, lr=0.01)
    trainer = _trainer(tmp_path, callbacks=[Watch()])
    trainer.fit(task, _loader())
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert seen == pytest.approx([0.01 * min(1, (t + 1) / 3) * poly_factor(t, 4, 0.9) for t in range(4)])
    with pytest.raises(ValueError, match="optimizer must be 'sgd' or 'adamw', got 'adam'"):
        _task(optimizer="adam")
