"""What `import mmkernels` costs and touches, and what it does without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mmkernels

PACKAGE = Path(mmkernels.__file__).parent

# Libraries that only their own modules may import.
OPTIONAL = ("triton", "transformers", "accelerate", "gguf", "timm", "sklearn", "matplotlib", "tqdm")


def run(code: str, root: Path = PACKAGE.parent) -> str:
    """The output of `code` in a fresh process that finds mmkernels in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_driver():
    # Any of these would start CUDA or ask the driver.
    output = run("""
import torch

def touched(*_, **__):
    raise AssertionError("the driver was asked")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device",
             "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, touched)

import mmkernels
print(torch.cuda.is_initialized(), torch.cuda.device_count is touched)
""")
    assert output == "False True\n"


def test_import_loads_nothing_optional():
    loaded = json.loads(
        run("""
import json, sys
import torch
before = set(sys.modules)
import mmkernels
print(json.dumps(sorted(set(sys.modules) - before)))
""")
    )
    assert "mmkernels" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(OPTIONAL)
    verbs = [name for name in loaded if name.startswith(("mmkernels.demo", "mmkernels.doctor"))]
    assert verbs == []


def test_attention_loads_no_dtensor():
    output = run("""
import sys
import torch
import mmkernels as mm

q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in "qkv")
mm.attention(q, k, v, causal=True).sum().backward()
mm.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 8, 8))
print([name for name in sys.modules if name.startswith("torch.distributed.tensor")])
""")
    assert output == "[]\n"


def test_import_is_quick():
    code = """
import time
import torch
began = time.perf_counter()
import mmkernels
print(time.perf_counter() - began)
"""
    seconds = min(float(run(code)) for _ in range(3))
    assert seconds < 0.3, f"import mmkernels takes {seconds:.2f} s on top of import torch"


ATTEND = """
import torch
import mmkernels as mm
q, k, v = (torch.randn(1, 5, 2, 8) for _ in "qkv")
print(tuple(mm.attention(q, k, v, causal=True).shape))
"""


def test_attention_works_without_triton():
    assert run("import sys; sys.modules['triton'] = None\n" + ATTEND) == "(1, 5, 2, 8)\n"


def test_attention_works_without_the_extension(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mmkernels", ignore=ignored)
    why_not = """
from mmkernels._core.library import load_error
assert mm.__file__.startswith({folder!r}), mm.__file__
print(load_error())
"""
    shape, reason = run(ATTEND + why_not.format(folder=str(tmp_path)), tmp_path).splitlines()
    assert shape == "(1, 5, 2, 8)"
    assert "not built" in reason
