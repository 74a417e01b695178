"""A CUDA device for machines that have none: it computes on the CPU and raises where CUDA would.

  python tests/pretend_cuda.py pgdi.py --smoke     # a script's main on it; last line: counts, JSON

Its tensors say that they are on cuda:0, so every script and torch itself take their CUDA branches
(autocast, bfloat16, fused optimizers). An operation on tensors of two devices raises, and so does
a generator of the other device. Counted are host syncs with the line of the project that caused
them, kernel launches, FLOPs and bytes, and the least time that a large GPU needs for those. What
it knows nothing of: rounding, memory limits, real time, and what happens inside torch.compile.
"""
import contextlib
import ctypes
import importlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

ROOT = str(Path(__file__).resolve().parents[1])
CUDA = torch.device("cuda", 0)
hollow = False  # True: tensors have shapes but no values, for costs at published sizes


# ----------------------------------------------------------------------------------- what it costs

@dataclass
class Costs:
    syncs: Counter = field(default_factory=Counter)  # "file.py:line operation" -> how often
    launches: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    largest: int = 0  # bytes of the largest tensor


costs = Costs()  # of all that ran since the last start_counting


def start_counting():
    global costs
    costs = Costs()
    return costs


def project_line():
    """The innermost line of the project; the backward pass runs in a thread without any."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__:
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def sync(what):
    costs.syncs[f"{project_line()} {what}"] += 1


FREE = set("""view _unsafe_view permute transpose t expand as_strided slice select squeeze unsqueeze
    split split_with_sizes unbind detach alias diagonal unfold lift_fresh empty empty_like new_empty
    empty_strided unsqueeze_ squeeze_ set_ _local_scalar_dense""".split())  # launch no kernel
KERNELS = {  # operations of more than one
    "native_batch_norm": 3, "native_batch_norm_backward": 2, "batch_norm_stats": 1, "logsumexp": 5,
    "nll_loss_backward": 2, "sort": 4, "topk": 3, "kthvalue": 2, "randperm": 5, "scatter_add": 2,
    "_cdist_backward": 3, "constant_pad_nd": 2}
PASSES = {  # over their tensors, where it is more than one
    "native_batch_norm": 1.5, "native_batch_norm_backward": 1.7, "kthvalue": 8, "sort": 10}


def kernels(name, args):
    if name in FREE:
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        return math.ceil(len(args[0]) / 48)
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "convolution" and args[2] is not None:  # its bias
        return 2
    if name == "native_batch_norm" and not args[5]:  # in eval mode
        return 1
    return KERNELS.get(name, 1)


def count(func, name, args, kwargs, out, tensors):
    n = kernels(name, args)
    size = sum(t.nbytes for t in {id(t): t for t in tensors}.values()) if n else 0
    if name != "native_batch_norm" or args[5]:
        size *= PASSES.get(name, 1)
    work = 0
    if func.overloadpacket in flop_registry:
        work = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    dtypes = {t.dtype for t in tensors}
    rate = 300e12 if torch.bfloat16 in dtypes else 150e12
    costs.launches += n
    costs.flops += work
    costs.bytes += size
    costs.seconds += max(work / rate, size / 3.2e12, 2e-6 * n)
    costs.largest = max([costs.largest, *(t.nbytes for t in tensors)])


# --------------------------------------------------------------------------------------- the tensor

def no_numpy(self, *args, **kwargs):
    raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")


class CudaTensor(torch.Tensor):
    """Says that it is on cuda:0; its values are those of `held`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=CUDA)
        self.held = held.detach()
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    numpy = __array__ = no_numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self):
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):  # torch.save
        sync("save")
        return self.held.detach().clone().__reduce_ex__(protocol)

    def tolist(self):
        sync("tolist")
        return self.held.tolist()


def held(a):
    """What stands in the place of an argument when the CPU computes."""
    if isinstance(a, CudaTensor):
        if hollow and a.held.device.type == "cpu":
            a.held = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        return a.held
    if isinstance(a, torch.device) and a.type == "cuda":
        return torch.device("meta" if hollow else "cpu")
    if isinstance(a, torch._C.Generator) and a._cdata in CudaGenerator.made:
        return None if hollow else CudaGenerator.made[a._cdata].next()
    return a


class CudaGenerator(torch._C.Generator):
    """As on CUDA its state has 16 bytes, the seed and how much was drawn; a CPU's has 5,056."""
    made = {}  # operations are given another Python object for the same generator

    def __new__(cls, device="cpu"):
        if torch.device(device).type == "cpu":
            return torch._C.Generator("cpu")
        self = super().__new__(cls, torch.device("cpu"))
        self.state = [0, 0]
        cls.made[self._cdata] = self
        return self

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: CUDA)

    def manual_seed(self, seed):
        self.state = [seed, 0]
        return self

    def initial_seed(self):
        return self.state[0]

    def next(self):
        seed, drawn = self.state
        self.state[1] += 4
        return super().manual_seed((seed * 1_000_003 + drawn) % 2 ** 63)

    def get_state(self):
        return torch.tensor(self.state).view(torch.uint8)

    def set_state(self, state):
        if isinstance(state, CudaTensor) or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor on the CPU")
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self.state = state.view(torch.int64).tolist()
        return self


# ---------------------------------------------------------------------------------- every operation

SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2",
         "unique_dim", "unique_consecutive", "bincount", "_linalg_check_errors"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
NO_SCALARS = {"mm", "bmm", "addmm", "cat", "stack", "convolution", "native_batch_norm", "gather"}


def check_generator(name, flat, on_cuda):
    for rng in flat:
        is_rng = isinstance(rng, torch._C.Generator)
        if is_rng and (rng._cdata in CudaGenerator.made) != on_cuda:
            kind = "cuda" if on_cuda else "cpu"
            raise RuntimeError(f"Expected a '{kind}' device type for generator in {name}")


def check_devices(name, args, on_cpu):
    """CUDA takes a number from the CPU, and CPU indices (at the price of a sync)."""
    if name in INDEX:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError("indices should be on the device of the indexed tensor, the CPU")
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            sync("mask as an index")
        for i in indices:
            if not isinstance(i, CudaTensor):
                sync("index on the CPU")
        on_cpu = [a for a in args[2:3] if any(a is b for b in on_cpu)]
    for a in on_cpu:
        if a.ndim > 0 or name in NO_SCALARS:
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu "
                               f"({name}, shape {tuple(a.shape)})")


PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}


def cast(values, dtype):
    flat, spec = tree_flatten(values)
    flat = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in flat]
    return tree_unflatten(flat, spec)


remembered = {}  # results of shapes_only


def shapes_only(func, name, args, kwargs):
    """A result without values. What was asked before with these shapes is remembered."""
    if name == "_local_scalar_dense":
        return 1
    changes = name.endswith("_") or name.startswith("_fused_")
    if changes and torch.Tag.inplace_view not in func.tags:
        return args[0] if len(func._schema.returns) == 1 else None
    if any(result.alias_info for result in func._schema.returns):  # a view
        return func(*args, **kwargs)
    flat, _ = tree_flatten((args, kwargs))
    key = [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in flat]
    key = (func, tuple(kwargs), *key)
    if key not in remembered:
        remembered[key] = func(*args, **kwargs)
    flat, spec = tree_flatten(remembered[key])
    flat = [torch.empty_like(a) if isinstance(a, torch.Tensor) else a for a in flat]
    return tree_unflatten(flat, spec)


def compute(func, name, args, kwargs):
    if name == "batch_norm_stats":  # only CUDA has it
        h = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        var, mean = torch.var_mean(h, (0, 2, 3), correction=0)
        return mean, (var + args[1]).rsqrt()
    if hollow:
        return shapes_only(func, name, args, kwargs)
    if name in PRODUCTS and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args):
        return cast(func(*cast(args, torch.float32), **kwargs), torch.bfloat16)  # CPUs are slow
    return func(*args, **kwargs)


def dispatch(func, args, kwargs):
    name = func.overloadpacket.__name__
    flat, spec = tree_flatten((args, kwargs))
    ours = [a for a in flat if isinstance(a, CudaTensor)]
    on_cpu = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, CudaTensor)]
    target = kwargs.get("device")
    on_cuda = bool(ours) if target is None else torch.device(target).type == "cuda"
    if not ours and not on_cuda:
        check_generator(name, flat, False)
        return func(*args, **kwargs)

    check_generator(name, flat, on_cuda)
    if name == "copy_" and on_cpu or name == "_to_copy" and bool(ours) != on_cuda:
        sync("copy to the GPU" if on_cpu and name != "copy_" else "copy between devices")
    elif on_cpu:
        check_devices(name, args, on_cpu)
    elif name in INDEX:
        check_devices(name, args, [])
    if name in SYNCS:
        sync(name)

    before = [held(a) for a in flat]
    cpu_args, cpu_kwargs = tree_unflatten(before, spec)
    out = compute(func, name, cpu_args, cpu_kwargs)
    known = {id(b): a for a, b in zip(flat, before) if isinstance(a, torch.Tensor)}
    if hollow and name == "_to_copy" and not on_cuda:
        out = torch.zeros(out.shape, dtype=out.dtype)

    def wrap(o):
        if not isinstance(o, torch.Tensor) or not on_cuda:
            return o
        return known[id(o)] if id(o) in known else CudaTensor(o)

    if torch.Tag.inplace_view in func.tags:  # squeeze_: the outside changes its shape too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    flat_out, out_spec = tree_flatten(out)
    flat_out = [wrap(o) for o in flat_out]
    tensors = ours + [o for o in flat_out if isinstance(o, CudaTensor)]
    count(func, name, cpu_args, cpu_kwargs, out, tensors)
    return tree_unflatten(flat_out, out_spec)


class Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


# --------------------------------------------------------------------------------------- installing

def try_backward():
    x = CudaTensor(torch.ones(1)).requires_grad_()
    try:
        (x * x).backward(CudaTensor(torch.ones(1)))
    except RuntimeError:
        return False
    return True


def let_autograd_run():
    """Autograd asks the driver one question before a backward pass; here it always hears "no".

    The question is a virtual function of torch's CUDA hooks. Which one is found by trying: the one
    in whose place "no" lets a backward pass through.
    """
    if try_backward():  # a torch without CUDA asks nothing
        return True
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        get_hooks = library._ZN2at6detail12getCUDAHooksEv
    except (OSError, AttributeError):
        return False
    get_hooks.restype = ctypes.c_void_p
    table_of = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    before, size = 2, 130  # two words stand before a table
    original = (ctypes.c_void_p * size).from_address(table_of[0] - 8 * before)
    address = table_of[0]
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda hooks: False)
    for slot in range(before + 2, 40):  # behind two destructors, among the first
        table = (ctypes.c_void_p * size)(*original)
        table[slot] = ctypes.cast(no, ctypes.c_void_p).value
        table_of[0] = ctypes.addressof(table) + 8 * before
        if try_backward():
            let_autograd_run.kept = (table, no)  # for as long as the process lives
            return True
    table_of[0] = address
    return False


def install():
    """From here on torch.cuda.is_available(); False if that cannot be had with this torch."""
    torch._C._ensureCUDADeviceGuardSet()
    if not let_autograd_run():
        return False
    torch._C._set_only_lift_cpu_tensors(True)
    rng = CudaGenerator("cuda")
    answers = {
        "is_available": True, "device_count": 1, "is_initialized": True, "current_device": 0,
        "_lazy_init": None, "set_device": None, "get_device_name": "Pretended GPU",
        "get_device_capability": (9, 0), "max_memory_allocated": 0, "is_bf16_supported": True}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda._lazy_call = lambda function, **kwargs: function()
    torch.cuda.synchronize = lambda *args: sync("synchronize")
    torch.cuda.default_generators = (rng,)
    torch.cuda.get_rng_state_all = lambda: [rng.get_state()]
    torch.cuda.set_rng_state_all = lambda states: rng.set_state(states[0])
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.backends.cudnn.enabled = False  # its batch norm cannot be computed here
    torch.Generator = CudaGenerator
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for module in list(sys.modules.values()):  # optimizers take their fast path
        supported = getattr(module, "_foreach_supported_types", None)
        if isinstance(supported, list) and CudaTensor not in supported:
            supported.append(CudaTensor)
    Everywhere().__enter__()
    return True


# ----------------------------------------------------------------------------------- a whole script

def watch_steps(Run, seen, stop_after):
    """Costs of what runs inside Run.flops, by its name; what Run.log costs is not a step's."""
    flops, log, save = Run.flops, Run.log, Run.save

    @contextlib.contextmanager
    def watched_flops(self, kind):
        before = start_counting()
        with flops(self, kind):
            yield
        start_counting()
        seen.setdefault(kind, []).append(before)

    def watched_log(self, *args, **scalars):
        kept = vars(costs).copy()
        kept["syncs"] = costs.syncs.copy()
        log(self, *args, **scalars)
        vars(costs).update(kept)

    def watched_save(self, epoch):
        save(self, epoch)
        if stop_after and epoch >= stop_after:
            raise KeyboardInterrupt

    Run.flops, Run.log, Run.save = watched_flops, watched_log, watched_save


def main():
    script, *argv = sys.argv[1:]
    stop_after = int(os.environ.get("STOP_AFTER_EPOCH", "0"))
    sys.path[:0] = [ROOT]
    torch.set_num_threads(1)
    if not install():
        print("NOT HERE: this torch does not take a pretended device")
        return
    import common
    seen = {}
    watch_steps(common.Run, seen, stop_after)
    module = importlib.import_module(Path(script).stem)
    try:
        common.cli(module.main, module.Args, module.PRESETS, argv=argv)
    finally:
        kinds = {}
        for kind, steps in seen.items():
            syncs = sum((step.syncs for step in steps), Counter())
            kinds[kind] = {"steps": len(steps), "launches": steps[-1].launches, "syncs": syncs}
        print(json.dumps(kinds))


if __name__ == "__main__":
    main()
