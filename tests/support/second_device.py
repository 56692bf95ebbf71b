"""A stand-in for a GPU, so that a machine without one can show that nothing mixes devices and how
often values are fetched from the device.

    with second_device() as fetches:
        train.main(["--device", "meta", ...])
    print(fetches)                                     # ["train.py:535", "train.py:535", ...]

Tensors of the device `meta` have no values in PyTorch. Inside the block they have: a DeviceTensor
reports the device `meta`, and the CPU computes with the tensor that it holds inside. As on CUDA,

  - an operation whose tensors lie on two devices is an error. CUDA allows tensors without axes and
    indices to be on the CPU, and so does the stand-in; copying is what moves values;
  - a tensor must be copied to the CPU before NumPy can read it;
  - the CPU has to wait for a copy from the device, for a number such as `.item()`, and for a result
    whose shape depends on values, such as `nonzero` or indexing with a mask. Each of them is
    recorded as a fetch, by the line of this repository that caused it.

A float64 tensor on the device is a TypeError, as on Apple's mps.

There is no autocast. Tensor subclasses do not work in inference mode, which only turns gradients
off here.
"""
from __future__ import annotations

import contextlib
import sys
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).parents[2]}/"
aten = torch.ops.aten

COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside the pointwise operations, these take a value without axes from the CPU
TAKE_A_CPU_SCALAR = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


# ---- tensors -------------------------------------------------------------------------------------
class DeviceTensor(Tensor):
    """A tensor that reports the device `meta`; `inner` is a CPU tensor with its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta")
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the second device is used outside of the block")

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a meta device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")

    __array__ = numpy

    def __repr__(self, **kwargs) -> str:
        return repr(self.inner)

    def tolist(self):
        return self.detach().cpu().tolist()

    @property
    def is_meta(self) -> bool:
        """False: unlike PyTorch's own tensors of this device, this one has values."""
        return False

    def __reduce_ex__(self, protocol):
        """Saved and copied as the CPU tensor of the same values."""
        return self.detach().cpu().__reduce_ex__(protocol)


def is_on_device(x) -> bool:
    return isinstance(x, DeviceTensor)


def is_second(device) -> bool:
    """Whether a device that was asked for, if any was, is the second one."""
    return device is not None and torch.device(device).type == "meta"


def tensors_in(x):
    """All tensors of an argument, or of nested lists, tuples and dicts of arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)


def map_tensors(f, x):
    """The same argument or arguments with every tensor t replaced by f(t)."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: map_tensors(f, part) for key, part in x.items()}
    return type(x)(map_tensors(f, part) for part in x) if isinstance(x, list | tuple) else x


def inner_of(t: Tensor) -> Tensor:
    return t.inner if is_on_device(t) else t


# ---- the rules -----------------------------------------------------------------------------------
@lru_cache(None)
def written_arguments(func) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    return tuple((i, argument.name) for i, argument in enumerate(func._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write)


def written_tensors(func, args, kwargs) -> list:
    return [args[i] if i < len(args) else kwargs[name] for i, name in written_arguments(func)
            if i < len(args) or name in kwargs]


def tensors_bound_to_one_device(func, args, kwargs) -> list[Tensor]:
    """The tensors of a call that must lie on the same device."""
    operation = func.overloadpacket
    if operation in COPIES:
        return []
    if operation in INDEXING:                      # self, indices, values: indices may be elsewhere
        this, indices, *values = args[:3]
        return [this, *(t for t in tensors_in(indices) if is_on_device(t)),
                *(t for t in tensors_in(values) if t.ndim)]
    tensors = list(tensors_in((args, kwargs)))
    if all(t.ndim for t in tensors):
        return tensors
    if torch.Tag.pointwise not in func.tags and operation not in TAKE_A_CPU_SCALAR:
        return tensors
    written = list(tensors_in(written_tensors(func, args, kwargs)))
    return [t for t in tensors if t.ndim or is_on_device(t) or any(t is w for w in written)]


def refuse_two_devices(func, args, kwargs) -> None:
    """raises RuntimeError  if tensors of a call lie on two devices, where CUDA would raise it"""
    bound = tensors_bound_to_one_device(func, args, kwargs)
    if len({is_on_device(t) for t in bound}) > 1:
        each = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in bound)
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, meta and cpu, in {func}: {each}")


def is_fetch(func, args, kwargs) -> bool:
    """Whether the CPU has to wait for values of the device."""
    operation = func.overloadpacket
    if operation in INDEXING:
        return any(is_on_device(t) and t.dtype == torch.bool for t in tensors_in(args[1]))
    if operation is aten._to_copy:
        target = kwargs.get("device")
        return is_on_device(args[0]) and target is not None and not is_second(target)
    if operation is aten.copy_:
        return is_on_device(args[1]) and not is_on_device(args[0])
    return not DATA_DEPENDENT.isdisjoint(func.tags)


def line_of_this_repository() -> str:
    """The innermost line under way that belongs to the repository: "train.py:535"."""
    frame = sys._getframe()
    while frame := frame.f_back:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "site-packages" not in path and path != __file__:
            return f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
    return "outside of the repository"


class _Operations(TorchDispatchMode):
    """Computes every operation on the CPU, by the rules of a second device."""

    def __init__(self, fetches: list[str]):
        super().__init__()
        self.fetches = fetches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, target = list(tensors_in((args, kwargs))), kwargs.get("device")
        assert all(is_on_device(t) or not is_second(t.device) for t in given), "has no values"
        if not any(map(is_on_device, given)):
            on_device = is_second(target)
            if not on_device:
                return func(*args, **kwargs)
        else:
            on_device = target is None or is_second(target)
            refuse_two_devices(func, args, kwargs)
            if is_fetch(func, args, kwargs):
                self.fetches.append(line_of_this_repository())
        out = self.compute(func, args, kwargs)
        returns = func._schema.returns
        if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            written = written_tensors(func, args, kwargs)
            return written[0] if len(written) == 1 else tuple(written)
        return map_tensors(placed, out) if on_device else out

    def compute(self, func, args, kwargs):
        """The result on the CPU."""
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes the shape of its argument, which the second "
                                      "device does not know")
        args, kwargs = map_tensors(inner_of, args), map_tensors(inner_of, kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def placed(inner: Tensor) -> DeviceTensor:
    if inner.dtype == torch.float64:
        raise TypeError("Cannot convert a tensor to float64: the second device has no float64")
    return DeviceTensor(inner)


# ---- functions -----------------------------------------------------------------------------------
class _Functions(TorchFunctionMode):
    """The functions that PyTorch does not break into operations as a second device needs it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):     # made on the CPU, then moved
            device = kwargs.pop("device", None)
            out = func(*args, **kwargs)
            return out if device is None else out.to(device)
        if func is Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and is_on_device(args[0]):
            args = (args[0], index_of_tensors(args[1]), *args[2:])
        if func is Tensor.data.__set__ and is_on_device(args[0]):
            args[0].inner = args[1].inner
        return func(*args, **kwargs)


def index_of_tensors(index):
    """An index in which lists and arrays, which PyTorch would move to the device by itself, are CPU
    tensors."""
    if isinstance(index, tuple):
        return tuple(map(index_of_tensors, index))
    is_list = isinstance(index, list) or (isinstance(index, np.ndarray) and index.ndim > 0)
    return torch.as_tensor(index) if is_list else index


# ---- the block -----------------------------------------------------------------------------------
@contextlib.contextmanager
def second_device():
    """Let the device `meta` compute, by the rules of a GPU -> the list of fetches so far."""
    fetches: list[str] = []
    functions = _Functions()
    autocast, run_backward = torch.autocast, torch.autograd._engine_run_backward

    def autocast_off(device_type, dtype=None, enabled=True):
        assert not enabled or device_type != "meta", "the second device has no autocast"
        return autocast("cpu", torch.bfloat16, enabled)

    def backward_with_functions(*args, **kwargs):
        with functions:              # PyTorch leaves a mode while the function that it handles runs
            return run_backward(*args, **kwargs)

    replace = mock.patch.object
    with (replace(torch, "autocast", autocast_off),
          replace(torch.autograd, "_engine_run_backward", backward_with_functions),
          replace(torch.inference_mode, "__enter__", torch.no_grad.__enter__),
          replace(torch.inference_mode, "__exit__", torch.no_grad.__exit__),
          _Operations(fetches), functions):
        yield fetches
