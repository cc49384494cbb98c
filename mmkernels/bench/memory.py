"""The most memory that a call holds beyond what was there before it."""

import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocator, results included and inputs not.

    What a library takes from the system by itself, such as oneDNN's scratch on a CPU, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device)
        del results
        return peak - before
    # Or the profiler's library writes lines into the progress bar; it reads this when it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    del results
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
