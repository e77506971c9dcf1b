"""`seg-attn fit`, `validate` and `test`: one LightningCLI on `SegmentationTask` and a data module."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from seg_attn.attention import ATTENTION
from seg_attn.callbacks import Panels, PlainProgress, RunInterruptedError, StopOnSignal
from seg_attn.checkpoint import MODEL_PREFIX, Checkpoint, DataInfo, load_checkpoint
from seg_attn.data import MaskFolderDataModule, SampleDataModule, VOCDataModule
from seg_attn.data.dataset import end_workers
from seg_attn.errors import InputError
from seg_attn.models import DeepLabV3
from seg_attn.models.pretrained import check_keys, weights_follow
from seg_attn.parsing import show_choices
from seg_attn.report import per_class_table, write_metrics
from seg_attn.task import SegmentationTask

DATA_MODULES = (VOCDataModule, MaskFolderDataModule, SampleDataModule)
"""Imported here so that a config may name them without their module path."""


class TrainingCLI(LightningCLI):
    """LightningCLI in which what the user types wins over a checkpoint's hyper-parameters.

    LightningCLI merges the checkpoint over config files and command line alike; here it is merged below them, and every
    typed value that differs is said.
    """

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; that there are data is seen to later, in words that help."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(SegmentationTask, "model")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        show_choices(parser, "model.attention", "Names", ATTENTION)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep apart what was typed (config files and command line) from defaults."""
        self._typed_precision = any(str(argument).startswith("--trainer.precision") for argument in args)
        self.config = parser.parse_args(args)
        self.typed: Namespace = parser.parse_args(args, defaults=False)
        command = self.config.subcommand
        if self.config[command].data is None:
            raise InputError(
                f"no data: give --config FILE, or --data and --data.root DIR (see `seg-attn {command} --help`)"
            )

    def _parse_ckpt_path(self) -> None:
        """Fill in the checkpoint's hyper-parameters, mean and std where the user typed none."""
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        self.checkpoint: Checkpoint | None = None
        if path is None:
            if subcommand != "fit":
                self._take_initial_weights(subcommand)
            return
        self.checkpoint = load_checkpoint(path)
        self._normalise_as(self.checkpoint.data, path)
        kept = dict(self.checkpoint.hyper_parameters)
        for name, value in self._typed_model().items():
            before = kept.pop(name, value)
            if _plain(before) != _plain(value):
                print(f"model.{name}: {value} as given, instead of the checkpoint's {before}", file=sys.stderr)
        self.config = self.parser.parse_object({subcommand: {"model": kept}}, self.config)

    def _take_initial_weights(self, subcommand: str) -> None:
        """Evaluate the weights of `init_from`, which are a checkpoint's as well; there must be some."""
        source = self.config[subcommand].model.init_from
        if source is None:
            raise InputError(
                f"--ckpt_path is missing: name the checkpoint to {subcommand}, such as "
                "runs/fit/version_0/checkpoints/best.ckpt"
            )
        self._normalise_as(load_checkpoint(source).data, source)

    def _normalise_as(self, trained: DataInfo, path: str | Path) -> None:
        """Fill in the mean and std of a checkpoint's training, and say where typed ones differ."""
        arguments = self.config[self.config.subcommand].data.get("init_args", {})
        typed = self.typed[self.config.subcommand].data.get("init_args", {})
        differing = []
        for name, value in (("mean", trained.mean), ("std", trained.std)):
            if name not in typed:
                if name in arguments:
                    arguments[name] = value
            elif _plain(typed[name]) != value:
                differing.append((f"data.{name} {_plain(typed[name])}", f"{name} {value}"))
        if differing:
            given, trained_with = (", ".join(texts) for texts in zip(*differing, strict=True))
            print(
                f"warning: images are normalised as given ({given}), not as in the training of {path} ({trained_with})",
                file=sys.stderr,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands that train and evaluate; `predict` is one of ours."""
        skipped = {"model", "datamodule", "weights_only"}
        return {
            "fit": skipped | {"train_dataloaders", "val_dataloaders"},
            "validate": skipped | {"dataloaders", "verbose"},
            "test": skipped | {"dataloaders", "verbose"},
        }

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a model that a checkpoint fills is built without its backbone weights."""
        if self.checkpoint is None:
            super().instantiate_classes()
            return
        with weights_follow():
            super().instantiate_classes()
        own = {key: value for key, value in self.model.state_dict().items() if key.startswith("model.")}
        try:
            check_keys(own, self.checkpoint.state_dict, str(self.checkpoint.path))
        except InputError as error:
            raise InputError(self._typed_against_checkpoint() or str(error)) from error

    def after_instantiate_classes(self) -> None:
        """Compare the classes of model and data before anything is written."""
        assert isinstance(self.model, SegmentationTask)
        if not isinstance(self.datamodule, SampleDataModule):  # which may be yet to be written
            self.datamodule.setup(self.subcommand)
        self.model.take_data_info(self.datamodule)

    def _typed_against_checkpoint(self) -> str:
        assert self.checkpoint is not None
        arguments = self.checkpoint.model_arguments
        differing = [
            f"model.{name} is {_plain(value)!r} here and {_plain(arguments[name])!r} in the checkpoint"
            for name, value in self._typed_model().items()
            if name in arguments and _plain(value) != _plain(arguments[name]) and self._other_weights(name, value)
        ]
        return (
            f"{self.checkpoint.path} holds another network: {'; '.join(differing)}; "
            "leave out what differs to take the checkpoint's"
            if differing
            else ""
        )

    def _other_weights(self, name: str, value: Any) -> bool:
        """Whether the checkpoint's network with this one argument changed has other keys or shapes."""
        assert self.checkpoint is not None
        try:
            with torch.device("meta"), weights_follow():
                changed = DeepLabV3(**{**self.checkpoint.model_arguments, name: _plain(value)})
        except ValueError:  # it goes with another argument only
            return True
        own = {f"{MODEL_PREFIX}{key}": tensor.shape for key, tensor in changed.state_dict().items()}
        return own != {key: tensor.shape for key, tensor in self.checkpoint.state_dict.items()}

    def _typed_model(self) -> dict[str, Any]:
        """The model's hyper-parameters that a config file or the command line names."""
        return dict(self.typed[self.config.subcommand].get("model") or {})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks every run has, and log to TensorBoard and CSV unless told otherwise."""
        config = self._get(self.config_init, "trainer", default={})
        if self.subcommand != "fit" and not self._typed_precision:
            # A config's precision is that of training. Evaluation agrees with `predict`, which runs in full precision.
            kwargs["precision"] = "32-true"
        root = config.get("default_root_dir") or "runs"
        if config.get("logger") in (None, True):
            board = TensorBoardLogger(root, name=self.subcommand, default_hp_metric=False)
            kwargs["logger"] = [board, CSVLogger(root, name=self.subcommand, version=board.version)]
        kwargs["callbacks"] = [*(config.get("callbacks") or []), *self._callbacks(config)]
        # Ours say the same in fewer words.
        kwargs["enable_model_summary"] = bool(config.get("enable_model_summary"))
        try:
            return super().instantiate_trainer(**kwargs)
        except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
            raise InputError(self._wrong_trainer(str(error))) from error

    def _wrong_trainer(self, reason: str) -> str:
        """Lightning's words, behind the typed arguments that they are about."""
        typed = dict(self.typed[self.config.subcommand].get("trainer") or {})
        named = [
            f"trainer.{name} {value}"
            for name, value in typed.items()
            if name in reason or (isinstance(value, str) and value in reason)
        ]
        return f"{', '.join(named) or 'trainer'}: {reason.rstrip('.! ')}; give another value, or leave it out"

    def _callbacks(self, config: Any) -> list[Callback]:
        given = config.get("callbacks") or []
        bar = config.get("enable_progress_bar") is not False
        callbacks: list[Callback] = []
        if bar and sys.stderr.isatty():
            callbacks.append(TQDMProgressBar())
        elif bar:
            config["enable_progress_bar"] = False
            callbacks.append(PlainProgress())
        if self.subcommand != "fit":
            return callbacks
        callbacks.append(StopOnSignal())
        if config.get("logger") is not False:
            callbacks += [LearningRateMonitor("step"), Panels()]
        # With `fast_dev_run` Lightning's own callback would still write `last.ckpt`, into the working folder.
        saves = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        if saves and not any(isinstance(c, ModelCheckpoint) for c in given):
            callbacks.append(
                ModelCheckpoint(
                    monitor="val/miou", mode="max", filename="best", save_last=True, auto_insert_metric_name=False
                )
            )
        return callbacks

    def validate(self, **kwargs: Any) -> None:
        """Validate; the table is ours."""
        self.trainer.validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """Test; the table is ours."""
        self.trainer.test(**kwargs, verbose=False)

    def after_fit(self) -> None:
        """Say what was reached and where it is."""
        if not getattr(self.trainer, "fast_dev_run", False):
            print(f"run: {self.trainer.log_dir}")
        saver = self.trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint) and saver.best_model_path:
            print(f"best checkpoint: {saver.best_model_path} (val/miou {float(saver.best_model_score or 0):.4f})")

    def after_validate(self) -> None:
        """Print and write the metrics."""
        self._conclude("val", "validate")

    def after_test(self) -> None:
        """Print and write the metrics."""
        self._conclude("test", "test")

    def _conclude(self, key: str, stage: str) -> None:
        assert isinstance(self.model, SegmentationTask)
        if not self.trainer.is_global_zero or key not in self.model.results:
            return
        report = {
            **self.model.results[key],
            "output_stride": self.model.model.output_stride,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint.path),
        }
        print(f"\noutput stride {report['output_stride']}\n{per_class_table(report)}")
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        for path in write_metrics(report, folder, stage):
            print(f"written: {path}")


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _hush() -> None:
    """Leave out what Lightning says that is of no use to the person who runs a command."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    for noise in (
        "Experiment logs directory",  # two loggers share a run's folder, on purpose
        "The number of training batches",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own use of torch
        "Found .* module\\(s\\) in eval mode at the start of training",  # frozen batch normalisation
        "The dirpath has changed from",  # a resumed run has a folder of its own
        "Be aware that when using `ckpt_path`, callbacks",
        "The '.*_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=noise)


def run(arguments: list[str]) -> None:
    """Run `fit`, `validate` or `test` with the arguments of the command line, the command's name first."""
    _hush()
    try:
        _run(arguments)
    except RunInterruptedError:
        end_workers()
        raise


def _run(arguments: list[str]) -> None:
    TrainingCLI(
        SegmentationTask,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"prog": "seg-attn", "exit_on_error": False, "description": "Train and evaluate."},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=arguments,
    )
