"""Does a model of transformers on mmkernels take torch's tensor parallelism?"""

import pytest
import torch

pytest.importorskip("transformers")

import mmkernels as mm
from mmkernels import testing
from tests.distributed import world
from tests.distributed.test_dtensor import mesh_of
from tests.integrations.families_text import TEXT


def llama(dtype):
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    mm.replace(model)
    return model.to(dtype)


def parallelized(model, local_heads):
    """The model with each layer's heads divided between the processes."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        f"model.layers.*.self_attn.{name}_proj": ColwiseParallel(use_local_output=local_heads)
        for name in "qkv"
    }
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    if not local_heads:  # heads that are DTensors are rotated by DTensors
        both = (Replicate(), Replicate())
        plan["model.rotary_emb"] = PrepareModuleOutput(
            output_layouts=both, desired_output_layouts=both, use_local_output=False
        )
    return parallelize_module(model, mesh_of(2), plan)


def results(model, tokens, real):
    """logits, and the gradient of every parameter."""
    model, tokens, real = (x.to(world.device_type(2)) for x in (model, tokens, real))
    logits = model(tokens, attention_mask=real, use_cache=False).logits
    (logits.double().sin() * real[..., None]).sum().backward()
    found = {"logits": logits, **{name: x.grad for name, x in model.named_parameters()}}
    return {
        name: getattr(x, "full_tensor", lambda x=x: x)().detach().cpu() for name, x in found.items()
    }


def compare(local_heads):
    """logits and gradients: parallel, in float64, and of one process."""
    tokens = torch.randint(3, TEXT["vocab_size"], (2, 24))
    real = torch.ones_like(tokens)
    real[1, :7] = 0
    parallel = results(parallelized(llama(torch.float32), local_heads), tokens, real)
    return parallel, *(results(llama(x), tokens, real) for x in (torch.float64, torch.float32))


@pytest.mark.parametrize("local_heads", [True, False], ids=["local", "DTensors"])
def test_llama_in_two_processes(local_heads):
    for parallel, exact, alone in world.run(2, compare, local_heads):
        assert len(parallel) > 15
        for name, x in parallel.items():
            testing.assert_accurate(name, x, exact[name], alone[name])
