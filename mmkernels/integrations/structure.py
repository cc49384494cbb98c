"""How a module computes attention, and whether it cuts patches: read from its code and settings.

Nothing goes by a module's name. The names that its forward uses, and those of the functions and
methods that it calls, tell which attention function it ends in. Submodules are looked at by
themselves.
"""

import dis
import enum
import inspect
import math
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from mmkernels.integrations.callsites import declines_weights, out_of_reach
from mmkernels.integrations.forwards import original_class
from mmkernels.modules.projection import CONVOLUTIONS, is_patch_convolution

SDPA_FUNCTION = nn.functional.scaled_dot_product_attention
SDPA = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
# Of diffusers. It calls a function from a registry, where "native" is the one that calls torch's.
DISPATCH = "dispatch_attention_fn"
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "@"})
# A convolution over more channels than this reads features, not pixels, spectrograms or latents.
PIXEL_CHANNELS = 16
# Layers of torch that hold multi-head attention.
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# What a forward may name without computing attention in it: machinery around a model, and torch,
# where the functions that are looked for stand.
_NOT_FOLLOWED = ("torch.", "transformers.modeling_utils", "transformers.generation", "accelerate.")


class Seam(enum.Enum):
    """Where a module can be made to call mmkernels."""

    MULTIHEAD = "torch.nn.MultiheadAttention"
    INTERFACE = "the attention interface of transformers"
    SDPA = "torch's scaled_dot_product_attention"
    NONE = "attention of its own products and softmax"
    PATCHES = "a convolution in steps over pixels"


class Code(NamedTuple):
    """What a forward and all that it calls are made of.

    Attributes:
        names: of globals, attributes and methods; "@" for the operator.
        strings: literals.
        parameters: of the forward itself.
        keywords: of the calls in the forward itself.
        functions: all of it.
    """

    names: frozenset[str]
    strings: frozenset[str]
    parameters: frozenset[str]
    keywords: frozenset[str]
    functions: tuple[FunctionType, ...]


NO_CODE = Code(frozenset(), frozenset(), frozenset(), frozenset(), ())


class Found(NamedTuple):
    """A module that computes attention or cuts patches.

    Attributes:
        name: where it is in the model.
        module: it.
        seam: where it can be reached.
        code: of its forward.
        config: its own, else that of the model of transformers around it; None: neither has one.
        weights_declined: for a multi-head attention, whether what calls it says need_weights=False.
            Those who call it by themselves may do so.
    """

    name: str
    module: nn.Module
    seam: Seam
    code: Code
    config: Any
    weights_declined: bool

    @property
    def implementation(self) -> str | None:
        """Which attention the config asks for."""
        return getattr(self.config, "_attn_implementation", None)


def search(model: nn.Module) -> Iterator[Found]:
    """All such modules in a model, each once, those of mmkernels left out."""
    codes: dict[int, Code] = {}
    for name, module, around in _walk(model, "", (), set()):
        seam: Seam | None
        code = NO_CODE
        if isinstance(module, CONVOLUTIONS):
            seam = Seam.PATCHES if reads_pixels(module) else None
        elif isinstance(module, torch.jit.ScriptModule):
            seam = scripted_seam(module)
        else:
            code = codes[id(module)] = read(module)
            seam = attention_seam(module, code)
        if seam is not None:
            configs = (getattr(one, "config", None) for one in (module, *reversed(around)))
            config = next((one for one in configs if hasattr(one, "_attn_implementation")), None)
            callers = [
                function for one in around for function in codes.get(id(one), NO_CODE).functions
            ]
            declined = not around or declines_weights(name.rpartition(".")[2], callers)
            yield Found(name, module, seam, code, config, declined)


def _walk(
    module: nn.Module, name: str, around: tuple[nn.Module, ...], seen: set[int]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Each module with its place, and those that it is in."""
    if id(module) in seen or original_class(module).__module__.startswith("mmkernels."):
        return
    seen.add(id(module))
    yield name, module, around
    if not isinstance(module, torch.jit.ScriptModule):
        for child, inner in module.named_children():
            place = f"{name}.{child}" if name else child
            yield from _walk(inner, place, (*around, module), seen)


def read(module: nn.Module) -> Code:
    """The code of module's forward, and of the functions and methods that it calls."""
    forward = inspect.unwrap(original_class(module).forward)
    if not isinstance(forward, FunctionType):
        return NO_CODE
    # Of torch's own code that is not followed, these call attention.
    blocks = []
    if isinstance(module, _LAYERS):
        named = ("_sa_block", "_mha_block")
        blocks = [getattr(type(module), name) for name in named if hasattr(module, name)]
    pending = [forward, *blocks]
    functions: dict[FunctionType, None] = {}  # in the order of their discovery
    names: set[str] = set()
    strings: set[str] = set()
    while pending:
        function = pending.pop()
        if function in functions or not _is_followed(function):
            continue
        functions[function] = None
        used: set[str] = set()
        for code in _codes(function.__code__):
            used.update(code.co_names)
            strings.update(x for x in code.co_consts if isinstance(x, str))
            if any(_is_product(step) for step in dis.get_instructions(code)):
                names.add("@")
        for holder in (function.__globals__, module.__dict__):
            if any(holder.get(name) is SDPA_FUNCTION for name in used):
                names.add("scaled_dot_product_attention")  # whatever it is called there
        names |= used
        pending += _called(module, function, used)
    keywords = {
        name
        for code in _codes(forward.__code__)
        for constant in code.co_consts
        if isinstance(constant, tuple)
        for name in constant
        if isinstance(name, str)
    }
    return Code(
        frozenset(names), frozenset(strings), frozenset(inspect.signature(forward).parameters),
        frozenset(keywords), tuple(dict.fromkeys((*functions, *blocks))),
    )  # fmt: skip


def attention_seam(module: nn.Module, code: Code) -> Seam | None:
    """How module computes attention; None: it computes none."""
    if isinstance(module, nn.MultiheadAttention):
        return Seam.MULTIHEAD
    if "ALL_ATTENTION_FUNCTIONS" in code.names:
        return Seam.INTERFACE
    if DISPATCH in code.names or not SDPA.isdisjoint(code.names):
        return Seam.SDPA
    # A router of experts has a softmax and products, too, but takes the best few.
    names = {name.lower() for name in code.names}
    by_hand = "softmax" in names and not PRODUCTS.isdisjoint(names)
    return Seam.NONE if by_hand and "topk" not in names else None


def bypassed(one: Found) -> str | None:
    """The setting for which a module takes another branch than that with torch's function."""
    kind = original_class(one.module)
    methods = [x for x in one.code.functions if getattr(kind, x.__name__, None) is not None]
    own = [x for x in methods if inspect.unwrap(getattr(kind, x.__name__)) is x]
    return out_of_reach(one.module, own, SDPA)


def dispatched_elsewhere(one: Found) -> str | None:
    """The backend of diffusers that a module runs on, if it does not end in torch's function."""
    if DISPATCH not in one.code.names:
        return None
    from diffusers.models import attention_dispatch

    processor = getattr(one.module, "processor", None)
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism"
    chosen = getattr(processor, "_attention_backend", None)
    chosen = chosen or attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    name = str(getattr(chosen, "value", chosen))
    return None if name == "native" else name


def scripted_seam(module: torch.jit.ScriptModule) -> Seam | None:
    """The same for a module whose code is a graph."""
    graph = str(module.inlined_graph) if hasattr(module, "forward") else ""
    if "aten::scaled_dot_product_attention" in graph:
        return Seam.SDPA
    by_hand = "aten::softmax" in graph and ("aten::matmul" in graph or "aten::bmm" in graph)
    return Seam.NONE if by_hand else None


def takes_mask(code: Code) -> bool:
    """Whether the forward is given a mask by the model around it."""
    return any("mask" in parameter for parameter in code.parameters)


def splits_by_cu_seqlens(code: Code) -> bool:
    """Whether the forward cuts packed images apart unless a flash attention is asked for."""
    asks = "is_flash_attention_requested" in code.names or "flash_attention_2" in code.strings
    return asks and "cu_seqlens" in code.parameters


def reads_pixels(module: nn.Module) -> bool:
    """Whether module is a convolution from few channels in steps, as patches are cut."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.in_channels <= PIXEL_CHANNELS
        and math.prod(module.stride) > 1
        and math.prod(module.kernel_size) > 1
    )


def why_no_patches(conv: nn.Module) -> str | None:
    """Why a convolution that reads pixels is no product of patches; None: it is one."""
    original = original_class(conv)
    if original not in CONVOLUTIONS:
        return f"{original.__name__} is a convolution with code of its own"
    assert isinstance(conv, CONVOLUTIONS)  # said once more, for the type checker
    if type(conv.weight) not in (torch.Tensor, nn.Parameter):
        return (
            f"its weight is a {type(conv.weight).__name__}; replace before sharding or quantising"
        )
    if not is_patch_convolution(conv):
        return (
            f"padding={conv.padding}, dilation={conv.dilation}, groups={conv.groups}: patches have "
            "no padding, no dilation and one group"
        )
    # Where neighbours share most of their pixels, a convolution reads them once, a product often.
    if any(
        stride != kernel and (stride < 4 or 2 * stride <= kernel)
        for stride, kernel in zip(conv.stride, conv.kernel_size, strict=True)
    ):
        return f"kernel_size={conv.kernel_size} and stride={conv.stride}: no patches side by side"
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_product(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_MATRIX_MULTIPLY" or (
        step.opname == "BINARY_OP" and step.argrepr in ("@", "@=")
    )


def _called(module: nn.Module, function: FunctionType, names: set[str]) -> list[FunctionType]:
    """The Python functions behind names in a function of module, and those that it wraps."""
    found: list[Any] = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    for name in names:
        method = inspect.getattr_static(original_class(module), name, None)
        found.append(method.__func__ if isinstance(method, (staticmethod, classmethod)) else method)
        # A function, or a plain object that is called, such as an attention processor.
        held = module.__dict__.get(name)
        found += [held, type(held).__dict__.get("__call__")]
        found.append(function.__globals__.get(name))
    return [inspect.unwrap(x) for x in found if isinstance(inspect.unwrap(x), FunctionType)]


def _is_followed(function: FunctionType) -> bool:
    module = function.__module__ or ""
    return (
        not module.startswith(_NOT_FOLLOWED)
        and module.partition(".")[0] not in sys.stdlib_module_names
    )


def _filled(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:  # of a function that is still being defined
        return False
