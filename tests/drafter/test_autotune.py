"""Which backend a quantized layer takes on a GPU: the table's logic, with stand-in timings and real layers."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trl_selfspec.drafter import autotune as choosing
from trl_selfspec.drafter.autotune import BUCKETS, measured
from trl_selfspec.drafter.linear_backends import Backend, by_rows
from trl_selfspec.drafter.quantized_linear import QTYPES, QuantizedLinear


BF16, FP32 = torch.bfloat16, torch.float32
LOGGER = "trl_selfspec.drafter.autotune"
pytestmark = pytest.mark.usefixtures("backend_cache")


def make_layer(qtype: str = "qint4", dtype: torch.dtype = FP32, k: int = 256, n: int = 32) -> QuantizedLinear:
    bias = nn.Parameter(torch.randn(n).to(dtype))
    return QuantizedLinear(k, n, bias, qtype, dtype, "cpu")


def multiply(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What every backend computes."""
    return nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double()).to(x.dtype)


def backend(
    name: str, linear: Callable[[QuantizedLinear, Tensor], Tensor] = multiply, max_rows: int | None = None, **kwargs
) -> Backend:
    """Under a function of its own, by which timers know it."""

    def own(layer: QuantizedLinear, x: Tensor) -> Tensor:
        return linear(layer, x)

    own.__name__ = name
    return Backend(name, lambda layer: True, own, max_rows=max_rows, **kwargs)


class Timer:
    """Seconds by backend and rows; counts its calls."""

    def __init__(self, **seconds: Callable[[int], float]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, call) -> float:
        self.calls += 1
        return self.seconds[call.func.__name__](len(call.args[1]))


def names(table: dict[int, Backend]) -> dict[int, str]:
    return {bucket: chosen.name for bucket, chosen in table.items()}


def test_the_fastest_is_chosen_for_each_number_of_rows():
    """A backend for few rows is never asked for more, however fast it would be."""
    timer = Timer(few=lambda rows: rows, flat=lambda rows: 10.0, never=lambda rows: 99.0)
    table = names(measured(make_layer(), [backend("flat"), backend("few", max_rows=16), backend("never")], timer))
    assert table == {1: "few", 4: "few", 8: "few", 16: "flat", 32: "flat", 64: "flat", 256: "flat"}
    other = Timer(few=lambda rows: 0.1, flat=lambda rows: 10.0, never=lambda rows: 5.0)
    choosing._known.clear()
    layer = make_layer(k=128)
    table = names(measured(layer, [backend("flat"), backend("few", max_rows=4), backend("never")], other))
    assert table == {1: "few", 4: "few"} | dict.fromkeys(BUCKETS[2:], "never")


@pytest.mark.parametrize(("seconds", "chosen"), [(0.95, "in_place"), (0.85, "copied")])
def test_a_second_copy_of_the_weights_must_be_worth_it(seconds: float, chosen: str):
    timer = Timer(in_place=lambda rows: 1.0, copied=lambda rows: seconds)
    table = measured(make_layer(), [backend("in_place"), backend("copied", holds_weights=True)], timer)
    assert set(names(table).values()) == {chosen}


def test_at_most_one_backend_holds_the_weights_once_more():
    """Two rivals that win at different numbers of rows would take twice the drafter's memory again."""
    cheap, dear = (lambda rows: 1.0 if rows <= 4 else 20.0), (lambda rows: 2.0 if rows <= 4 else 5.0)
    timer = Timer(in_place=lambda rows: 10.0, few=cheap, many=dear)
    rivals = [backend("few", holds_weights=True), backend("many", holds_weights=True)]
    table = names(measured(make_layer(), [backend("in_place"), *rivals], timer))
    assert set(table.values()) == {"many"}
    timer.seconds["many"] = lambda rows: 9.5
    table = names(measured(make_layer(n=48), [backend("in_place"), *rivals], timer))
    assert table == {1: "few", 4: "few"} | dict.fromkeys(BUCKETS[2:], "in_place")
    rivals = [backend("few", max_rows=4, holds_weights=True), backend("many", holds_weights=True)]
    assert set(names(measured(make_layer(n=64), rivals, timer)).values()) == {"many"}, "it alone serves all rows"


@pytest.mark.parametrize(("holds_weights", "chosen"), [(False, {"in_place"}), (True, set())])
def test_without_memory_to_measure_layers_are_not_dequantized(
    holds_weights: bool, chosen: set[str], backend_cache: Path
):
    """A cache that leaves no room for a timing would make every draft slower than the policy, for the whole run."""

    def exhausted(call) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    candidates = [backend("in_place", holds_weights=holds_weights), backend("copied", holds_weights=True)]
    assert set(names(measured(make_layer(), candidates, exhausted)).values()) == chosen
    assert not backend_cache.exists(), "the next process measures"


def failing(layer: QuantizedLinear, x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


def without_bias(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return multiply(layer, x) - layer.bias


def with_another_zero_point(layer: QuantizedLinear, x: Tensor) -> Tensor:
    if layer.qtype != "qint4":
        return 1.05 * multiply(layer, x)
    error = layer.scale_shift[..., 0].repeat_interleave(layer.group_size, -1)[:, : layer.in_features]
    return multiply(layer, x) + nn.functional.linear(x, error.to(x.dtype))


def only_right_for_few_rows(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return multiply(layer, x) if len(x) <= 16 else multiply(layer, x.roll(1, 0))


def wrong_for_24(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return multiply(layer, x if len(x) != 24 else x.roll(1, 0))


def with_nan(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return multiply(layer, x).index_fill(1, torch.tensor([3]), torch.nan)


def racing() -> Callable[[QuantizedLinear, Tensor], Tensor]:
    calls = itertools.count()
    return lambda layer, x: multiply(layer, x) * (1 + 1e-3 * (next(calls) % 2))


WRONG = [failing, without_bias, with_another_zero_point, only_right_for_few_rows, wrong_for_24, with_nan, racing()]


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_computes_something_else_is_left_out(
    wrong, qtype: str, caplog: pytest.LogCaptureFixture, backend_cache: Path
):
    """With one warning that says why; and tried again by the next process, for it may have been another's fault."""
    timer = Timer(right=lambda rows: 2.0, wrong=lambda rows: 1.0)
    candidates = [backend("right"), backend("wrong", wrong)]
    with caplog.at_level(logging.WARNING, LOGGER):
        for size in (256, 512):
            assert set(names(measured(make_layer(qtype, k=size), candidates, timer)).values()) == {"right"}
    told = [record.getMessage() for record in caplog.records]
    assert told and all(f"wrong is not used for {qtype} layers" in message for message in told)
    assert len(set(told)) == len(told)
    assert not backend_cache.exists()


def test_a_right_backend_passes_in_every_dtype():
    """The bound must leave room for roundings: negative control of the test above."""
    for number, (qtype, dtype) in enumerate(itertools.product(QTYPES, (FP32, BF16, torch.float16))):
        layer = make_layer(qtype, dtype, n=64 + 8 * number)
        assert len(measured(layer, [backend("right")], Timer(right=lambda rows: 1.0))) == len(BUCKETS)


def test_where_nothing_works_the_table_is_empty():
    timer = Timer()
    layers = [make_layer(), make_layer()]
    calls = []

    def counted(layer: QuantizedLinear, x: Tensor) -> Tensor:
        calls.append(x)
        raise RuntimeError

    assert [measured(layer, [backend("broken", counted)], timer) for layer in layers] == [{}, {}]
    assert len(calls) == 1  # not once per layer of the model
    assert measured(make_layer(n=16), [], timer) == {}


def test_answers_are_kept(backend_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The second layer and the second process time nothing; other shapes, versions and candidates do."""
    timer = Timer(a=lambda rows: 1.0, b=lambda rows: 2.0)
    candidates = [backend("a"), backend("b")]
    table = names(measured(make_layer(), candidates, timer))
    asked = timer.calls
    assert asked == 2 * len(BUCKETS)
    assert names(measured(make_layer(), candidates, timer)) == table and timer.calls == asked
    choosing._known.clear()
    assert names(measured(make_layer(), candidates, timer)) == table and timer.calls == asked
    assert len(json.loads(backend_cache.read_text())) == 1
    for different in (make_layer(n=48), make_layer(dtype=BF16), make_layer("qint8")):
        measured(different, candidates, timer)
    assert timer.calls == 4 * asked and len(json.loads(backend_cache.read_text())) == 4
    choosing._known.clear()
    monkeypatch.setattr(choosing, "_versions", lambda: ["2.0"])
    measured(make_layer(), candidates, timer)
    measured(make_layer(), candidates[:1], timer)
    assert timer.calls == 4 * asked + asked + len(BUCKETS)


def test_a_change_of_our_kernels_is_measured_anew(tmp_path: Path):
    """Prevents a checkout that goes on with what its last version was slower at."""
    kernel = tmp_path / "cuda" / "linear.py"
    kernel.parent.mkdir()
    kernel.write_text("WARPS = 4")
    before = choosing._digest(tmp_path)
    assert choosing._digest(tmp_path) == before
    kernel.write_text("WARPS = 2")
    assert choosing._digest(tmp_path) != before
    assert choosing._digest(choosing.OWN_KERNELS) in choosing._versions()
    assert (choosing.OWN_KERNELS / "cuda" / "linear.py").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', "\x00"])
def test_a_file_that_cannot_be_read_is_as_good_as_none(content: str, backend_cache: Path):
    backend_cache.parent.mkdir()
    backend_cache.write_text(content)
    timer = Timer(a=lambda rows: 1.0)
    assert measured(make_layer(), [backend("a")], timer) and timer.calls
    assert len(json.loads(backend_cache.read_text())) >= 1


def test_measuring_leaves_nothing_behind():
    """Noise in the storages or a rival's buffers would cost memory, or be taken for weights."""
    seen = []

    def derive(layer: QuantizedLinear) -> dict[str, Tensor]:
        seen.append("derived")
        return {"extra": torch.zeros(3)}

    layer = make_layer()
    before = {name for name, _ in layer.named_buffers()}
    timer = Timer(a=lambda rows: 1.0, b=lambda rows: 2.0)
    measured(layer, [backend("a"), backend("b", derive=derive), backend("c", failing, derive=derive)], timer)
    assert len(seen) == 2 and {name for name, _ in layer.named_buffers()} == before
    assert not any(getattr(layer, name).any() for name in layer.storage_names)


def test_a_layer_goes_by_its_rows():
    """Up to its bucket's number; a backend's own bound sends more to the fallback."""
    asked: list[tuple[str, int]] = []

    def recording(name: str, **kwargs) -> Backend:
        return backend(name, lambda layer, x: asked.append((name, len(x))) or x, **kwargs)

    few, many, fallback = recording("few"), recording("many", max_rows=300), recording("fallback")
    combined = by_rows({1: few, 4: few, 8: many, 16: many}, fallback)
    assert combined.name == "few/many"
    for rows in (1, 3, 4, 5, 16, 17, 300, 301):
        combined.linear(make_layer(), torch.zeros(rows, 256))
    expected = ["few"] * 3 + ["many"] * 4 + ["fallback"]
    assert asked == list(zip(expected, (1, 3, 4, 5, 16, 17, 300, 301), strict=True))


def test_only_chosen_backends_hold_buffers():
    held = by_rows({1: backend("a", derive=lambda layer: {"a": torch.zeros(1)}), 4: backend("b")}, backend("c"))
    assert held.derive(make_layer()).keys() == {"a"}


def test_without_a_device_to_time_the_order_decides():
    """Tensors that only pretend to be on a GPU, and machines whose GPU is hidden."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    table = measured(make_layer(), [backend("few", max_rows=4), backend("any"), backend("worse")])
    assert names(table) == {1: "few", 4: "few"} | dict.fromkeys(BUCKETS[2:], "any")
