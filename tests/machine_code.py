"""What nvcc makes of a CUDA source, and what is wrong with it.

Needs nvcc, and cuobjdump from triton's package.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import mmkernels

CSRC = Path(mmkernels.__file__).parent.parent / "csrc"
# What the Hopper kernels are written for: products of a warpgroup, copies by TMA, and registers
# that warpgroups hand to each other. ptxas may drop the last, with no more than a remark.
HOPPER_INSTRUCTIONS = ("HGMMA", "UTMALDG", "USETMAXREG")
# ptxas's remarks on them: setmaxnreg is ignored (C7508), products are serialised (C7510, C7518), a
# wait or a fence was missing and is put in (C7517, C7519).
REMARK = r"\(C75\d\d\)"


class Resources(NamedTuple):
    """What a thread of a compiled kernel takes: registers, and bytes of stack and local memory."""

    registers: int
    stack: int
    local: int


class MachineCode(NamedTuple):
    """A compiled source.

    Attributes:
        file: machine code and PTX, for one architecture.
        said: by the compiler.
    """

    file: Path
    said: str

    def dump(self, option: str) -> str:
        """What cuobjdump shows."""
        from triton.backends import nvidia

        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        done = subprocess.run([tool, option, self.file], check=True, capture_output=True, text=True)
        return done.stdout

    def resources(self) -> list[Resources]:
        """Of each kernel."""
        text = self.dump("--dump-resource-usage")
        found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
        return [Resources(*map(int, numbers)) for numbers in found]


# As torch compiles extensions: what converts or computes with 16-bit floats must say how.
TORCH_FLAGS = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)


def compiled(source: Path, arch: str, folder: Path) -> MachineCode:
    """A source compiled for "80" or "90a"."""
    file = folder / f"{source.stem}.{arch}.fatbin"
    code = f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", *TORCH_FLAGS]
    nvcc = ["nvcc", *flags, code, "-fatbin", source, "-o", file]
    done = subprocess.run(nvcc, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return MachineCode(file, done.stderr)


def portable_ptx(source: Path, folder: Path) -> list[str]:
    """The PTX for 8.0 of each kernel of a source."""
    file = folder / f"{source.stem}.ptx"
    nvcc = ["nvcc", "-std=c++17", f"-I{CSRC}", "-arch=compute_80", "-ptx", source, "-o", file]
    subprocess.run(nvcc, check=True, capture_output=True)
    return re.split(r"\.entry\s+", file.read_text())[1:]


def faults(code: MachineCode) -> list[str]:
    """Of any kernel: none may spill, have a stack or local memory."""
    kernels = code.resources()
    found = [str(kernel) for kernel in kernels if kernel.stack or kernel.local]
    return found if kernels else ["no kernel"]


def hopper_faults(code: MachineCode) -> list[str]:
    """Of a kernel for Hopper, besides."""
    found = [line for line in code.said.splitlines() if re.search(REMARK, line)]
    sass = code.dump("-sass")
    found += [f"no {name}" for name in HOPPER_INSTRUCTIONS if not re.search(rf"\b{name}\b", sass)]
    ptx = code.dump("-ptx")
    return found + wgmma_faults(ptx) + order_faults(ptx)


# Instruction, what has to follow its last use, and why.
FOLLOWS = (
    (r"mbarrier\.init", r"fence\.mbarrier_init", "TMA may not know the barriers"),
    (
        r"cp\.async\.bulk\.commit_group",
        r"cp\.async\.bulk\.wait_group",
        "stores may outlast the block",
    ),
)


def order_faults(ptx: str) -> list[str]:
    """Where kernels lack an instruction whose absence the emulator does not notice."""
    found = []
    for kernel in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", kernel)
        for first, then, why in FOLLOWS:
            *_, last = ("", *re.split(first, kernel))
            if re.search(first, kernel) and not re.search(then, last):
                found.append(f"{name and name[0]}: {why}")
        if len(re.findall(r"\bbarrier\.arrive\b", kernel)) and "barrier.sync" not in kernel:
            found.append(f"{name and name[0]}: nobody waits for those that arrive")
    return found


def wgmma_faults(ptx: str) -> list[str]:
    """Where kernels use wgmma without what makes its results seen.

    Each group of products has one wgmma.fence before it and a wgmma.commit_group behind it, and
    after the last one comes a wgmma.wait_group that leaves none pending. Instructions are taken in
    the order of the text, in which nvcc leaves inline assembly.
    """
    found = []
    for kernel in re.split(r"\.entry\s+", ptx)[1:]:
        fenced = issued = pending = False
        steps = re.findall(r"\bwgmma\.(\w+)[\w.]*\s*(\d*)", kernel)
        wrong = []
        for step, left in steps:
            if step == "fence":
                if issued:
                    wrong.append(
                        "products without a wgmma.commit_group before the next wgmma.fence"
                    )
                fenced = True
            elif step == "mma_async":
                if not fenced:
                    wrong.append("wgmma.mma_async without a wgmma.fence before its group")
                issued = True
            elif step == "commit_group":
                if not issued:
                    wrong.append("wgmma.commit_group without a product before it")
                fenced, issued, pending = False, False, True
            elif step == "wait_group":
                if issued:
                    wrong.append("wgmma.wait_group before its group's wgmma.commit_group")
                pending = pending and int(left) > 0
        if issued:
            wrong.append("products without a wgmma.commit_group behind them")
        if pending:
            wrong.append("a group without a wgmma.wait_group 0 behind it")
        name = re.match(r"\w+", kernel)
        found += [f"{name and name[0]}: {fault}" for fault in dict.fromkeys(wrong)]
    return found
