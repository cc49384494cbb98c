"""`python -m mmkernels train --quick` of the small model, for a process of its own.

After as many steps as the variable MMKERNELS_TEST_WAIT_AT says it waits for a signal. Where
MMKERNELS_TEST_KILL is "rank step", that process ends at that step as if the power had gone, once.
"""

import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from mmkernels import __main__ as commands
from mmkernels.training import loop, report
from tests.training import small

RECIPE = replace(small.RECIPE, pretrain_steps=3, look_steps=2, finetune_steps=4)


def main() -> int:
    wait_at = int(os.environ.get("MMKERNELS_TEST_WAIT_AT", 0))
    killed = [int(word) for word in os.environ.get("MMKERNELS_TEST_KILL", "").split()]
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    logged = loop._Progress.add

    def add(self: loop._Progress, line: dict) -> None:
        logged(self, line)
        if first and killed == [int(os.environ.get("RANK", 0)), line["step"]]:
            os.kill(os.getpid(), signal.SIGKILL)
        if line["step"] == wait_at:
            interrupts = signal.getsignal(signal.SIGTERM).__self__
            deadline = time.monotonic() + 120
            while not interrupts.noted and time.monotonic() < deadline:
                time.sleep(0.01)

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        small.install(patch, RECIPE)
        patch.setattr(report, "write", lambda *args, **options: "the table")
        patch.setattr(loop._Progress, "add", add)
        return commands.main(["train", "--quick", "--device", "cpu", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
