"""The tables of the patch embedding, from the extra_info of its benchmarks."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import met, milliseconds, ratio
from tools.generated import table

KIND = "patch embedding"
TITLE = "Patch embedding"
# How README explains the peers.
PEERS = (
    "eager is F.conv2d or F.conv3d, flatten, transpose, the class token and the position, after "
    "normalisation where pixels are bytes"
)


def best_peer(info: dict[str, Any]) -> tuple[str, float]:
    """The fastest peer and the ratio to it."""
    peers = info["peers"]
    name = min(peers, key=lambda name: peers[name]["median_s"])
    return name, peers[name]["ratio"]


def summary(infos: Sequence[dict[str, Any]]) -> str:
    """README's table: forward, beside eager PyTorch and beside the best peer."""
    infos = [info for info in infos if info["mode"] == "forward"]
    dtypes = list(dict.fromkeys(info["dtype"] for info in infos))
    cells: dict[str, dict[str, str]] = {}
    for info in infos:
        texts = ratio(info["peers"]["eager"]["ratio"]), ratio(best_peer(info)[1])
        cells.setdefault(info["shape"], {})[info["dtype"]] = f"{texts[0]}, {texts[1]}"
    lines = [[shape, *(line.get(name, "") for name in dtypes)] for shape, line in cells.items()]
    text = (
        f"Speed-up of the forward pass over eager PyTorch, and over the best of all peers: {PEERS}."
    )
    slower = [info for info in infos if best_peer(info)[1] < 1]
    text += f" Slower than the best peer in {len(slower)} of {len(infos)} cells"
    if slower:
        worst = min(slower, key=lambda info: best_peer(info)[1])
        name, times = best_peer(worst)
        text += f", at worst {ratio(times)} ({worst['shape']}, {worst['dtype']}, beside {name})"
    return f"**{TITLE}.** {text}.\n\n{table(['model', *dtypes], lines)}"


def details(infos: Sequence[dict[str, Any]]) -> str:
    """All numbers, in docs/performance.md: the targets' table, then every other peer."""
    header = ["model", "dtype", "mode", "mmkernels ms", "eager ms", "speed-up", "of pairs"]
    header += ["target", "met", "best peer", "over it"]
    rows = []
    for info in infos:
        eager, name = info["peers"]["eager"], best_peer(info)[0]
        rows.append([
            info["shape"], info["dtype"], info["mode"], milliseconds(info["ours"]),
            milliseconds(eager), ratio(eager["ratio"]), ratio(eager["pairwise_ratio"]),
            f"{info['target']:.2f}×", met(eager["ratio"] >= info["target"]),
            name, ratio(best_peer(info)[1]),
        ])  # fmt: skip
    names = list(dict.fromkeys(name for info in infos for name in info["peers"]))
    peers = [
        [
            info["shape"], info["dtype"], info["mode"],
            *(milliseconds(info["peers"][name]) if name in info["peers"] else "" for name in names),
        ]
        for info in infos
    ]  # fmt: skip
    note = (
        f"Of the peers, {PEERS}; “patches, F.linear” cuts the patches out with reshape, or "
        "F.unfold where they overlap; timm is its PatchEmbed. torch.compile is of eager. All add "
        "class token and position."
    )
    every = table(["model", "dtype", "mode", *(f"{name} ms" for name in names)], peers)
    return f"{table(header, rows)}\n\n{note}\n\n{every}"
