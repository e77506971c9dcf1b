"""Callbacks of a training run: stopping without loss, plain progress lines, pictures of what the network sees."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from seg_attn.data.progress import Progress
from seg_attn.draw import colorize
from seg_attn.task import SegmentationTask, predicted_classes

Handler = Callable[[int, FrameType | None], Any] | int | None


class RunInterruptedError(Exception):
    """A fit was stopped by a signal.

    Attributes:
        signum: The signal.
        checkpoint: Where the run can be resumed from; None if it ended before that.
        exit_code: What the process should leave with, 128 + the signal's number.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        self.exit_code = 128 + signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        kept = f"resume with `seg-attn fit ... --ckpt_path {checkpoint}`" if checkpoint else "no checkpoint was written"
        super().__init__(f"interrupted by {name}: {kept}")


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM finish the batch, write `interrupted.ckpt` and end the run; a second signal ends it at once.

    A checkpoint written at any other moment could hold half an optimiser step. A signal that comes with an epoch's last
    batch or in its validation lets the validation finish first: a run resumed in between would leave it out. The
    checkpoint is written before it all the same, for a scheduler that does not wait.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._saved: Path | None = None
        self._previous: dict[int, Handler] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning's own handlers would save nothing."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:
            self._release()
            raise RunInterruptedError(signum, self._saved)
        self._received = signum
        print("\nstopping at the next safe point; once more stops at once", file=sys.stderr, flush=True)

    def _release(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal has come, and stop unless a validation follows."""
        if self._received is not None:
            self._save(trainer)
            if not trainer.is_last_batch:
                self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop if a signal has come."""
        if self._received is not None:
            self._save(trainer)
            self._stop()

    def _save(self, trainer: Trainer) -> None:
        self._saved = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(self._saved)

    def _stop(self) -> None:
        assert self._received is not None
        self._release()
        raise RunInterruptedError(self._received, self._saved)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._release()


class PlainProgress(Callback):
    """A line per epoch, and one now and then in long work: for logs and pipes, where a progress bar would be noise."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._validated = False
        self._epoch = self._evaluation = Progress("", 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._started = time.monotonic()
        self._validated = False
        self._epoch = Progress(_epoch(trainer), trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far the epoch is; a resumed one does not begin at its first batch."""
        if trainer.is_global_zero:
            self._epoch.advance(batch_idx + 1 - self._epoch.done)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._evaluation = Progress("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._evaluation = Progress("test", sum(trainer.num_test_batches))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Say how far the validation is."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._evaluation.advance()

    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Say how far the test is."""
        if trainer.is_global_zero:
            self._evaluation.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch has figures of its own; Lightning keeps an earlier epoch's."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's loss, its mIoU if there was a validation, and its time."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        names = ("train/loss_epoch", "val/loss", "val/miou") if self._validated else ("train/loss_epoch",)
        parts = [
            _epoch(trainer),
            f"step {trainer.global_step}",
            *(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics),
            f"{time.monotonic() - self._started:.1f} s",
        ]
        print("  ".join(parts).replace("train/loss_epoch", "train/loss"), flush=True)


def _epoch(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs or '?'}"


class Panels(Callback):
    """After each validation, photograph, label and prediction side by side, for the first images of the set.

    They go to TensorBoard as an image, and as PNG files under `panels/` of the run's folder for other loggers.

    Args:
        images: How many images.
        every_n_epochs: How often.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 1) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self._rows: list[NDArray[np.uint8]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of a batch while there are too few."""
        if trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SegmentationTask)
        info = pl_module.data_info
        wanted = self.images - len(self._rows)
        if wanted <= 0:
            return
        images, masks = batch["image"][:wanted], batch["mask"][:wanted]
        with torch.inference_mode():
            predictions = predicted_classes(pl_module(images))
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (info.mean, info.std))
        photographs = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        for photograph, mask, prediction in zip(photographs, masks, predictions, strict=True):
            parts = (
                photograph.permute(1, 2, 0).cpu().numpy(),
                colorize(mask.cpu().numpy(), info.palette, info.ignore_index),
                colorize(prediction.cpu().numpy(), info.palette, info.ignore_index),
            )
            self._rows.append(np.concatenate(parts, axis=1))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the picture to the loggers."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        width = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        panel = np.concatenate(padded, axis=0)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for board in boards:
            board.experiment.add_image(
                "val/photograph label prediction", panel, global_step=trainer.global_step, dataformats="HWC"
            )
        if trainer.log_dir and len(boards) < len(trainer.loggers):
            folder = Path(trainer.log_dir) / "panels"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(panel).save(folder / f"epoch_{trainer.current_epoch:04d}.png")
