import json
import os
import pickle
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from seg_attn.data import MaskFolderDataModule, SampleDataModule, SegmentationDataModule, VOCDataModule, datamodules
from seg_attn.data.dataset import BatchKey, EvalBatches, EvalSampler, SampleKey, TrainSampler, read_pair
from seg_attn.data.images import normalize, read_image, read_mask, voc_palette, write_mask
from seg_attn.data.voc import VOC_CLASSES
from seg_attn.errors import InputError

CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
QUIET = {"color_jitter": [0, 0, 0, 0], "scale": [1, 1], "flip": 0}


def voc(root, **kwargs):
    return VOCDataModule(str(root), **({"batch_size": 2, "num_workers": 0, "crop_size": 32} | kwargs))


def instantiate(parser, config):
    # Older jsonargparse knows only the second name, newer ones deprecate it.
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestDescription:
    def test_attributes(self, voc_root):
        data = voc(voc_root)
        assert data.class_names == list(VOC_CLASSES)
        assert data.num_classes == 21
        assert data.palette == voc_palette(21).tolist()
        assert data.mean == [0.485, 0.456, 0.406]
        assert data.std == [0.229, 0.224, 0.225]
        assert data.ignore_index == 255

    def test_class_names_of_the_devkit_or_the_user(self, make_devkit, tmp_path):
        make_devkit(tmp_path, {"train": [("a", 8, 9)]}, classes=2)
        (tmp_path / "VOCdevkit" / "VOC2012" / "class_names.txt").write_text("background\nkite\n")
        assert voc(tmp_path).class_names == ["background", "kite"]
        assert voc(tmp_path, class_names=["x", "y", "z"]).num_classes == 3

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
            ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
            ({"seed": -1}, "seed must be at least 0"),
            ({"mean": [0.5]}, "mean and std must hold three numbers"),
            ({"std": [0.5, 0.5, 0]}, "std positive"),
            ({"crop_size": 0}, "crop_size must be a positive number"),
            ({"crop_size": [32]}, "crop_size must be a positive number"),
            ({"scale": [1]}, "scale must be"),
            ({"flip": 2}, "flip must lie in"),
            ({"cache": "disk"}, 'cache must be "none" or "ram"'),
            ({"crop_class_max": 0}, "class_max must lie in"),
        ],
    )
    def test_wrong_arguments(self, voc_root, arguments, match):
        with pytest.raises(ValueError, match=match):
            voc(voc_root, **arguments)

    @pytest.mark.parametrize("kind", [VOCDataModule, MaskFolderDataModule, SampleDataModule])
    def test_from_yaml(self, kind, voc_root):
        """What LightningCLI does: parse, instantiate, write the config, read it back."""
        parser = ArgumentParser()
        parser.add_subclass_arguments(SegmentationDataModule, "data")
        arguments = {"root": str(voc_root), "crop_size": [32, 48], "mean": [0.5, 0.5, 0.5], "seed": 3}
        if kind is MaskFolderDataModule:
            arguments |= {"class_names": ["a", "b"], "ignore_index": [7, 9], "label_map": {3: 1}, "cache": "ram"}
        config = parser.parse_object({"data": {"class_path": f"seg_attn.data.{kind.__name__}", "init_args": arguments}})
        dumped = yaml.safe_load(parser.dump(config))
        again = parser.parse_object(dumped)
        data = instantiate(parser, again).data
        assert isinstance(data, kind)
        assert data.mean == [0.5, 0.5, 0.5]
        assert data.train_transform[0].size == (32, 48)

    def test_every_argument_is_documented(self):
        parser = ArgumentParser()
        for kind in (VOCDataModule, MaskFolderDataModule, SampleDataModule):
            parser.add_class_arguments(kind, kind.__name__)
        undocumented = [
            action.dest for action in parser._actions if "." in action.dest and not (action.help or "").strip(" ()")
        ]
        assert undocumented == []


class TestSamples:
    def test_eval_images_are_whole_and_equal_predict(self, voc_root):
        data = voc(voc_root)
        data.setup("validate")
        batches = list(data.val_dataloader())
        assert [batch["index"].tolist() for batch in batches] == [[0], [1], [2], [3], [4]]
        for batch, pair in zip(batches, data.dataset("val").pairs, strict=True):
            assert torch.equal(batch["image"][0], normalize(read_image(pair.image), data.mean, data.std))
            np.testing.assert_array_equal(batch["mask"][0].numpy(), read_mask(pair.mask))
            assert batch["image"].dtype == torch.float32
            assert batch["mask"].dtype == torch.int64
            assert batch["image"].is_contiguous(memory_format=torch.channels_last)

    def test_train_normalises_to_the_same_bits(self, voc_root):
        data = voc(voc_root, crop_size=[30, 40], **QUIET)
        dataset = data.dataset("train", augment=True)
        for index, pair in enumerate(dataset.pairs):
            sample = dataset[SampleKey(index, 5)]
            whole = normalize(read_image(pair.image), data.mean, data.std)
            inside = sample["mask"] >= 0
            found = any(
                torch.equal(whole[:, y : y + 30, x : x + 40], sample["image"])
                for y in range(whole.shape[1] - 29)
                for x in range(whole.shape[2] - 39)
            )
            assert found
            assert inside.all()

    def test_train_batches(self, voc_root):
        data = voc(voc_root, crop_size=[32, 48], batch_size=3)
        batches = list(data.train_dataloader())
        assert len(batches) == 2  # seven images: the partial third batch is dropped
        for batch in batches:
            assert batch["image"].shape == (3, 3, 32, 48)
            assert batch["image"].is_contiguous(memory_format=torch.channels_last)
            assert batch["mask"].shape == (3, 32, 48)
        assert len({index for batch in batches for index in batch["index"].tolist()}) == 6

    @pytest.mark.parametrize(("batch_size", "sizes"), [(7, [7]), (8, [7]), (100, [7]), (4, [4]), (1, [1] * 7)])
    def test_drop_last_only_where_another_batch_is_left(self, voc_root, batch_size, sizes):
        assert [len(batch["index"]) for batch in voc(voc_root, batch_size=batch_size).train_dataloader()] == sizes

    def test_the_test_split_is_val_unless_named(self, voc_root):
        assert len(voc(voc_root).test_dataloader()) == 5
        assert len(voc(voc_root, test_split="train").test_dataloader()) == 7

    def test_images_without_labels_serve_to_predict_only(self, voc_root):
        data = voc(voc_root, test_split="test")
        with pytest.raises(InputError, match="split 'test' has no masks, so it serves to predict only"):
            data.setup("test")
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert batch.keys() == {"image", "index"}
        assert batch["image"].shape == (1, 3, 33, 44)

    def test_class_balanced_crops(self, make_devkit, tmp_path):
        make_devkit(tmp_path, {"train": [("a", 200, 200)]})
        mask = np.zeros((200, 200), np.uint8)
        mask[80:120, 80:120] = 1
        write_mask(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a.png", mask, voc_palette())
        share = []
        for limit in (1.0, 0.75):
            dataset = voc(tmp_path, crop_size=64, crop_class_max=limit, **QUIET).dataset("train", augment=True)
            share.append(np.mean([(dataset[SampleKey(0, e)]["mask"] == 0).float().mean() < 0.75 for e in range(100)]))
        assert share[0] < 0.25
        assert share[1] > 0.6

    @pytest.mark.parametrize("workers", [0, 2])
    def test_bad_files_are_one_line(self, make_devkit, tmp_path, workers):
        make_devkit(tmp_path, {"train": [("a", 20, 30), ("b", 20, 30)], "val": [("a", 20, 30)]})
        folder = tmp_path / "VOCdevkit" / "VOC2012"
        bad = folder / "SegmentationClass" / "b.png"
        good = bad.read_bytes()

        def error():
            with pytest.raises(InputError) as caught:
                list(voc(tmp_path, num_workers=workers, batch_size=1).train_dataloader())
            assert "\n" not in str(caught.value)
            return str(caught.value)

        write_mask(bad, np.full((20, 30), 34), voc_palette())
        assert error().startswith(f"{bad}: labels 34 are neither one of the 21 classes (0..20) nor ignored (255)")
        write_mask(bad, np.zeros((30, 20), int), voc_palette())
        assert error().startswith(f"{bad}: the mask is 20x30, its image {folder / 'JPEGImages' / 'b.jpg'} is 30x20")
        bad.write_bytes(good[:50])
        assert error().startswith(f"{bad}: not a readable mask")


class TestDeterminism:
    @pytest.fixture
    def four_cores(self, monkeypatch):
        monkeypatch.setattr(datamodules, "_cores", lambda: 4)

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    def test_batches_are_bit_equal_whatever_the_workers(self, voc_root, four_cores):
        runs = []
        for workers in (0, 1, 4):
            loader = voc(voc_root, num_workers=workers, seed=3).train_dataloader()
            assert loader.num_workers == workers
            assert loader.persistent_workers == (workers > 0)
            runs.append([list(loader) for _ in range(3)])  # three epochs, persistent workers
        for other in runs[1:]:
            for epoch, reference in zip(other, runs[0], strict=True):
                assert all(equal(a, b) for a, b in zip(epoch, reference, strict=True))
        by_index = [
            {int(i): image for batch in epoch for i, image in zip(batch["index"], batch["image"], strict=True)}
            for epoch in runs[0]
        ]
        for one, two in ((0, 1), (0, 2), (1, 2)):
            shared = by_index[one].keys() & by_index[two].keys()
            assert shared
            assert all((by_index[one][index] != by_index[two][index]).any() for index in shared)
        assert list(by_index[0]) != list(by_index[1])

    def test_seeds(self, voc_root, monkeypatch):
        first = lambda **kwargs: next(iter(voc(voc_root, **kwargs).train_dataloader()))  # noqa: E731
        assert equal(first(seed=1), first(seed=1))
        assert not equal(first(seed=1), first(seed=2))
        monkeypatch.setenv("PL_GLOBAL_SEED", "2")  # what `seed_everything` leaves
        assert equal(first(), first(seed=2))
        torch.manual_seed(5)
        np.random.seed(5)
        assert equal(first(), first(seed=2))

    def test_the_global_generators_are_left_alone(self, voc_root):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        dataset = voc(voc_root).dataset("train", augment=True)
        dataset[SampleKey(0, 0)]
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()

    def test_lightning_tells_the_epoch(self, voc_root, tmp_path):
        """The crops of epoch n are those of a run resumed at n, and every epoch is another."""

        class Watch(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1)
                self.seen = {}

            def training_step(self, batch, batch_idx):
                self.seen.setdefault(self.current_epoch, []).append(batch["image"].double().sum().item())
                return self.layer(torch.zeros(1, 1)).sum()

            def validation_step(self, batch, batch_idx):
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def fit(module, epochs, **kwargs):
            trainer = pl.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                default_root_dir=tmp_path,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(module, datamodule=voc(voc_root, seed=4, num_workers=1), **kwargs)
            return trainer

        whole, part, rest = Watch(), Watch(), Watch()
        fit(whole, 3)
        fit(part, 1).save_checkpoint(tmp_path / "part.ckpt")
        fit(rest, 3, ckpt_path=tmp_path / "part.ckpt")
        assert len({tuple(sums) for sums in whole.seen.values()}) == 3
        assert part.seen | rest.seen == whole.seen
        assert rest.seen.keys() == {1, 2}


class TestEvaluationBatches:
    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_one_size_per_batch_and_every_image_once(self, voc_root, batch_size):
        data = voc(voc_root, val_split="train", eval_batch_size=batch_size)
        seen = []
        for batch in data.val_dataloader():
            assert len(batch["index"]) <= batch_size
            for index, image, mask in zip(batch["index"].tolist(), batch["image"], batch["mask"], strict=True):
                image_, mask_ = read_pair(data.dataset("train").pairs[index], data.label_reader)
                assert torch.equal(image, normalize(image_, data.mean, data.std))
                assert torch.equal(mask, torch.from_numpy(mask_).long())
                seen.append(index)
        assert sorted(seen) == list(range(7))
        expected = {1: 7, 2: 4, 3: 4}  # four of 40x56, two of 48x40, one of 30x64
        assert len(list(data.val_dataloader())) == expected[batch_size]

    @pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 9])
    def test_processes_share_the_batches(self, voc_root, world):
        batches = EvalBatches(voc(voc_root).dataset("train"))
        keys = [list(EvalSampler(batches, world, rank)) for rank in range(world)]
        assert len({len(k) for k in keys}) == 1
        real = sorted(key.batch for rank in keys for key in rank if not key.blank)
        assert real == list(range(7))
        blank = batches[BatchKey(2, blank=True)]
        assert blank["index"].tolist() == [-1]
        assert (blank["mask"] == 255).all()
        assert blank["image"].shape == batches[2]["image"].shape

    def test_train_sampler_shares_and_counts_epochs(self):
        data = list(range(7))
        samplers = [TrainSampler(data, num_replicas=2, rank=rank, shuffle=True, seed=1) for rank in range(2)]
        for epoch in range(2):
            keys = [list(sampler) for sampler in samplers]
            assert {key.epoch for rank in keys for key in rank} == {epoch}
            assert sorted({key.sample for rank in keys for key in rank}) == data
            assert len(keys[0]) == len(keys[1]) == 4
        samplers[0].set_epoch(9)
        assert next(iter(samplers[0])).epoch == 9

    def test_two_processes_count_what_one_counts(self, voc_root, tmp_path):
        """gloo, an odd set, Lightning's own loops: no image twice, none left out, and nobody waits for ever."""
        script = tmp_path / "run.py"
        script.write_text(
            textwrap.dedent(
                """
                import json, sys, warnings
                import pytorch_lightning as pl, torch
                from torch import nn
                from seg_attn.data import VOCDataModule
                warnings.filterwarnings("ignore")

                class Count(pl.LightningModule):
                    def __init__(self):
                        super().__init__()
                        self.layer = nn.Linear(1, 1)
                        self.seen, self.labels, self.trained = [], torch.zeros(256, dtype=torch.int64), []
                    def training_step(self, batch, batch_idx):
                        self.trained += batch["index"].tolist()
                        return self.layer(torch.zeros(1, 1)).sum()
                    def validation_step(self, batch, batch_idx):
                        self.seen += batch["index"].tolist()
                        self.labels += batch["mask"].flatten().bincount(minlength=256)
                    test_step = validation_step
                    def configure_optimizers(self):
                        return torch.optim.SGD(self.parameters(), lr=0.1)

                root, out = sys.argv[1:]
                data = VOCDataModule(root, batch_size=2, num_workers=1, crop_size=32, test_split="train")
                trainer = pl.Trainer(
                    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1,
                    logger=False, enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0,
                    enable_model_summary=False, default_root_dir=out,
                )
                model = Count()
                trainer.fit(model, datamodule=data)
                trainer.test(model, datamodule=data, verbose=False)
                result = {"seen": model.seen, "trained": model.trained, "labels": model.labels.tolist()}
                json.dump(result, open(f"{out}/{trainer.global_rank}.json", "w"))
                """
            )
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, str(script), str(voc_root), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
        seen = [index for rank in two for index in rank["seen"] if index >= 0]
        assert sorted(seen) == sorted([*range(5), *range(7)])  # val, then train as the test split
        assert [len(rank["seen"]) for rank in two] == [7, 7]  # 3 + 4 each, the blank ones included
        data = voc(voc_root)
        masks = [data.dataset(split)[i]["mask"] for split in ("val", "train") for i in range(len(data.dataset(split)))]
        expected = torch.cat([mask.flatten() for mask in masks]).bincount(minlength=256)
        labels = np.sum([rank["labels"] for rank in two], axis=0)
        assert labels[:255].tolist() == expected[:255].tolist()
        # Seven samples for two processes: one is seen twice, so that all take the same number of steps.
        assert [len(rank["trained"]) for rank in two] == [4, 4]
        assert {index for rank in two for index in rank["trained"]} == set(range(7))


class TestLoading:
    def test_workers_are_limited_to_the_cores(self, voc_root, monkeypatch):
        monkeypatch.setattr(datamodules, "_cores", lambda: 1)
        loader = voc(voc_root, num_workers=8).train_dataloader()
        assert loader.num_workers == 1
        assert loader.persistent_workers
        assert loader.pin_memory == torch.cuda.is_available()
        assert not voc(voc_root, num_workers=0).val_dataloader().persistent_workers

    def test_idle_workers_do_not_hold_up_the_exit(self, voc_root):
        code = f"""
from seg_attn.data import VOCDataModule
loader = VOCDataModule({str(voc_root)!r}, batch_size=2, num_workers=1, crop_size=16).train_dataloader()
list(loader)
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, timeout=25, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert done.stderr == ""

    def test_workers_end_with_the_run(self, voc_root):
        data = voc(voc_root, num_workers=2)
        loader = data.train_dataloader()
        first = [batch["index"].tolist() for batch in loader]
        workers = loader._iterator._workers
        assert all(worker.is_alive() for worker in workers)  # persistent
        began = time.monotonic()
        data.teardown("fit")
        assert not any(worker.is_alive() for worker in workers)
        assert time.monotonic() - began < 4
        assert [batch["index"].tolist() for batch in loader] != first  # and new ones start where they are needed
        data.teardown("fit")

    def test_cache_changes_nothing_but_the_reading(self, voc_root, monkeypatch):
        plain = voc(voc_root, seed=1).train_dataloader()
        cached = voc(voc_root, seed=1, cache="ram").train_dataloader()
        for _ in range(2):
            for a, b in zip(plain, cached, strict=True):
                assert equal(a, b)
        cache = cached.dataset.cache
        cached.dataset[0], cached.dataset[6]
        for index in range(7):
            cached.dataset[index]
        assert cache.used == cache.capacity == 4 * (4 * 40 * 56 + 2 * 48 * 40 + 30 * 64)
        monkeypatch.setattr("seg_attn.data.dataset.read_pair", None)
        assert equal(*({k: torch.as_tensor(v) for k, v in cached.dataset[3].items()} for _ in range(2)))

    def test_cache_is_shared_between_workers_and_bounded(self, voc_root):
        one_image = 4 * 40 * 56
        data = voc(voc_root, num_workers=2, cache="ram", cache_bytes=2 * one_image + 100)
        loader = data.train_dataloader()
        list(loader)
        cache = data.dataset("train", augment=True).cache
        assert 0 < cache.used <= cache.capacity == 2 * one_image + 100
        # The workers' writes are seen in this process.
        kept = [index for index in range(7) if cache.get(index) is not None]
        assert 1 <= len(kept) <= 2
        for index in kept:
            image, mask = read_pair(data.dataset("train", augment=True).pairs[index], data.label_reader)
            np.testing.assert_array_equal(cache.get(index)[0], image)
            np.testing.assert_array_equal(cache.get(index)[1], mask)
        # The second data set gets what the first one left.
        assert data.dataset("val").cache.capacity == 0

    def test_class_counts_are_kept(self, voc_root, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        counts = voc(voc_root).class_counts()
        masks = [read_mask(pair.mask) for pair in voc(voc_root).dataset("train").pairs]
        total = np.sum([np.bincount(mask.ravel(), minlength=256) for mask in masks], axis=0)
        assert counts.pixels == total[:21].tolist()
        assert counts.ignored == total[255]
        assert counts.images == [sum((mask == label).any() for mask in masks) for label in range(21)]
        monkeypatch.setattr("seg_attn.data.labels.read_mask", None)
        assert voc(voc_root).class_counts() == counts
        weights = voc(voc_root).class_weights()
        occurring = [weight for weight, pixels in zip(weights, counts.pixels, strict=True) if pixels]
        assert np.mean(occurring) == pytest.approx(1)


class TestSampleDataModule:
    def test_writes_what_is_missing(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(
            "seg_attn.data.sample.write_sample", lambda root, **kwargs: written.append((root, kwargs)), raising=False
        )
        data = SampleDataModule(str(tmp_path / "sample"), sample_seed=3)
        assert data.class_names[0] == "background"
        assert data.num_classes == len(data.palette) >= 9
        data.prepare_data()
        assert written == [(str(tmp_path / "sample"), {"seed": 3})]

    def test_end_to_end(self, devkit):
        data = SampleDataModule(str(devkit), batch_size=2, num_workers=0, crop_size=32)
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (2, 3, 32, 32)
        assert set(batch["mask"].unique().tolist()) <= {*range(data.num_classes), 255}
        assert len(data.val_dataloader()) == 3


class TestMaskFolder:
    def test_camvid(self, real_data):
        config = yaml.safe_load(
            f"""
class_path: seg_attn.data.MaskFolderDataModule
init_args:
  root: {real_data / "camvid"}
  class_names: {CAMVID}
  ignore_index: 11
"""
        )
        parser = ArgumentParser()
        parser.add_subclass_arguments(SegmentationDataModule, "data")
        data = instantiate(parser, parser.parse_object({"data": config})).data
        data.setup()
        assert len(data.dataset("train")) == 367
        assert len(data.dataset("val")) == 101
        batch = data.dataset("val")[0]
        assert batch["image"].shape == (3, 360, 480)
        assert set(batch["mask"].unique().tolist()) <= {*range(11), 255}

    def test_colour_masks_and_csv(self, tmp_path):
        colors = [[0, 0, 0], [255, 0, 0]]
        rng = np.random.default_rng(0)
        stored = rng.integers(0, 2, (20, 24))
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "i.png")
        Image.fromarray(np.array(colors, np.uint8)[stored]).save(tmp_path / "m.png")
        (tmp_path / "pairs.csv").write_text("image,mask,split\ni.png,m.png,train\ni.png,m.png,val\n")
        data = MaskFolderDataModule(
            str(tmp_path), ["ground", "roof"], csv="pairs.csv", colors=colors, num_workers=0, crop_size=16
        )
        assert data.palette == colors
        assert torch.equal(data.dataset("val")[0]["mask"], torch.from_numpy(stored))

    def test_class_names_from_the_folder(self, tmp_path):
        (tmp_path / "class_names.txt").write_text("road\ncar\n")
        assert MaskFolderDataModule(str(tmp_path)).class_names == ["road", "car"]
        (tmp_path / "class_names.txt").unlink()
        with pytest.raises(InputError, match=r"class_names\.txt: no such list file"):
            MaskFolderDataModule(str(tmp_path))


def test_a_data_set_travels_to_spawned_workers(voc_root):
    dataset = voc(voc_root).dataset("train", augment=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[SampleKey(1, 2)]["image"], dataset[SampleKey(1, 2)]["image"])


def test_plain_loader_keys(voc_root):
    """Lightning's `overfit_batches` puts plain samplers in place of ours: plain indices work too."""
    data = voc(voc_root)
    dataset = data.dataset("train", augment=True)
    assert equal({"image": dataset[2]["image"]}, {"image": dataset[SampleKey(2, 0)]["image"]})
    batches = EvalBatches(data.dataset("val"))
    assert [batch["index"].tolist() for batch in DataLoader(batches, batch_size=None)] == [[i] for i in range(5)]
