"""An accelerator that is only said to be one: shows what would make a real one wait, on a machine without any.

    with pretend_device() as seen:                   # one at a time
        model.to(DEVICE)                             # parameters become new objects: make the optimiser afterwards
        losses = model([image.to(DEVICE) for image in images], targets)
    seen.operations.total(), seen.reads.most_common(10)

A tensor on it says that its device is `DEVICE` and has its data in main memory, so that everything is computed, also
what depends on data. An operation on tensors of both places raises, as on a real device (numbers without dimensions
may come from the host). Two things are counted with the line of the package that caused them: reads back to the host
(`.item()`, `nonzero`, boolean indices, `nms`, copies), each of which makes the host wait for all work that was
launched, and uploads of constants.

What it cannot see: speed and precision of a device, and kernels that have no form for it. It stands on torch's "meta"
device, whose own tensors have no data; nothing else may use that inside.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

DEVICE = torch.device("meta")
READING = {  # the shape or value of their result is known to the device alone
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "torchvision::nms"),
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WITH_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
PACKAGES = ("/tailfin/", "/torchvision/", "/transformers/", "/timm/")  # whose lines are named
UPLOAD = "upload of a constant"


class OnDevice(Tensor):
    """A tensor on the device; `data_here` is what it holds."""

    @staticmethod
    def __new__(cls, data: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
        )

    def __init__(self, data: Tensor) -> None:
        self.data_here = data.detach() if data.requires_grad else data

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


class Seen(TorchDispatchMode):
    """What was launched: `operations` by name, `views` among them, which launch nothing; `reads` and `uploads` by
    "file:line what"; `multiply_adds` of matrix products and convolutions; `bytes` that operations other than views read
    and write."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch looks for the device's driver
        self.operations: Counter[str] = Counter()
        self.views = self.multiply_adds = self.bytes = 0
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def clear(self) -> None:
        for counter in (self.operations, self.reads, self.uploads):
            counter.clear()
        self.views = self.multiply_adds = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute an operation on the data, and count it where a tensor of the device takes part."""
        name = func._schema.name
        if name == "aten::_has_compatible_shallow_copy_type":
            return False  # `Module.to` shall make new parameters
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        here = [value for value in tensors if isinstance(value, OnDevice)]
        plain = [value for value in tensors if not isinstance(value, OnDevice)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        stays = bool(here) if asked is None else asked == DEVICE.type
        if name == "aten::copy_":
            stays = isinstance(args[0], OnDevice)
        if here:
            self._count(name, args, kwargs, plain, stays, asked)
            self.views += func.is_view
        if asked == DEVICE.type:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory" or not value}
        known = {id(value.data_here): value for value in here}  # an operation in place gives its argument back
        with _disable_current_modes():
            result = func(*tree_map(_data, args), **tree_map(_data, kwargs))
        if here and not func.is_view:
            results = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
            self.bytes += sum(value.numel() * value.element_size() for value in [*tensors, *results])
            if (count := flop_registry.get(func.overloadpacket)) is not None:
                self.multiply_adds += count(*args, **kwargs, out_val=result) // 2
        if not stays:
            return result

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else OnDevice(value)

        return tree_map(placed, result)

    def _count(self, name: str, args: Any, kwargs: Any, plain: list[Tensor], stays: bool, asked: str | None) -> None:
        self.operations[name] += 1
        copies = name == "aten::copy_" and plain or name == "aten::_to_copy" and asked is not None
        if copies:
            if not stays:
                self.reads[f"{_line()} copy to the host"] += 1
        elif plain and name in INDEXING:
            if not isinstance(args[0], OnDevice):
                raise RuntimeError(f"{name}: an index on the device into a tensor of the host")
            self.reads[f"{_line()} {name} with an index of the host"] += 1
        elif asked is None and any(value.dim() for value in plain):
            raise RuntimeError(f"{name}: tensors of two devices; of the host: {[tuple(v.shape) for v in plain]}")
        masks = (torch.bool, torch.uint8)
        by_mask = name in INDEXING and any(index is not None and index.dtype in masks for index in args[1])
        unknown = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in READING or by_mask or unknown:
            self.reads[f"{_line()} {name}"] += 1


class _Lists(TorchFunctionMode):
    """Lists to the device and from it: `torch.tensor` and its like, which are made on the host and brought over, and
    `tolist`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_device = isinstance(args[0], OnDevice) if args else False
        asked = kwargs.get("device")
        if func in WITH_DATA and not on_device and asked is not None and torch.device(asked).type == DEVICE.type:
            _current().uploads[f"{_line()} {UPLOAD}"] += 1
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist and on_device:
            _current().reads[f"{_line()} tolist"] += 1
            return args[0].data_here.tolist()
        if func is Tensor.new_tensor and on_device:
            _current().uploads[f"{_line()} {UPLOAD}"] += 1
            device, dtype = kwargs.pop("device", DEVICE), kwargs.pop("dtype", args[0].dtype)
            return torch.tensor(args[1], dtype=dtype, **kwargs).to(device)
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


_active: list[Seen] = []


def _current() -> Seen:
    if not _active:
        raise RuntimeError("a tensor of the pretend device is used outside of it")
    return _active[-1]


def _data(value: Any) -> Any:
    return value.data_here if isinstance(value, OnDevice) else value


def _line() -> str:
    """The innermost line of a package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if package := next((own for own in PACKAGES if own in name), None):
            return f"{package[1:]}{name.rsplit(package, 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextlib.contextmanager
def pretend_device() -> Iterator[Seen]:
    """Inside, `DEVICE` can be used."""
    kept = torch.autocast, torch.inference_mode, torch.__future__.get_overwrite_module_params_on_conversion()
    with_lists = _foreach_utils._get_foreach_kernels_supported_devices
    torch.autocast, torch.inference_mode = _Autocast, lambda *_: torch.no_grad()  # type: ignore[misc,assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for module in (_foreach_utils, torch_optimizer):  # lists of tensors in one launch, as on accelerators
        module._get_foreach_kernels_supported_devices = lambda: [*with_lists(), DEVICE.type]
    lists = _foreach_utils._foreach_supported_types, torch_optimizer._foreach_supported_types
    for supported in lists:
        supported.append(OnDevice)
    _active.append(Seen())
    try:
        with _active[-1], _Lists():
            yield _active[-1]
    finally:
        _active.pop()
        torch.autocast, torch.inference_mode = kept[:2]  # type: ignore[misc]
        for module in (_foreach_utils, torch_optimizer):
            module._get_foreach_kernels_supported_devices = with_lists
        for supported in lists:
            supported.remove(OnDevice)
        torch.__future__.set_overwrite_module_params_on_conversion(kept[2])


def bring_back(model: nn.Module) -> None:
    """Parameters and buffers of `model` as tensors of the host again."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if isinstance(value, OnDevice):
                module._parameters[name] = nn.Parameter(value.data_here, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if isinstance(value, OnDevice):
                module._buffers[name] = value.data_here
