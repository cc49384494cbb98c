"""Does the README's script do what the README says it prints?"""

import os
import re
import subprocess
import sys

from tools.generated import ROOT


def test_the_section_on_scaling(tmp_path):
    section = re.search(
        r"^## Beyond one GPU$(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M
    )
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section[1], re.S | re.M)
    (script,), (expected,) = (
        [code for kind, code in blocks if kind == wanted] for wanted in ("py", "text")
    )
    commands = [code.strip() for kind, code in blocks if kind == "console"]
    program, *arguments = commands[0].split()
    assert program == "torchrun" and arguments[-1] == "long.py"
    (tmp_path / "long.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == expected.splitlines()


def test_the_command_that_trains_is_one():
    """Its options are the command line's, and there are as many processes as they need."""
    text = (ROOT / "README.md").read_text()
    line = re.search(r"^torchrun .*-m mmkernels train (.*)$", text, re.M)
    options = dict(zip(*[iter(line[1].split())] * 2, strict=True))
    assert options.keys() <= {"--preset", "--dp", "--sp", "--tp"}
    assert f"--nproc-per-node {int(options['--dp']) * int(options['--sp'])} " in line[0]
