"""The kernels' benchmark: whose layers it times, its table, and that it does not invent figures without a GPU."""

import bench_kernels
import pytest
import torch
from bench.gemms import fused_shapes, table


def test_fused_shapes_hold_every_weight():
    """A layer that is left out, or counted once instead of once per layer, would make a model look cheap."""
    for preset in ("150m", "7b"):
        separate = sum(n * k for n, k in bench_kernels.shapes(preset))
        assert sum(n * k * count for (n, k), count in fused_shapes(preset).items()) == separate
    assert fused_shapes("7b")[37888, 3584] == 28


def test_the_table_sums_over_layers():
    cublas = {"floor": 10.0, "1": {"median": 20.0}, "8": {"median": 40.0}}
    few = {"floor": 3.0, "1": {"median": 5.0}}
    shape = {"layers": 100, "cublas bf16": cublas, "qint4 few": few, "qint8 one": few, "qint4 chosen": "few"}
    shapes = {"a": shape, "b": shape | {"qint8 one": "Traceback"}}
    text = table({"preset": "p", "microseconds": shapes, "requantize_s": {"qint4": {"median": 0.5}}})
    rows = {line[:28].strip(): line[28:].split() for line in text.splitlines()[:4]}
    assert rows["cublas bf16"] == ["2.00", "4.00", "8.00"] and rows["qint4 few"] == ["0.60", "1.00"]
    assert rows["qint8 one"][2:] == ["without", "1", "shapes"], "half a model would look twice as fast"
    assert "requantize qint4: 500.0 ms" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses():
    with pytest.raises(SystemExit, match="No CUDA device"):
        bench_kernels.main(["--device", "cuda"])
