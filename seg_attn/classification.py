"""The classical experiment of channel attention: a small CNN against the same CNN with SE, on image classification.

SE stands after each ReLU and before the pooling that follows it (Hu et al., Squeeze-and-Excitation Networks, CVPR 2018,
https://arxiv.org/abs/1709.01507, where it gates a block's features before they go on). The images are CIFAR-10's, where
the user has them, or scikit-learn's handwritten digits, which come with that package and need no download.
"""

import csv
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from seg_attn.attention import AttentionSpec, build_attention
from seg_attn.attention.arguments import positive_int
from seg_attn.errors import InputError
from seg_attn.norm import BatchNorm2d

DataName = Literal["digits", "cifar10"]
CLASSES = 10  # of both data sets
TEST_SHARE = 0.25  # of the digits, which have no split of their own


class SmallCNN(nn.Sequential):
    """Three times 3x3 convolution, batch normalisation, ReLU, (attention,) 2x2 pooling; global average; linear.

    Args:
        in_channels: Channels of the images.
        attention: What stands after each ReLU and before the pooling: a name of `ATTENTION`, {"name": ..., **options},
            or None.
        widths: Channels of the convolutions.
        num_classes: Channels of the logits.

    Shape:
        - input: float (N, in_channels, H, W), sides of at least 8
        - output: logits, float (N, num_classes)

    Raises:
        ValueError: If a number is no integer of at least 1, or the attention is unknown.

    Examples:
        >>> [type(module).__name__ for module in list(SmallCNN(1, attention="se"))[3:5]]
        ['SqueezeExcite', 'MaxPool2d']
    """

    def __init__(
        self,
        in_channels: int,
        attention: AttentionSpec | None = None,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = CLASSES,
    ) -> None:
        layers: list[nn.Module] = []
        before = positive_int("in_channels", in_channels)
        for width in widths:
            layers += [
                nn.Conv2d(before, positive_int("widths", width), kernel_size=3, padding=1, bias=False),
                BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Identity() if attention is None else build_attention(attention, width),
                nn.MaxPool2d(2),
            ]
            before = width
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, positive_int("num_classes", num_classes))
        )


class ClassificationTask(pl.LightningModule):
    """Trains a classifier by cross-entropy with Adam, and logs loss and accuracy once per epoch.

    Args:
        network: Images, float (N, C, H, W), to logits (N, num_classes).
        lr: Learning rate.

    Batches are (images, labels), labels int64 (N,).
    """

    def __init__(self, network: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def _step(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ClassificationData(pl.LightningDataModule):
    """CIFAR-10 or scikit-learn's digits, in memory, each value in [0, 1].

    Args:
        name: "digits" (1,797 images of 1 x 8 x 8; a quarter of each class is held out, by a fixed seed) or "cifar10"
            (50,000 and 10,000 images of 3 x 32 x 32, with its own split).
        root: Where CIFAR-10 lies, the folder that holds `cifar-10-batches-py`. Nothing is downloaded.
        batch_size: Images per batch.
        seed: Of the order of the training images.

    Attributes:
        channels: Channels of the images.

    Raises:
        InputError: If CIFAR-10 is not at `root`, or scikit-learn is not installed.
        ValueError: If the name is unknown.
    """

    def __init__(
        self, name: DataName = "digits", root: str | Path | None = None, batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        if name not in ("digits", "cifar10"):
            raise ValueError(f"name must be 'digits' or 'cifar10', got {name!r}")
        self.batch_size = positive_int("batch_size", batch_size)
        self.seed = seed
        self.train, self.val = _digits() if name == "digits" else _cifar10(root)
        self.channels = int(self.train.tensors[0].shape[1])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """The images that are held out."""
        return DataLoader(self.val, 4 * self.batch_size)


@dataclass(frozen=True)
class Learned:
    """What one network of the experiment reached.

    Attributes:
        attention: Its attention, "none" for the plain CNN.
        seed: Its seed.
        parameters: Its number of parameters.
        log: The per-epoch CSV log that Lightning wrote.
        epochs: The log's lines: `epoch`, `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`.
    """

    attention: str
    seed: int
    parameters: int
    log: Path
    epochs: list[dict[str, float]]

    @property
    def accuracy(self) -> float:
        """On the held-out images after the last epoch, a fraction."""
        return self.epochs[-1]["val/accuracy"]


def compare_channel_attention(
    folder: str | Path,
    data: DataName = "digits",
    root: str | Path | None = None,
    attentions: Sequence[str] = ("none", "se"),
    epochs: int = 15,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
) -> list[Learned]:
    """Train the small CNN with each attention and each seed, with a per-epoch CSV log of each.

    Args:
        folder: Where the logs go: `<folder>/<data>/<attention>_seed<n>/metrics.csv`.
        data: See `ClassificationData`.
        root: See `ClassificationData`.
        attentions: Names of `ATTENTION`, or "none" for the plain CNN.
        epochs: Passes over the training images.
        seeds: Of initial weights and order.
        batch_size: Images per batch.

    Returns:
        One entry per attention and seed.

    Raises:
        InputError: See `ClassificationData`.
        ValueError: If a name or a number is out of its range.
    """
    positive_int("epochs", epochs)
    learned = []
    for seed in seeds:
        images = ClassificationData(data, root, batch_size, seed)
        for attention in attentions:
            pl.seed_everything(seed, verbose=False)
            network = SmallCNN(images.channels, None if attention == "none" else attention)
            logger = CSVLogger(folder, name=data, version=f"{attention}_seed{seed}")
            shutil.rmtree(logger.log_dir, ignore_errors=True)  # of an earlier call; Lightning would warn
            trainer = pl.Trainer(
                max_epochs=epochs,
                logger=logger,
                accelerator="auto",
                devices=1,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            trainer.fit(ClassificationTask(network), datamodule=images)
            log = Path(logger.log_dir) / "metrics.csv"
            parameters = sum(parameter.numel() for parameter in network.parameters())
            learned.append(Learned(attention, seed, parameters, log, read_epochs(log)))
    return learned


def read_epochs(log: Path) -> list[dict[str, float]]:
    """Read Lightning's CSV log as one line per epoch: it writes training and validation in lines of their own."""
    epochs: dict[int, dict[str, float]] = {}
    with log.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            line = epochs.setdefault(int(row["epoch"]), {"epoch": float(row["epoch"])})
            line |= {name: float(value) for name, value in row.items() if value and name not in ("epoch", "step")}
    return [epochs[epoch] for epoch in sorted(epochs)]


def accuracy_table(learned: Sequence[Learned]) -> str:
    """Lay out accuracy, mean ± standard deviation over the seeds (n − 1), and parameters as a Markdown table."""
    lines = ["| attention | accuracy (%) | seeds | parameters |", "| --- | ---: | ---: | ---: |"]
    for attention in dict.fromkeys(entry.attention for entry in learned):
        entries = [entry for entry in learned if entry.attention == attention]
        values = [100 * entry.accuracy for entry in entries]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        mean = statistics.fmean(values)
        lines.append(f"| {attention} | {mean:.2f}{spread} | {len(values)} | {entries[0].parameters:,} |")
    return "\n".join(lines)


def _digits() -> tuple[TensorDataset, TensorDataset]:
    try:
        from sklearn.datasets import load_digits  # not a dependency: only this experiment wants it
    except ImportError as error:
        raise InputError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    held_out = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(TEST_SHARE * len(members))]] = True
    values = (images / 16).reshape(-1, 1, 8, 8)
    return _dataset(values[~held_out], labels[~held_out]), _dataset(values[held_out], labels[held_out])


def _cifar10(root: str | Path | None) -> tuple[TensorDataset, TensorDataset]:
    from torchvision.datasets import CIFAR10  # its import takes a second that the digits need not wait for

    if root is None:
        raise InputError("cifar10 needs root, the folder that holds cifar-10-batches-py")
    try:
        parts = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise InputError(
            f"{root}: no intact CIFAR-10 there; give the folder that holds cifar-10-batches-py, or fetch it with "
            "torchvision.datasets.CIFAR10(root, download=True)"
        ) from error
    train, val = (_dataset(part.data.transpose(0, 3, 1, 2) / 255, np.array(part.targets)) for part in parts)
    return train, val


def _dataset(images: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> TensorDataset:
    return TensorDataset(
        torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)), torch.from_numpy(labels.astype(np.int64))
    )
