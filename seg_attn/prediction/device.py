"""Where a network runs."""

import torch

from seg_attn.errors import InputError


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device that this machine has.

    Args:
        device: Such as "cpu", "cuda" or "cuda:1"; "auto" is a GPU where there is one.

    Raises:
        InputError: If there is no such device here.

    Examples:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "auto":
        return torch.device("cuda" if there else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # each kind of device that is not there fails in a way of its own
        choices = ", ".join(["auto", "cpu", *there])
        raise InputError(f"device {str(device)!r} is not on this machine: take one of {choices}") from error
    return found
