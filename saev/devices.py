"""Which device a stage runs on."""

import beartype
import torch

from saev import errors


@beartype.beartype
def pick(name: str) -> torch.device:
    """auto -> cuda where there is one, else cpu.

    Raises:
        UserError: the name is unknown to torch, or CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise errors.UserError(
            f"--device {name}: torch knows no such device. Pass auto, cpu or cuda."
        ) from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise errors.UserError(
            f"--device {name}: no GPU is visible to torch here. Pass --device cpu."
        )
    return device
