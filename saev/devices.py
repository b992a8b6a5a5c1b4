"""Chooses a stage's device."""

import torch

from saev import errors


def pick(name: str) -> torch.device:
    """Returns the named device. "auto" means cuda if there is a GPU, else cpu.

    Raises:
        UserError: torch does not know the name, or CUDA is requested but not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise errors.UserError(f"--device {name}: unknown to torch. Pass auto, cpu or cuda.") from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise errors.UserError(f"--device {name}: torch sees no GPU. Pass --device cpu.")
    return device
