"""The devices of hardware.json: data sheets, fits of timed products, and where each number is from."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trl_selfspec.simulate.costs import Link, Products


BITS = {"bf16": 16.0, "fp32": 32.0, "fp8": 8.0, "int4": 4.25}  # int4: a scale and a shift per 128 weights
INT4_PRODUCT_US = 9.5  # an H200's; where no int4 product was timed


@dataclass(frozen=True)
class Device:
    """One GPU, or a CPU."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    products: dict[str, Products]
    link: Link
    sources: dict[str, str]
    measured_by_us: str
    matches: tuple[str, ...]

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")


def _device(name: str, entry: dict[str, Any]) -> Device:
    products = {
        dtype: Products(BITS[dtype], us, 1e9 * gb, 1e12 * tflops, p)
        for dtype, (us, gb, tflops, p) in entry["products"].items()
    }
    bf16 = products["bf16"]
    int4 = Products(BITS["int4"], INT4_PRODUCT_US, bf16.bytes_per_s, bf16.flop_per_s, 1.7)
    products.setdefault("int4", int4)
    latency_us, gb_per_s = entry["allreduce"]
    return Device(
        name,
        1e9 * entry["memory_gb"],
        1e9 * entry["gb_per_s"],
        products,
        Link(latency_us, 1e9 * gb_per_s),
        entry["sources"],
        entry["measured_by_us"],
        tuple(entry["matches"]),
    )


@cache
def devices() -> dict[str, Device]:
    table = json.loads((Path(__file__).parent / "hardware.json").read_text())
    return {name: _device(name, entry) for name, entry in table.items()}


def _matches(name: str) -> list[tuple[int, Device]]:
    known = devices().values()
    return [(len(m), d) for d in known for m in (d.name, *d.matches) if re.search(rf"\b{m}\b", name.lower())]


def is_known(name: str) -> bool:
    return bool(_matches(name))


def find_device(name: str) -> Device:
    """By its name in the table, or by the longest match in a name such as `NVIDIA H200`.

    Raises:
        ValueError: it is not in the table; the message lists what is.
    """
    if not is_known(name):
        raise ValueError(
            f"The device {name!r} is not in the table: use one of {', '.join(devices())}, or measure yours with "
            "--here."
        )
    return max(_matches(name), key=lambda pair: pair[0])[1]
