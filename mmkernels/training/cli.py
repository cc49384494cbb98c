"""`python -m mmkernels train`: the reference model, from nothing to a table of what it can do."""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmkernels._core.packages import require

if TYPE_CHECKING:
    from mmkernels.training.world import Plan

NEEDS = {
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates and reports.

    Args:
        argv: the arguments after `train`; None: those of the process.

    Returns:
        0, or 2 where an argument is wrong.

    Raises:
        ModuleNotFoundError: a package is missing; the message names all that are.
    """
    parser = argparse.ArgumentParser(prog="python -m mmkernels train", description=__doc__)
    parser.add_argument("--preset", choices=("tiny", "smol"), default="tiny", help="(tiny)")
    parser.add_argument("--quick", action="store_true", help="a short run of two tasks, to try it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=os.environ.get("MMKERNELS_DATA") or None,
        help="a folder with fsdd/recordings and tinyshakespeare/input.txt ($MMKERNELS_DATA)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all chance (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step (1)")
    parser.add_argument(
        "--checkpointing", action="store_true", help="less memory for more computing"
    )
    spread = "processes, started by torchrun, that {} (1)"
    parser.add_argument("--dp", type=int, default=1, help=spread.format("take different rows"))
    parser.add_argument("--sp", type=int, default=1, help=spread.format("share each row"))
    parser.add_argument("--tp", type=int, default=1, help=spread.format("share each layer"))
    parser.add_argument(
        "--ddp", action="store_true", help="all weights on each process, not parts of them (FSDP2)"
    )
    options = parser.parse_args(argv)
    require(NEEDS, "training")
    # Without it cuBLAS is not deterministic; it is read at the first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    import torch

    from mmkernels.training import checkpoints, recipes, report, run
    from mmkernels.training.world import Plan, World, peer_lost

    recipe = (recipes.QUICK if options.quick else recipes.FULL)[options.preset]
    if options.accumulate < 1:
        parser.error(f"--accumulate is {options.accumulate}; it must be 1 or more")
    recipe = replace(recipe, accumulate=options.accumulate, checkpointing=options.checkpointing)
    out = options.out or Path("runs") / (options.preset + ("-quick" if options.quick else ""))
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and there == "cpu":
        parser.error("--device is cuda, but torch sees no GPU; give --device cpu")
    for name in ("dp", "sp", "tp"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    plan = Plan(options.dp, options.sp, options.tp, options.ddp)
    # torchrun starts all anew when one has died.
    resume = options.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    # A polite end, too, leaves a checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        world = World(plan, options.device or there)
        model, banks = run.train(
            recipe,
            out,
            data=options.data,
            seed=options.seed,
            device=world.device,
            dtype=options.dtype,
            resume=resume,
            world=world,
        )
    except ValueError as error:
        print(f"mmkernels train: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        last = checkpoints.newest(out)
        print(
            f"mmkernels train: rank {world.rank} has lost another process, which has died or cannot"
            f" be reached. The last checkpoint is of step {last.state['step'] if last else 0}; "
            "--resume goes on from it, and torchrun --max-restarts does so by itself. "
            f"({str(error).strip().splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    world.close()
    if world.rank != 0:
        return 0
    print(
        report.write(
            out, recipe, model, banks, device=world.device, command=_command(options, plan)
        )
    )
    print(f"\n{out / 'report.md'} tells the whole story; chat with it:")
    print(f"python -m mmkernels chat --model {out / 'model'}")
    return 0


def _command(options: argparse.Namespace, plan: "Plan") -> str:
    """What makes this run again; where it lay, and whether it was resumed, changes nothing."""
    program = f"torchrun --nproc-per-node {plan.size} -m" if plan.size > 1 else "python -m"
    parts = [f"{program} mmkernels train --preset {options.preset}"]
    parts += [str(plan)] if plan.size > 1 else []
    parts += ["--quick"] if options.quick else []
    parts += ["--data DIR"] if options.data is not None else []
    parts += [f"--seed {options.seed}"] if options.seed else []
    parts += [f"--device {options.device}"] if options.device else []
    parts += [f"--dtype {options.dtype}"] if options.dtype != "auto" else []
    parts += [f"--accumulate {options.accumulate}"] if options.accumulate > 1 else []
    parts += ["--checkpointing"] if options.checkpointing else []
    return " ".join(parts)
