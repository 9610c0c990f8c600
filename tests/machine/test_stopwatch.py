"""Where the time of a step goes."""

import time

import torch

from cakd_cli.machine.stopwatch import Stopwatch


def test_the_stopwatch_tells_parts_apart():
    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()

    def slow_items():
        for item in range(3):
            time.sleep(0.02)
            yield item

    for _ in watch.each("data", slow_items()):
        with watch("student"):
            time.sleep(0.04)
    shares = watch.shares(time.perf_counter() - started)

    assert set(shares) == {"data", "student"}
    assert 0.95 < sum(shares.values()) <= 1
    assert shares["student"] > 1.3 * shares["data"]
    watch.reset()
    assert watch.shares(1.0) == {}
