"""`python -m tools.abi_audit WHEEL`: where a compiled wheel runs, and its platform tag for that.

A wheel for every Python and every torch that its metadata admits holds libraries that need torch's
stable ABI as of the oldest such release, nothing of Python's, and of the system's libraries only
what every Linux of the platform tag has. torch-abi-audit knows the first, auditwheel the last. A
wheel without a fault gets that tag; any other stays as it is, and the exit status is 1.
"""

import argparse
import email
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch_abi_audit
from elftools.elf.elffile import ELFFile
from packaging.requirements import Requirement
from packaging.version import Version

# In builds for the CPU and for CUDA, loaded before the extension.
FROM_TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
PYTHON_SYMBOL = r"_?Py[A-Z_]"


def oldest_torch(archive: zipfile.ZipFile) -> Version:
    """2.11 of "Requires-Dist: torch>=2.11"."""
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    required = map(Requirement, metadata.get_all("Requires-Dist", []))
    (torch,) = (r for r in required if r.name == "torch" and r.marker is None)
    (version,) = (s.version for s in torch.specifier if s.operator == ">=")
    return Version(version)


def torch_faults(library: Path, oldest: Version) -> list[str]:
    """What a library needs of torch beyond the stable ABI of that release."""
    found = torch_abi_audit.inspect_extension(library).torch
    faults = [f"{name} is not in torch's stable ABI" for name in found.unstable_symbols]
    faults += [f"{name} is in no release that is known" for name in found.unknown_shim_symbols]
    if found.min_torch_version and Version(found.min_torch_version) > oldest:
        newer = ", ".join(found.version_defining_symbols)
        faults.append(f"{newer} came with torch {found.min_torch_version}, after {oldest}")
    return faults


def python_faults(library: Path) -> list[str]:
    """The functions of Python that a library calls."""
    with library.open("rb") as file:
        symbols = list(ELFFile(file).get_section_by_name(".dynsym").iter_symbols())
    wanted = [symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"]
    return [f"{name} is Python's" for name in wanted if re.match(PYTHON_SYMBOL, name)]


def host_faults(report: dict[str, Any]) -> list[str]:
    """What auditwheel's report says that a wheel needs and no Linux promises."""
    if "error" in report:
        return [report["error"]]
    foreign = sorted(set(report["external_libs"]) - FROM_TORCH)
    faults = [f"{name} is neither the system's nor torch's" for name in foreign]
    if report["unsupported_isa"]:
        faults.append("it needs a newer processor than its platform tag promises")
    return faults


def audited(wheel: Path) -> tuple[str, list[str]]:
    """The platform tag that a wheel may have, and its faults."""
    show = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    done = subprocess.run(show, capture_output=True, text=True)
    if not done.stdout:
        return "", [f"auditwheel: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"]
    report = json.loads(done.stdout)
    faults = host_faults(report)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        oldest = oldest_torch(archive)
        for name in archive.namelist():
            if name.endswith(".so"):
                library = Path(archive.extract(name, folder))
                faults += [
                    f"{name}: {fault}"
                    for fault in (*torch_faults(library, oldest), *python_faults(library))
                ]
    return report.get("sym_tag", ""), faults


def main() -> int:
    """Audits and tags one wheel."""
    parser = argparse.ArgumentParser(prog="python -m tools.abi_audit", description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    tag, faults = audited(wheel)
    for fault in faults:
        print(f"{wheel.name}: {fault}", file=sys.stderr)
    if faults:
        return 1
    tags = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel]
    return subprocess.run(tags).returncode


if __name__ == "__main__":
    sys.exit(main())
