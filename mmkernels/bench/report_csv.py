"""The CSV of a run: one row for each implementation of each case, units in the header."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from mmkernels.bench import report_rows

CASE = ("suite", "name", "shape", "mask", "dtype", "mode", "scale", "flops", "bytes")
RESULT = (
    "median_s", "iqr_s", "ratio", "pairwise_ratio", "peak_bytes", "first_call_s", "launch_s",
    "timer", "max_error",
)  # fmt: skip


def text(data: Mapping[str, Any]) -> str:
    """All columns; empty where something was not measured.

    "ratio" and "pairwise_ratio" say how often faster mmkernels is than the row's implementation.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*CASE, "implementation", *RESULT, "samples", "flops_per_s", "bytes_per_s",
         "share_of_ceiling", "best_peer", "device", "date", "commit"]
    )  # fmt: skip
    environment = data["environment"]
    where = [environment["device"], environment["date"], environment["commit"]]
    for rows in report_rows.suites(data).values():
        for row in rows:
            for name, result in row.results.items():
                amounts = (row.record["flops"], row.record["bytes"])
                writer.writerow([
                    *(row.record[column] for column in CASE),
                    name,
                    *(result.get(column) for column in RESULT),
                    len(result["times_s"]),
                    *(amount and amount / result["median_s"] for amount in amounts),
                    row.share(name),
                    row.best_peer,
                    *where,
                ])  # fmt: skip
    return out.getvalue()
