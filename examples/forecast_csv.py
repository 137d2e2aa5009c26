"""Forecast a CSV file with the columns ds and y: python examples/forecast_csv.py FILE [HORIZON]."""

from __future__ import annotations

import csv
import sys

from cortex_tasks import Cortex


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    with open(sys.argv[1], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    series = {"ds": [row["ds"] for row in rows], "y": [float(row["y"]) for row in rows]}
    with Cortex(timeout_s=120) as cortex:
        future = cortex.forecast(series, horizon=int(sys.argv[2]) if len(sys.argv) == 3 else 14)
    print("ds,yhat,yhat_lower,yhat_upper")
    for row in zip(future.ds, future.yhat, future.yhat_lower, future.yhat_upper, strict=True):
        print(*row, sep=",")


if __name__ == "__main__":
    main()
