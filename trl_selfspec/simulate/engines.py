"""Engines by their overheads, and what drafts in them.

Overheads come in sets: what they are taken to be, and what makes drafting gain less or more. The two sets around the
middle one are the interval of a prediction for a device that was not measured.
"""

from dataclasses import replace

from trl_selfspec.simulate.costs import Costs, Draft, Network, Overheads
from trl_selfspec.simulate.hardware import Device
from trl_selfspec.simulate.shapes import Shape


LEVELS = ("low", "middle", "high")  # of the gain
# Our captured and compiled rounds. 40 us a layer is the one number set to a measurement: a plain round of 7B at one
# row on an H200, 5.18 ms. Sampling over 152k words there takes 0.11 ms and 2.6 us a token.
GPU = Overheads(layer_us=40, step_us=110, token_us=2.6)
# Beyond the products, on 2 cores: set to a plain round and a draft step of 150M at one row.
CPU, CPU_DRAFT = Overheads(step_us=2400, products=7), Overheads(step_us=1300, products=7)
DRAFT_LAYER_SHARE = {"low": 1.0, "middle": 1.0, "high": 0.75}  # of the target's layer overhead
DRAFT_PRODUCT_SHARE = {"low": 1.5, "middle": 1.0, "high": 0.7}  # of the time per int4 product
DRAFT_BANDWIDTH_SHARE = {"low": 0.75, "middle": 1.0, "high": 1.0}
QUANTIZE_BYTES_PER_S = 65e9  # of bf16 weights read: 7B in 0.24 s on an H200; elsewhere by bandwidth
HEAD_WORDS = 32000  # that an EAGLE-3 head tells apart


def target(shape: Shape, device: Device, dtype: str = "bf16", tp: int = 1) -> Network:
    overheads = CPU if device.is_cpu else GPU
    return Network(shape, device.products[dtype], device.bytes_per_s, overheads, tp=tp, link=device.link)


def quantized(network: Network, device: Device, alpha: float, level: str = "middle") -> Draft:
    """The policy itself with int4 weights, the output head too."""
    products, overheads = device.products["int4"], CPU_DRAFT
    if not device.is_cpu:
        products = replace(
            products,
            product_us=products.product_us * DRAFT_PRODUCT_SHARE[level],
            bytes_per_s=products.bytes_per_s * DRAFT_BANDWIDTH_SHARE[level],
        )
        over = network.overheads
        overheads = replace(over, layer_us=over.layer_us * DRAFT_LAYER_SHARE[level])
    pace = QUANTIZE_BYTES_PER_S * device.bytes_per_s / 4.8e12
    prepare_s = network.num_bytes / pace if not device.is_cpu else network.num_bytes / (device.bytes_per_s / 50)
    return Draft("qint4", alpha, replace(network, products=products, overheads=overheads), prepare_s=prepare_s)


def eagle(network: Network, alpha: float) -> Draft:
    """A head of one dense layer over the target's hidden states, with fewer words to sample from."""
    shape, words = network.shape, min(network.shape.vocab, HEAD_WORDS)
    one = replace(shape, layers=1, inner=shape.inner or 4 * shape.hidden, experts=0, vocab=words)
    overheads = replace(network.overheads, token_us=network.overheads.token_us * words / shape.vocab)
    return Draft("eagle", alpha, replace(network, shape=one, overheads=overheads))


def small_model(network: Network, shape: Shape, alpha: float) -> Draft:
    """Another model of the same vocabulary."""
    return Draft("model", alpha, replace(network, shape=shape))


def suffix(alpha: float, round_s: float = 20e-6) -> Draft:
    """Tokens copied from earlier text; `alpha` is the share of matches that hold."""
    return Draft("suffix", alpha, round_s=round_s)


def self_drafting(
    shape: Shape, device: Device, alpha: float, dtype: str = "bf16", tp: int = 1, level: str = "middle"
) -> Costs:
    """Our engine with its quantized drafter."""
    network = target(shape, device, dtype, tp)
    return Costs(network, (quantized(network, device, alpha, level),))
