"""Settings by which `replace` reaches modules that keep their forward."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from mmkernels.integrations.forwards import Changed
from mmkernels.integrations.structure import Found, Seam, splits_by_cu_seqlens, takes_mask

# The attribute in which such a module keeps the setting that it had.
PREVIOUS = "_mmkernels_previous"

# With these a model tells its attention that it is sparse, or has sinks made from the data.
UNSERVED = {"indices", "block_indices", "sinks"}


class Previous(NamedTuple):
    """What a module remembers in its attribute `PREVIOUS`.

    Where it is unpickled, the implementation that is written is made known.

    Attributes:
        setting: what there was.
        written: what `replace` wrote in its place.
    """

    setting: Any
    written: Any

    def __reduce__(self) -> tuple:
        """What makes it again."""
        return _unpickled, (self.setting, self.written)


def _unpickled(setting: Any, written: Any) -> Previous:
    if isinstance(written, str):
        from mmkernels.integrations import transformers as ours

        ours.varlen_implementation()  # registers its name, too
    return Previous(setting, written)


# In evaluation these run attention and all around it in one function of torch that bypasses their
# modules, unless the attribute has this value. It is read for nothing else.
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def switch_fast_path(module: nn.Module) -> None:
    """Lets a layer of torch call its attention module, if that one is changed."""
    for kind, (attribute, value) in _FAST_PATHS.items():
        if not isinstance(module, kind) or PREVIOUS in module.__dict__:
            continue
        if hasattr(module, attribute) and any(isinstance(x, Changed) for x in module.modules()):
            setattr(module, PREVIOUS, Previous(getattr(module, attribute), value))
            setattr(module, attribute, value)


def switch_interface(model: nn.Module, found: Sequence[Found]) -> dict[str, tuple[bool, str]]:
    """Switches models of transformers by their configs.

    A config is read in every call, by the attention modules and by the model that makes their
    masks. It is left where a module that computes attention itself reads it, too: the masks would
    change under that one.

    Args:
        model: the whole model.
        found: all that was found in it.

    Returns:
        For the name of each module that uses the attention interface: whether it is switched, and
        how or why not.
    """
    readers = defaultdict(list)  # id of a config -> the modules that read it
    for one in found:
        if one.seam is Seam.INTERFACE:
            readers[id(one.config)].append(one)
    try:
        from mmkernels.integrations import transformers as ours
    except ImportError as error:
        why = f"needs transformers 4.57 or later: {error}"
        return {one.name: (False, why) for group in readers.values() for one in group}
    blockers = {id(one.config): type(one.module).__name__ for one in found if _blocks(one)}
    owned = _configs(model)
    result = {}
    for key, group in readers.items():
        config, why_left = group[0].config, _why_left(group, blockers.get(key), key in owned)
        varlen = all(splits_by_cu_seqlens(one.code) for one in group)
        if why_left is None:
            name = ours.varlen_implementation() if varlen else ours.NAME
            _switch([one.module for one in group], config, name)
        how = "attention interface" + ", all sequences in one call" * varlen
        result.update({one.name: (why_left is None, why_left or how) for one in group})
    _switch_outer_models(model, found, result, ours.NAME)
    return result


def _configs(model: nn.Module) -> set[int]:
    """The ids of the configs of all models of transformers in a model, and of those inside them."""
    from transformers import PreTrainedModel

    pending = [one.config for one in model.modules() if isinstance(one, PreTrainedModel)]
    ids = set()
    while pending:
        config = pending.pop()
        if config is not None and id(config) not in ids:
            ids.add(id(config))
            pending += [getattr(config, name, None) for name in config.sub_configs]
    return ids


def _why_left(group: Sequence[Found], blocker: str | None, owned: bool) -> str | None:
    config = group[0].config
    if config is None or any(getattr(one.module, "config", None) is not config for one in group):
        return "has no config of its own to be switched by"
    if not owned:
        return "its config is that of a model around this one, which would change; pass that model"
    unserved = {name for one in group for name in UNSERVED & one.code.keywords}
    if unserved:
        return f"passes {', '.join(sorted(unserved))} to its attention, which is not served"
    if blocker is not None:
        return f"shares its config with {blocker}, which computes attention itself"
    if getattr(config, "output_attentions", False):
        return "its config has output_attentions=True, and the weights are never formed"
    return None


def _blocks(one: Found) -> bool:
    if one.seam is Seam.NONE:
        return takes_mask(one.code)
    return one.seam is Seam.SDPA and "_attn_implementation" in one.code.names


def _switch_outer_models(
    model: nn.Module, found: Sequence[Found], result: dict[str, tuple[bool, str]], name: str
) -> None:
    """Switches models that hold others and may make their masks, where all in them is switched."""
    from transformers import PreTrainedModel

    switched = {id(one.config) for one in found if result.get(one.name, (False,))[0]}
    for place, outer in model.named_modules():
        if not isinstance(outer, PreTrainedModel) or id(outer.config) in switched:
            continue
        inside = [one for one in found if not place or one.name.startswith(f"{place}.")]
        reads = [one for one in inside if one.seam is Seam.INTERFACE]
        if (
            reads
            and all(id(one.config) in switched for one in reads)
            and not any(map(_blocks, inside))
        ):
            _switch([outer], outer.config, name)


def _switch(modules: Sequence[nn.Module], config: Any, name: str) -> None:
    """Makes `name` the implementation of a config, and the modules that read it remember."""
    current = config._attn_implementation
    known = (module.__dict__[PREVIOUS] for module in modules if PREVIOUS in module.__dict__)
    # What somebody has set since is what there was.
    previous = next((one.setting for one in known if one.written == current), current)
    if previous == name and name.startswith("mmkernels"):  # so it was loaded
        return
    for module in modules:
        setattr(module, PREVIOUS, Previous(previous, name))
    # The public setter would set the configs inside, too.
    config._attn_implementation_internal = name


def switch_back(module: nn.Module) -> None:
    """Undoes the above in one module, unless somebody has switched it again."""
    if PREVIOUS not in module.__dict__:
        return
    previous, written = module.__dict__.pop(PREVIOUS)
    for kind, (attribute, _) in _FAST_PATHS.items():
        if isinstance(module, kind):
            if getattr(module, attribute) == written:
                setattr(module, attribute, previous)
            return
    config: Any = module.config
    if config._attn_implementation == written:
        config._attn_implementation_internal = previous
