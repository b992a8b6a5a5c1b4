"""A GPU that is not there: tensors of torch's FakeTensorMode on cuda:0, which have shapes and devices, but no values.

`Gpu` runs device code on them. It counts what makes the host wait for the device, and the bytes of live tensors.
Operations that need values get made-up ones: the caller says how many entries of a mask are true.
Operations on tensors of different devices raise, as on a GPU.
"""

import collections
import collections.abc
import contextlib
import typing as tp
import unittest.mock
import weakref

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from saev.nn import triton_kernels, triton_select

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten

NUMPY = torch.Tensor.numpy


class Gpu(TorchDispatchMode):
    """Use `with Gpu() as gpu`. Everything inside runs on fake tensors.

    Attributes:
        waits: reason -> how often the host waited for the device since `count` began.
        live, peak: bytes of tensors on the device, now and at most.
        n_true: how many entries of a mask with so many entries are true.
        answer: what `.item()` and `bool()` give, by dtype.
        equal: what `torch.equal` gives.
    """

    def __init__(self, n_true: collections.abc.Callable[[int], int] = lambda n: min(n, 5)):
        super().__init__()
        self.mode = FakeTensorMode()
        self.n_true = n_true
        self.answer = {torch.bool: True}
        self.equal = False
        self.waits: collections.Counter[str] = collections.Counter()
        self.live = self.peak = 0
        self.launched: collections.Counter[str] = collections.Counter()
        self.seen: weakref.WeakSet[tp.Any] = weakref.WeakSet()
        self.used: list[list[Tensor]] = []
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Gpu":
        patch = unittest.mock.patch.object
        # a deep copy of a tensor belongs to the same mode
        keeps = patch(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True)
        self.stack.enter_context(keeps)
        self.stack.enter_context(self.mode)
        for target, name, fake in (
            (torch.Tensor, "backward", lambda loss: self._backward(loss)),
            (torch.Tensor, "numpy", lambda tensor, **_: self._numpy(tensor)),
            (torch.nn.Module, "_apply", _apply),
            (torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
            (torch.cuda, "Event", _Event),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "current_stream", lambda device=None: torch.device(device or "cuda:0")),
            (torch.cuda, "mem_get_info", lambda *_: (80 * 10**9, 80 * 10**9)),
            (triton_select, "launch", lambda name, grid, *args, **_: self._launcher(name)[grid](*args)),
            (triton_kernels, "_kernels", lambda: (self._launcher("bag"), self._launcher("bag_dot"))),
        ):
            self.stack.enter_context(patch(target, name, fake))
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: [t], self._unpacked))
        return super().__enter__()

    def __exit__(self, *args: tp.Any) -> None:
        super().__exit__(*args)
        self.stack.__exit__(*args)

    @contextlib.contextmanager
    def count(self) -> collections.abc.Generator[collections.Counter[str]]:
        """Counts waits, and starts the peak again, inside."""
        self.waits.clear()
        self.peak = self.live
        yield self.waits

    def adopt(self, module: torch.nn.Module) -> None:
        """Makes a real module's parameters and buffers fake ones."""
        _apply(module, self.mode.from_tensor)

    # ---- operations ----

    def __torch_dispatch__(
        self,
        func: tp.Any,
        types: tp.Any,
        args: tuple[tp.Any, ...] = (),
        kwargs: dict[str, tp.Any] | None = None,
    ) -> tp.Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        # Inference mode leaves some operations whole. For attention a GPU has a kernel that needs no more memory.
        if (
            torch.is_inference_mode_enabled()
            and func.namespace == "aten"
            and name is not aten.scaled_dot_product_attention
        ):
            with _again(self):
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name is aten._local_scalar_dense:
            self._wait("item", args[0])
            return self._value(args[0].dtype)
        if name is aten.equal:
            self._wait("equal", args[0])
            return self.equal
        if name is aten.nonzero:
            self._wait("nonzero", args[0])
            return self._tracked(
                aten.new_empty(args[0], (self.n_true(args[0].numel()), args[0].ndim), dtype=torch.int64)
            )
        if name is aten.masked_select:
            self._wait("mask", args[0])
            return self._tracked(aten.new_empty(args[0], (self.n_true(args[0].numel()),)))
        if name is aten.bincount:  # torch reads the smallest and the largest value
            self._wait("bincount", args[0])
            return self._tracked(
                aten.new_empty(args[0], (kwargs.get("minlength", args[-1]),), dtype=torch.int64)
            )
        if name is aten.repeat_interleave and kwargs.get("output_size") is None:
            self._wait("repeat", args[0])
            return self._tracked(aten.new_empty(args[0], (self.n_true(args[0].numel()),)))
        if name is aten._pin_memory:
            return aten.clone(args[0])
        if name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index):
            args = (args[0], [self._rows(args[0], i) for i in args[1]], *args[2:])
        before = [t.device.type for t in args if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        if name in (aten._to_copy, aten.copy_, aten.copy):
            is_async = kwargs.get("non_blocking") or (name is aten.copy_ and len(args) > 2 and args[2])
            if {*before, out.device.type} == {"cpu", "cuda"} and not is_async:
                self.waits["copy"] += 1
        return torch.utils._pytree.tree_map_only(FakeTensor, self._tracked, out)

    def _wait(self, what: str, tensor: Tensor) -> None:
        self.waits[what] += tensor.is_cuda

    def _value(self, dtype: torch.dtype) -> bool | int | float:
        return self.answer.get(dtype, 1.0 if dtype.is_floating_point else 1)

    def _rows(self, tensor: Tensor, index: Tensor | None) -> Tensor | None:
        """A mask as the rows that it selects, which torch finds by a nonzero."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            if index is not None and index.device != tensor.device:
                self.waits["copy"] += 1  # of the index
            return index
        if index.ndim != 1:
            raise NotImplementedError("a mask of more than one dimension")
        self._wait("mask", index)
        if index.device != tensor.device:
            raise RuntimeError(f"a mask on {index.device} for a tensor on {tensor.device}")
        return aten.new_empty(index, (self.n_true(len(index)),), dtype=torch.int64)

    def _tracked(self, out: Tensor) -> Tensor:
        """Counts the storage's bytes until it is freed."""
        if out.is_cuda and (storage := out.untyped_storage()) not in self.seen:
            self.seen.add(storage)
            n = -(-storage.nbytes() // 512) * 512  # as torch allocates
            self.live += n
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, n)
        return out

    def _freed(self, n: int) -> None:
        self.live -= n

    # ---- what leaves torch ----

    def _numpy(self, tensor: Tensor) -> np.ndarray:
        if not isinstance(tensor, FakeTensor):
            return NUMPY(tensor)
        if tensor.is_cuda or tensor.requires_grad:
            raise TypeError(f"can't convert a tensor on {tensor.device} to numpy")
        return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    # ---- gradients ----

    def _backward(self, loss: Tensor) -> None:
        """`loss.backward()` by the nodes of the graph. torch's own engine asks the driver for the device."""
        pending: dict[tp.Any, list[Tensor | None]] = {}
        n_users = _n_users(loss.grad_fn)
        ready = [(loss.grad_fn, [torch.ones_like(loss)])]
        while ready:
            node, grads = ready.pop()
            if hasattr(node, "variable"):
                with torch.no_grad():  # torch's engine adds in place, too
                    old = node.variable.grad
                    node.variable.grad = grads[0] if old is None else old.add_(grads[0])
                continue
            grads += [None] * (len(node._input_metadata) - len(grads))
            with torch.no_grad():
                found = _gradients(node, grads)
            self._release()
            for (after, at), grad in found:
                sums = pending.setdefault(after, [])
                sums += [None] * (at + 1 - len(sums))
                if grad is not None:
                    grad = grad.sum_to_size(tuple(after._input_metadata[at].shape))
                    sums[at] = grad if sums[at] is None else _added(sums[at], grad)
                n_users[after] -= 1
                if n_users[after] == 0:
                    ready.append((after, pending.pop(after)))
            grads = found = sums = grad = None

    def _unpacked(self, saved: list[Tensor]) -> Tensor:
        self.used.append(saved)
        return saved[0]

    def _release(self) -> None:
        """Frees what a node saved for its backward pass, as torch's engine does."""
        for saved in self.used:
            saved.clear()
        self.used.clear()

    # ---- Triton ----

    def _launcher(self, name: str) -> tp.Any:
        """Checks a launch's grid and arguments. The wrapper has already made the results."""

        def launch(grid: tuple[int, ...], *args: tp.Any, **_: tp.Any) -> None:
            assert 0 < grid[0] < 2**31 and all(0 < n <= 65_535 for n in grid[1:]), grid
            for arg in args:
                if isinstance(arg, Tensor):
                    assert arg.device == DEVICE and arg.is_contiguous(), (name, arg)
                else:
                    assert isinstance(arg, int | float) and abs(arg) < 2**31, (name, arg)
            self.launched[name] += 1

        return _Grids(launch)


@contextlib.contextmanager
def _again(mode: TorchDispatchMode) -> collections.abc.Generator[None]:
    """A mode is off inside its own dispatch. This turns it on."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


class _Event:
    """Nothing to wait for. It must be recorded on the stream of a named device."""

    def record(self, stream: torch.device) -> None:
        assert stream.index is not None

    def synchronize(self) -> None:
        pass


class _Grids:
    def __init__(self, launch: collections.abc.Callable[..., None]):
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> collections.abc.Callable[..., None]:
        return lambda *args, **kwargs: self.launch(grid, *args, **kwargs)


def _n_users(last: tp.Any) -> collections.Counter[tp.Any]:
    """How many edges lead to each node of the graph."""
    n_users: collections.Counter[tp.Any] = collections.Counter()
    todo, known = [last], {last}
    while todo:
        for user, _ in todo.pop().next_functions:
            if user is not None:
                n_users[user] += 1
                if user not in known:
                    known.add(user)
                    todo.append(user)
    return n_users


def _added(total: Tensor, grad: Tensor) -> Tensor:
    """In place where torch's engine does so: if the sum has memory of its own."""
    with torch.no_grad():
        is_own = (
            total._base is None and total.numel() * total.element_size() == total.untyped_storage().nbytes()
        )
        return total.add_(grad) if is_own else total + grad


def _gradients(node: tp.Any, grads: list[Tensor | None]) -> list[tuple[tuple[tp.Any, int], Tensor | None]]:
    """The nodes that a node's gradients go to, and these gradients."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node.apply(*grads)
        found = found if isinstance(found, tuple) else (found,)
        found = [grad for grad, is_needed in zip(found, node.needs_input_grad, strict=True) if is_needed]
    else:
        found = node(*grads)
        found = found if isinstance(found, tuple) else (found,)
        found = [grad for grad, edge in zip(found, node.next_functions, strict=True) if edge[0] is not None]
    return list(zip(edges, found, strict=True))


def _apply(
    module: torch.nn.Module, function: collections.abc.Callable[[Tensor], Tensor], recurse: bool = True
) -> tp.Any:
    """`Module._apply`, which cannot replace fake parameters."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                value = function(parameter)
            module._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
