"""Measures the time to inspect, rewrite and report on a model, against its number of batch norm layers."""

from __future__ import annotations

import statistics
import time

from torch import nn

from lightning_revbn import init_batch_norms


def main() -> None:
    """Print seconds for 100, 1,000 and 10,000 layers."""
    print(f"{'layers':>8} {'seconds':>9} {'microseconds a layer':>22}")
    for count in (100, 1_000, 10_000):
        times: list[float] = []
        for _ in range(5):
            model = nn.Sequential(*(nn.BatchNorm2d(16) for _ in range(count)))
            start = time.perf_counter()
            str(init_batch_norms(model))
            times.append(time.perf_counter() - start)
        middle = statistics.median(times)
        print(f"{count:>8,} {middle:>9.4f} {middle / count * 1e6:>22.1f}")


if __name__ == "__main__":
    main()
