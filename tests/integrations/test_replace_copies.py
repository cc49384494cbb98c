"""Replaced models that are copied, pickled, saved, replicated, made empty, or run by threads."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import mmkernels as mm
from tests.integrations.counting import kernel_calls
from tests.integrations.subjects import (
    EVERY,
    assert_close,
    inputs,
    kernels,
    make,
    mixed,
    output,
    run,
)


def through_torch(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": through_torch,
}


@pytest.mark.parametrize("how", COPIES)
@EVERY
def test_copies(subject, how):
    """A copy is replaced as its original, and each is restored by itself."""
    original = make(subject)
    wanted, _ = run(original)
    report = mm.replace(original)
    twin = COPIES[how](original)
    assert run(twin)[1] == kernels(subject)
    assert_close(run(twin)[0], wanted)
    assert mm.replace(twin) == report
    mm.restore(twin)
    got, ran = run(twin)
    assert ran == (0, 0)
    assert torch.equal(got, wanted)
    assert run(original)[1] == kernels(subject)
    assert repr(twin) == repr(make(subject))


@EVERY
def test_copies_of_a_restored_model(subject):
    """Nothing of ours goes with them."""
    model = make(subject)
    mm.replace(model)
    mm.restore(model)
    assert b"mmkernels" not in pickle.dumps(model)


@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_shallow_copy(name):
    model = mixed()
    mm.replace(model)
    module = model.get_submodule(name)
    twin = copy.copy(module)
    assert type(twin) is type(module)
    mm.restore(twin)
    assert "mmkernels" not in repr(twin)
    assert "mmkernels" in repr(module)


READ = """
import sys
import torch
assert "mmkernels" not in sys.modules
torch.set_num_threads(1)  # as here: the sums are the same, to the bit
{imports}
pairs = torch.load(sys.argv[1], weights_only=False)

def output(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]

for model, x, wanted, kernels in pairs:
    torch.testing.assert_close(output(model, x), wanted, rtol=1e-4, atol=1e-5)

import mmkernels as mm
from tests.integrations.counting import kernel_calls

for model, x, wanted, kernels in pairs:
    with kernel_calls() as calls:
        output(model, x)
    assert (calls.attention, calls.patch_embed) == kernels, calls.by_op
    mm.restore(model)
    assert torch.equal(output(model, x), wanted)
    assert "mmkernels" not in repr(model)
"""


@pytest.mark.parametrize(
    "subjects, imports",
    [
        (["torch", "timm ViT"], ""),
        (["transformers Llama", "transformers ViT"], ""),
        (["transformers ViT"], "import mmkernels"),
    ],
    ids=["classes", "interface", "interface, mmkernels imported"],
)
def test_another_process(subjects, imports, tmp_path):
    """What it needs of mmkernels, unpickling brings."""
    saved = []
    for subject in subjects:
        model = make(subject)
        wanted, _ = run(model)
        mm.replace(model)
        saved.append((model, inputs(model), wanted, kernels(subject)))
    torch.save(saved, tmp_path / "saved")
    command = [sys.executable, "-W", "ignore", "-c", READ.format(imports=imports)]
    done = subprocess.run([*command, str(tmp_path / "saved")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@EVERY
def test_replicas(subject):
    """As `nn.DataParallel` makes them: shallow copies that get parameters of their own."""
    model = make(subject)
    mm.replace(model)

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 1.25)
        return replica

    scaled = make(subject)
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.25)
    got, ran = run(replicate(model))
    assert ran[0] == kernels(subject)[0]
    assert_close(got, run(scaled)[0])


@EVERY
def test_made_on_meta(subject):
    """Replaced before there is any memory, then given it and a checkpoint."""
    source = make(subject)
    wanted, _ = run(source)
    with torch.device("meta"):
        model = make(subject)
    report = mm.replace(model)
    assert len(report.swapped) == sum(kernels(subject))
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=True)
    # Buffers that no checkpoint holds, such as frequencies, are the model's own affair.
    buffers = dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    got, ran = run(model)
    assert ran == kernels(subject)
    assert_close(got, wanted)


@EVERY
def test_assigned_state(subject):
    """`load_state_dict(assign=True)`, as libraries load from meta, changes the parameters."""
    source = make(subject)
    wanted, _ = run(source)
    model = make(subject)
    mm.replace(model)
    model.load_state_dict(source.state_dict(), assign=True)
    assert run(model)[1] == kernels(subject)
    assert_close(run(model)[0], wanted)


def test_converted_dtypes():
    model = mixed()
    mm.replace(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        with kernel_calls() as calls:
            assert model(inputs(model).to(dtype)).dtype == dtype
        assert (calls.attention, calls.patch_embed) == (3, 1)


@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_restored_between_the_look_up_of_a_forward_and_its_call(name):
    """As another thread may do it; a hook runs there, too."""
    model = mixed()
    wanted, _ = run(model)
    mm.replace(model)
    model.get_submodule(name).register_forward_pre_hook(lambda *_: mm.restore(model))
    assert_close(run(model)[0], wanted)


@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_replaced_between_the_look_up_of_a_forward_and_its_call(name):
    model = mixed()
    wanted, _ = run(model)

    def hook(*_):
        mm.replace(model)

    model.get_submodule(name).register_forward_pre_hook(hook)
    assert_close(run(model)[0], wanted)


@pytest.mark.parametrize("subject", ["timm ViT", "transformers Llama", "transformers ViT"])
def test_threads_run_while_others_replace(subject):
    model = make(subject)
    x = inputs(model)
    with torch.no_grad():
        wanted = output(model, x)
    errors, stop = [], threading.Event()

    def forward():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert_close(output(model, x), wanted)
        except BaseException as error:
            errors.append(error)

    def switch(act):
        try:
            for _ in range(20):
                act()
        except BaseException as error:
            errors.append(error)
        finally:
            stop.set()

    def there_and_back():
        mm.replace(model)
        mm.restore(model)

    def block():
        with mm.replaced(model):
            pass

    threads = [threading.Thread(target=forward) for _ in range(2)]
    threads += [threading.Thread(target=switch, args=(act,)) for act in (there_and_back, block)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    mm.restore(model)
    assert run(model)[1] == (0, 0)


def test_threads_replace_their_own_models():
    models = [nn.Sequential(mixed()) for _ in range(4)]
    threads = [threading.Thread(target=mm.replace, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({type(model[0].attend) for model in models}) == 1
    assert all(run(model)[1] == (3, 1) for model in models)
