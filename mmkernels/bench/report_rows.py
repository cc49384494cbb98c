"""What follows from a record: the best peer, the ratios, the rate, the share of a ceiling."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmkernels.bench import roofline
from mmkernels.bench.case import OURS

# What a model calls without mmkernels, in its fastest form; where it is no peer, the first one is.
PLAIN = "SDPA"


@dataclass(frozen=True)
class Row:
    """A case with its results.

    Attributes:
        record: of `measure.measure`, with results.
        least_s: seconds below which the ceilings of the same run let nothing stay; None: unknown.
        by_flops: whether it is the products that take those, not the bytes.
        plain: the peer that a model calls without mmkernels; None: there is no peer.
    """

    record: Mapping[str, Any]
    least_s: float | None
    by_flops: bool
    plain: str | None

    @property
    def results(self) -> Mapping[str, Mapping[str, Any]]:
        """By implementation."""
        results: Mapping[str, Mapping[str, Any]] = self.record["results"]
        return results

    @property
    def ours(self) -> Mapping[str, Any]:
        """The result of mmkernels."""
        return self.results[OURS]

    @property
    def best_peer(self) -> str | None:
        """The fastest peer; None: there is none."""
        return _fastest(self.record, _peers(self.record))

    @property
    def best_ratio(self) -> float | None:
        """How often faster than the best peer."""
        return self.ratio(self.best_peer)

    def ratio(self, peer: str | None) -> float | None:
        """How often faster than a peer, by the medians."""
        return None if peer is None else float(self.results[peer]["ratio"])

    def share(self, name: str) -> float | None:
        """What an implementation reaches of the ceiling: 1 is all of it."""
        return (
            None if self.least_s is None else self.least_s / float(self.results[name]["median_s"])
        )

    def rate(self, name: str) -> float | None:
        """FLOP/s or bytes/s, as `by_flops` says."""
        amount = self.record["flops" if self.by_flops else "bytes"]
        return float(amount / self.results[name]["median_s"]) if amount else None

    def __str__(self) -> str:
        record = self.record
        parts = (record["name"], record["shape"], record["mask"], record["dtype"], record["mode"])
        return ", ".join(filter(None, parts))


def is_ours(name: str) -> bool:
    """Whether an implementation is one of mmkernels, such as a backend by name."""
    return name.startswith(OURS)


def _peers(record: Mapping[str, Any]) -> list[str]:
    return [name for name in record["results"] if not is_ours(name)]


def _fastest(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return min(names, key=lambda name: float(record["results"][name]["median_s"]), default=None)


def _is_plain(name: str) -> bool:
    return name.partition(" (")[0] == PLAIN


def suites(data: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of every suite that has some, in the order of the run."""
    records: dict[str, list[Mapping[str, Any]]] = {}
    for record in data["records"]:
        if record["results"]:
            records.setdefault(record["suite"], []).append(record)
    return {suite: list(_rows(some, data["ceilings"])) for suite, some in records.items()}


def _rows(
    records: Sequence[Mapping[str, Any]], ceilings: dict[str, dict[str, float]]
) -> Iterator[Row]:
    has_plain = any(_is_plain(name) for record in records for name in _peers(record))
    for record in records:
        peers = _peers(record)
        plain = _fastest(record, filter(_is_plain, peers)) if has_plain else next(iter(peers), None)
        dtype, flops, moved = record["dtype"], record["flops"], record["bytes"]
        least = roofline.least_seconds(ceilings, dtype, flops, moved)
        products = roofline.least_seconds(ceilings, dtype, flops, None)
        yield Row(record, least, products is not None and products == least, plain)


def failed(data: Mapping[str, Any]) -> dict[str, str]:
    """Case -> what is wrong with an implementation of mmkernels."""
    return {
        f"{record['suite']}, {Row(record, None, False, None)}": record["failed"]
        for record in data["records"]
        if record["failed"]
    }


@dataclass(frozen=True)
class LeftOut:
    """Implementations that could not take part for the same reason.

    Attributes:
        reason: why.
        names: of the implementations.
        cases: how many cases they are missing from.
    """

    reason: str
    names: Sequence[str]
    cases: int


def left_out(data: Mapping[str, Any]) -> list[LeftOut]:
    """What did not take part, by reason, those with the most cases first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for index, record in enumerate(data["records"]):
        for name, reason in record["left_out"].items():
            found.setdefault(reason, []).append((index, name))
    groups = [
        LeftOut(
            reason,
            list(dict.fromkeys(name for _, name in some)),
            len({index for index, _ in some}),
        )
        for reason, some in found.items()
    ]
    return sorted(groups, key=lambda group: -group.cases)


def geomean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are there; None: none is."""
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else None


def ranked(rows: Iterable[Row]) -> list[tuple[float, Row]]:
    """The rows that have a peer, each behind its ratio to the best one, the worst first."""
    pairs = ((row.best_ratio, row) for row in rows)
    return sorted(((ratio, row) for ratio, row in pairs if ratio is not None), key=lambda x: x[0])
