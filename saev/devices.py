"""Chooses a stage's device, and copies to it."""

import collections.abc
import contextlib

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


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a small tensor to the device. Does not wait for a GPU, unlike `tensor.to(device)`."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def tf32(is_allowed: bool) -> collections.abc.Generator[None]:
    """Inside, a GPU's float32 matrix products round what they multiply to TF32, or not. Then as before."""
    matmul = torch.backends.cuda.matmul
    name, yes, no = ("allow_tf32", True, False)
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which refuses a mix of both
        name, yes, no = ("fp32_precision", "tf32", "ieee")
    before = getattr(matmul, name)
    setattr(matmul, name, yes if is_allowed else no)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class OnItsWay:
    """A GPU's tensor being copied to the CPU, while the GPU and the caller go on."""

    def __init__(self, tensor: torch.Tensor):
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.host.copy_(tensor, non_blocking=True)
        self.copied = torch.cuda.Event()
        # not the current GPU's stream, which may be another GPU's
        self.copied.record(torch.cuda.current_stream(tensor.device))

    def arrived(self) -> torch.Tensor:
        """Waits until it has arrived."""
        self.copied.synchronize()
        return self.host
