"""The Lightning module: one network, one loss, one shared step, Pascal VOC's mIoU, SGD with the poly schedule.

Recipe: DeepLabv3 (arXiv 1706.05587, section 4.1): SGD with momentum, learning rate times (1 - t / T) ** 0.9 per step.
"""

import math
import uuid
import warnings
from typing import Any, Literal, Self

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from seg_attn.checkpoint import DataInfo, load_checkpoint
from seg_attn.errors import InputError
from seg_attn.losses import build_loss
from seg_attn.metrics import SegmentationMetrics, as_report
from seg_attn.models import DeepLabV3
from seg_attn.models.classes import best_classes
from seg_attn.models.pretrained import weights_follow, weights_will_follow
from seg_attn.resume import settle_finished_epoch

Batch = dict[str, Tensor]


def poly_factor(step: int, total: float, power: float) -> float:
    """Factor of the learning rate at a step: (1 - step / total) ** power, 0 from `total` on (Liu 2015, ParseNet).

    Examples:
        >>> poly_factor(0, 100, 0.9), poly_factor(100, 100, 0.9), poly_factor(101, 100, 0.9)
        (1.0, 0.0, 0.0)
    """
    return float(max(0.0, 1.0 - step / total) ** power)


def predicted_classes(logits: Tensor) -> Tensor:
    """Class indices, int64 (N, H, W), of logits, float (N, C, H, W); as `predict` and `compare` find them."""
    return best_classes(logits)[0].long()


class SegmentationTask(LightningModule):
    """Trains, validates and tests a `DeepLabV3`. Hyper-parameters are flat: the model's arguments are arguments here.

    Args:
        lr: Learning rate of the head at the first step.
        backbone_lr_multiplier: The backbone's learning rate as a fraction of the head's.
        momentum: SGD's momentum, or AdamW's first beta.
        weight_decay: Weight decay, on every parameter.
        poly_power: Exponent of the poly schedule.
        optimizer: "sgd" (the papers'), or "adamw", which a short training from scratch gets further with.
        warmup_steps: Steps in which the learning rate first rises from 0.
        loss: "cross_entropy", or {"name": "cross_entropy", "label_smoothing": 0.1}.
        aux_weight: Weight of the auxiliary head's loss, where the model has one.
        class_weights: One weight per class in the loss, or None.
        ignore_index: Label of pixels that count neither in the loss nor in the metrics.
        freeze_bn: Keep batch normalisation's statistics and parameters as they are (fine-tuning at output stride 8
            after training at 16).
        init_from: Checkpoint whose weights training starts from, all of them; `backbone_weights` are not looked for
            then. To go on with a stopped run, use `fit --ckpt_path` instead.
        **model: Arguments of `seg_attn.DeepLabV3`.

    Attributes:
        model: The network.
        results: What the last validation and test measured, by "val" and "test": `miou`, `pixel_accuracy`, `per_class`
            (by name; None for a class that occurs nowhere), `confusion` (rows: target). Fractions in full precision.

    Raises:
        ValueError: For an argument out of its range.
        InputError: If `backbone_weights` or `init_from` cannot be had or do not fit.

    Batches are {"image": float (N, C, H, W), "mask": int64 (N, H, W)}.
    """

    def __init__(
        self,
        lr: float = 0.01,
        backbone_lr_multiplier: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        poly_power: float = 0.9,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        warmup_steps: int = 0,
        loss: str | dict[str, Any] = "cross_entropy",
        aux_weight: float = 0.4,
        class_weights: list[float] | None = None,
        ignore_index: int = 255,
        freeze_bn: bool = False,
        init_from: str | None = None,
        **model: Any,
    ) -> None:
        super().__init__()
        own = {name: value for name, value in locals().items() if name not in ("self", "model", "__class__")}
        for name in (
            "lr",
            "backbone_lr_multiplier",
            "momentum",
            "weight_decay",
            "poly_power",
            "aux_weight",
            "warmup_steps",
        ):
            if not own[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {own[name]!r}")
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
        with weights_follow(init_from is not None):
            self.model = DeepLabV3(**model)
        if init_from is not None and not weights_will_follow():
            load_checkpoint(init_from).load_into(self.model)
        if class_weights is not None and len(class_weights) != self.model.num_classes:
            raise ValueError(
                f"class_weights must hold one weight for each of the {self.model.num_classes} classes, "
                f"got {len(class_weights)}"
            )
        self.save_hyperparameters({**own, **self.model.config})
        self.loss = build_loss(loss, ignore_index, class_weights)
        num_classes = self.model.num_classes
        self.metrics = nn.ModuleDict(
            {stage: SegmentationMetrics(num_classes, ignore_index) for stage in ("val", "test")}
        )
        self.data_info = DataInfo.default(num_classes)
        self.results: dict[str, dict[str, Any]] = {}
        self.freeze_bn = freeze_bn
        if freeze_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
        self._checked_rates = False
        self._random_state: Tensor | None = None
        self._run_id: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes, H, W) for images (N, C, H, W)."""
        return self.model(images)  # type: ignore[no-any-return]

    # --- steps ---------------------------------------------------------------------------------------------------

    def _losses(self, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
        """The shared step: logits and loss, the auxiliary one included in training."""
        if training and self.model.aux_classifier is not None:
            logits, aux = self.model.forward_with_aux(batch["image"])
            extra = self.hparams["aux_weight"] * self.loss(aux, batch["mask"])
        else:
            logits, extra = self.model(batch["image"]), 0.0
        return logits, self.loss(logits, batch["mask"]) + extra

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        self._check_rates(batch["image"])
        batch = {**batch, "image": batch["image"].contiguous(memory_format=torch.channels_last)}
        _, loss = self._losses(batch, training=True)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch["image"]))
        return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        logits, loss = self._losses(batch, training=False)
        self._metric(stage).update(predicted_classes(logits), batch["mask"])
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["image"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of whole images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of whole images."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log mIoU and per-class IoU of the whole set."""
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        """Log mIoU and per-class IoU of the whole set."""
        self._conclude("test")

    def _metric(self, stage: str) -> SegmentationMetrics:
        metric = self.metrics[stage]
        assert isinstance(metric, SegmentationMetrics)
        return metric

    def _conclude(self, stage: str) -> None:
        metric = self._metric(stage)
        report = as_report(metric.compute(), self.data_info.class_names)
        metric.reset()
        self.results[stage] = report
        self.log(f"{stage}/miou", report["miou"], prog_bar=True)
        self.log(f"{stage}/pixel_accuracy", report["pixel_accuracy"])
        per_class = report["per_class"].items()
        self.log_dict({f"{stage}/iou/{name}": math.nan if iou is None else iou for name, iou in per_class})

    def _check_rates(self, images: Tensor) -> None:
        if self._checked_rates:
            return
        self._checked_rates = True
        height, width = images.shape[-2:]
        rates = self.model.oversized_rates(height, width)
        if rates:
            warnings.warn(
                f"atrous rate{'s' * (len(rates) > 1)} {', '.join(map(str, rates))} of ASPP at output stride "
                f"{self.model.output_stride} reach past the feature map of a {height}x{width} crop: such a branch is a "
                "1x1 convolution. Choose smaller atrous_rates or larger crops",
                stacklevel=2,
            )

    # --- life of a run -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take class names, palette, mean and deviation from the data.

        Raises:
            InputError: If data and model differ in their number of classes.
        """
        self.take_data_info(getattr(self.trainer, "datamodule", None))

    def take_data_info(self, datamodule: Any) -> None:
        """Take class names, palette, mean and deviation from a data module, if it has them.

        Raises:
            InputError: If data and model differ in their number of classes.
        """
        if not hasattr(datamodule, "class_names"):
            return
        info = DataInfo.of(datamodule)
        if len(info.class_names) != self.model.num_classes:
            raise InputError(
                f"the model has {self.model.num_classes} classes and the data {len(info.class_names)} "
                f"({', '.join(info.class_names)}): set model.num_classes to {len(info.class_names)}, "
                "or give the checkpoint the data it was trained on"
            )
        self.data_info = info

    def on_fit_start(self) -> None:
        """Train in training mode and channels-last, the layout that convolutions are fastest in.

        Lightning keeps the modes it finds, and a model may come here in eval mode.
        """
        self._run_id = self._run_id or uuid.uuid4().hex
        self.train()
        self.model.to(memory_format=torch.channels_last)

    def on_fit_end(self) -> None:
        """Go back to the layout that `test` and `predict` run in, so that their rounding is the same."""
        self.model.to(memory_format=torch.contiguous_format)

    def on_train_start(self) -> None:
        """Go on with the random numbers where a resumed run left off; several processes each have their own."""
        if self._random_state is not None and self.trainer.world_size == 1:
            torch.set_rng_state(self._random_state.cpu())
        self._random_state = None

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen batch normalisation stays in eval mode."""
        super().train(mode)
        if getattr(self, "freeze_bn", False):
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def configure_optimizers(self) -> Any:
        """SGD or AdamW; the backbone at its own learning rate; warm-up and poly schedule per step."""
        backbone = [p for p in self.model.backbone.parameters() if p.requires_grad]
        inside = {id(p) for p in self.model.backbone.parameters()}
        head = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
        lr = self.hparams["lr"]
        groups = [
            {"params": backbone, "lr": lr * self.hparams["backbone_lr_multiplier"], "name": "backbone"},
            {"params": head, "lr": lr, "name": "head"},
        ]
        decay, momentum = self.hparams["weight_decay"], self.hparams["momentum"]
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), weight_decay=decay, fused=True)
            if self.hparams["optimizer"] == "adamw"
            else torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        rise: float = min(1.0, (step + 1) / (float(self.hparams["warmup_steps"]) + 1))
        # Asked for the number of steps while it is being built, Lightning sets up the loaders before it has restored
        # their place in the epoch. The first factor needs no number.
        if step == 0:
            return rise
        return rise * poly_factor(
            step, float(self.trainer.estimated_stepping_batches), float(self.hparams["poly_power"])
        )

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-describing: what the data were, and the model as it stands now."""
        checkpoint["data"] = self.data_info.as_dict()
        checkpoint["hyper_parameters"] = {**dict(self.hparams), **self.model.config}
        checkpoint["random_state"] = torch.get_rng_state()  # dropout's, so that 5 + 5 steps equal 10
        if self._run_id:
            checkpoint["run"] = {"id": self._run_id, "training": self._training()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the data were, unless the run's own data say it."""
        if checkpoint.get("data") and not hasattr(getattr(self._trainer, "datamodule", None), "class_names"):
            self.data_info = DataInfo(**checkpoint["data"])
        self._random_state = checkpoint.get("random_state")
        if self._trainer is not None:  # the run goes on; without one, weights are taken over by another
            self._run_id = (checkpoint.get("run") or {}).get("id")
        settle_finished_epoch(checkpoint)

    def _training(self) -> dict[str, Any]:
        """What shapes the training besides the hyper-parameters: of the data module and of the trainer."""
        trainer = self.trainer
        return {
            **getattr(getattr(trainer, "datamodule", None), "recipe", {}),
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "world_size": trainer.world_size,
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a task with its weights; backbone weights that the run started from are not looked for again."""
        with weights_follow():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
