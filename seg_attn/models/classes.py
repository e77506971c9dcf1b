"""From scores to classes: the one way, which `fit`, `test`, `predict`, `compare` and `explain` share."""

import torch
from torch import Tensor

# Rows of scores are turned into classes so many bytes at a time: what fits into a core's cache.
_BLOCK_BYTES = 1 << 20


@torch.no_grad()
def best_classes(scores: Tensor, logits: bool = False) -> tuple[Tensor, Tensor]:
    """Return the best class, the first of equal ones, and its score or probability.

    The class is `scores.argmax(dim=1)` where no score is NaN; where one is, the score or probability returned is NaN,
    and the class may be any. On a processor it is computed class by class over blocks of rows, in a fraction of the
    time that the reduction over a strided dimension takes; elsewhere by `torch.max`, which promises the first of equal
    ones on every device.

    Args:
        scores: Logits or probabilities, float (N, C, H, W); C is at most 256, as masks are bytes.
        logits: Whether these are logits whose probability is asked for; otherwise the score is returned as it is.

    Returns:
        uint8 (N, H, W) and float32 (N, H, W).
    """
    count, channels, height, width = scores.shape
    if scores.device.type != "cpu":
        best, classes = scores.max(dim=1)
        total = (scores - best[:, None]).exp().sum(dim=1) if logits else None
        return classes.to(torch.uint8), (best if total is None else total.reciprocal()).float()
    classes = torch.zeros((count, height, width), dtype=torch.uint8)
    confidence = torch.empty((count, height, width), dtype=torch.float32)
    rows = max(1, _BLOCK_BYTES // (channels * width * scores.element_size()))
    for image in range(count):
        for top in range(0, height, rows):
            block = scores[image, :, top : top + rows]
            if scores.stride(1) == 1:  # channels-last: turned a block at a time, while it is in the cache
                block = block.contiguous()
            chosen = classes[image, top : top + rows]
            best = block[0].clone()
            for index in range(1, channels):
                chosen.masked_fill_(block[index] > best, index)
                torch.maximum(best, block[index], out=best)
            if logits:
                best = (block - best).exp_().sum(dim=0).reciprocal_()
            confidence[image, top : top + rows] = best
    return classes, confidence
