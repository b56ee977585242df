"""The longest suffix match in C, in torch and compiled, against its definition in plain Python."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from laws import mutant
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.drafter import matching
from trl_selfspec.drafter.matching import MAX_MATCH, eager_suffix_match, longest_suffix_match
from trl_selfspec.kernels.cpu import matching as cpu
from trl_selfspec.sampling import samplers


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


class Case(NamedTuple):
    """The arguments of `longest_suffix_match`."""

    texts: Tensor
    lengths: Tensor
    starts: Tensor
    slots: Tensor
    first: Tensor
    end: Tensor
    gamma: int
    group_size: int
    width: int


Matcher = Callable[..., Tensor]
Cases = list[tuple[Case, list[list[int]]]]  # with the drafts of the definition


def naive(case: Case) -> list[list[int]]:
    """The drafts, row by row and candidate by candidate."""
    words, length, start = case.texts.tolist(), case.lengths.tolist(), case.starts.tolist()
    drafts = []
    for own, low, high in zip(case.slots.tolist(), case.first.tolist(), case.end.tolist(), strict=True):
        row, best = words[own][: length[own]], (0, False, own, length[own] - 1)
        for slot in range(low, high):
            for j in range(1 if slot == own else max(1, start[slot]), length[slot]):
                n = 0
                while n < min(MAX_MATCH, j, len(row)) and words[slot][j - 1 - n] == row[-1 - n]:
                    n += 1
                if n > 0:
                    best = max(best, (n, slot == own, slot, j))
        _, _, slot, j = best
        drafts.append([words[slot][j + i % (length[slot] - j)] for i in range(case.gamma)])
    return drafts


def random_case(seed: int, longest: int = 40, max_group: int = 5) -> Case:
    """Prompts with groups of ragged texts; some of their rows are decoded, in any order."""
    rng = random.Random(seed)
    alphabet, width = rng.choice([1, 2, 2, 3, 3, 4]), rng.randint(1, longest)
    groups = [rng.randint(1, max_group) for _ in range(rng.randint(1, 4))]
    starts, lengths, rows = [], [], []
    for group in groups:
        first = len(lengths)
        decoded = rng.sample(range(group), rng.randint(1, group))
        rows += [(first + slot, first, first + group) for slot in decoded]
        lengths += [rng.choice([width, rng.randint(slot in decoded, width)]) for slot in range(group)]
        starts += [rng.randint(0, max(width // 2, 1)) for _ in range(group)]
    rng.shuffle(rows)
    spare = rng.choice([0, 0, 1, 9])  # columns behind the width: a text is then not contiguous with the next
    phrase, noise = [rng.randrange(alphabet) for _ in range(rng.randint(1, 30))], rng.choice([0.03, 0.3, 1.0])

    def text() -> list[int]:
        """The phrase over and over, from some word on, with slips of the pen."""
        shift = rng.randrange(len(phrase))
        words = [phrase[(shift + i) % len(phrase)] for i in range(width + spare)]
        return [rng.randrange(alphabet) if rng.random() < noise else word for word in words]

    texts = torch.tensor([text() for _ in lengths], dtype=torch.int32)
    slots, firsts, ends = (torch.tensor(values) for values in zip(*rows, strict=True))
    sizes = rng.randint(1, 16), max(groups) + rng.choice([0, 0, 3]), width
    return Case(texts, torch.tensor(lengths), torch.tensor(starts), slots, firsts, ends, *sizes)


def differing(matcher: Matcher, cases: Cases) -> int:
    """In how many cases a matcher drafts other tokens than the definition."""
    return sum(matcher(*case).tolist() != drafts for case, drafts in cases)


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Short texts, and some that are longer than several vectors; with what the definition drafts."""
    drawn = [random_case(seed) for seed in range(1500)] + [random_case(seed, 300) for seed in range(60)]
    return [(case, naive(case)) for case in drawn]


@needs_kernels
def test_the_kernel_drafts_by_the_definition(cases: Cases) -> None:
    """Catches tails of vectors, candidates that are skipped though they win, and reads of what means nothing."""
    assert differing(longest_suffix_match, cases) == 0


def test_the_reference_drafts_by_the_definition(cases: Cases) -> None:
    """It is what runs on other devices and what a GPU compiles; ties must be broken the same way everywhere."""
    assert differing(eager_suffix_match, cases) == 0


FAULTS = {
    "reads a token past the lengths": (
        ("lengths[group])[:, :, None]", "lengths[group] + 1)[:, :, None]"),
        ("lengths[slot] - start", "lengths[slot] + 1 - start"),
    ),
    "ignores starts": (("0, starts[group])", "0, 0 * starts[group])"),),
    "prefers the first occurrence": (
        ("width + position\n", "width + width - 1 - position\n"),
        ("best % width, length", "width - 1 - best % width, length"),
    ),
    "does not prefer the row's own text": (("* 2 + is_own", "* 2 + 0 * is_own"),),
    "prefers the earlier slot": (
        ("group_size + offset", "group_size + group_size - 1 - offset"),
        ("first + best // width % group_size", "first + group_size - 1 - best // width % group_size"),
    ),
    "copies from another prompt": (("group >= end[:, None]", "group >= texts.shape[0]"),),
    "counts what lies before a row's text": (("recent.masked_fill(back >= length[:, None], -1)", "recent"),),
    "repeats the text's last token": (("step % period[:, None]", "step.minimum(period[:, None] - 1)"),),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_matcher_is_noticed(fault: str, cases: Cases) -> None:
    """Negative controls: the cases tell each of these from the definition."""
    roomy = [(case, drafts) for case, drafts in cases if case.lengths.amax() < case.texts.shape[1]]
    assert differing(mutant(matching, *FAULTS[fault]).eager_suffix_match, roomy) > 0


@pytest.mark.parametrize("matcher", [pytest.param(longest_suffix_match, marks=needs_kernels), eager_suffix_match])
def test_a_row_does_not_see_what_it_will_say(matcher: Matcher) -> None:
    """What lies behind a length may be the row's own future: to draft it would be acceptance 1 on random text."""
    texts = torch.randint(0, 50, (64, 200), dtype=torch.int32)
    slots = torch.arange(64)
    past, starts, first = torch.full((64,), 150), torch.full((64,), 20), slots // 8 * 8

    def acceptance(matcher: Matcher, lengths: Tensor) -> float:
        drafts = matcher(texts, lengths, starts, slots, first, first + 8, 1, 8, 200)
        return (drafts[:, 0] == texts[:, 150]).float().mean().item()

    assert acceptance(matcher, past) < 0.2
    broken = mutant(matching, *FAULTS["reads a token past the lengths"])
    assert acceptance(broken.eager_suffix_match, past) == 1, "negative control"


@pytest.mark.parametrize("matcher", [pytest.param(longest_suffix_match, marks=needs_kernels), eager_suffix_match])
def test_a_match_counts_up_to_its_bound(matcher: Matcher) -> None:
    """Beyond, the later text wins. The kernel ends its search at the bound, so it must meet the winner first."""
    row = torch.arange(MAX_MATCH + 4)
    whole, bounded, shorter = (torch.cat((row[-n:], torch.tensor([100 + n]))) for n in (MAX_MATCH + 1, MAX_MATCH, 3))
    texts = torch.nn.utils.rnn.pad_sequence([whole, bounded, shorter, row], batch_first=True).int()
    lengths, starts = torch.tensor([len(whole), len(bounded), len(shorter), len(row)]), torch.zeros(4).long()
    slots, first, end = torch.tensor([3]), torch.tensor([0]), torch.tensor([4])
    arguments = texts, lengths, starts, slots, first, end, 1, 4, texts.shape[1]
    assert matcher(*arguments).item() == 100 + MAX_MATCH
    broken = mutant(matching, (f"MAX_MATCH = {MAX_MATCH}", f"MAX_MATCH = {MAX_MATCH + 1}")).eager_suffix_match
    assert broken(*arguments).item() == 100 + MAX_MATCH + 1, "negative control"


@pytest.mark.parametrize("matcher", [pytest.param(longest_suffix_match, marks=needs_kernels), eager_suffix_match])
def test_a_row_may_have_said_more_than_its_text(matcher: Matcher) -> None:
    """Given its last tokens, a row drafts as if its text ended with them. Prevents the wrong order."""
    texts = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 4, 9, 9, 9, 9], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    lengths, starts, first, end = torch.tensor([6, 2, 1]), torch.zeros(3).long(), torch.tensor([0]), torch.tensor([3])
    arguments = texts, lengths, starts, torch.tensor([2]), first, end, 2, 3, 6

    def recent(*last_first: int) -> Tensor:
        return torch.tensor([[*last_first, *[-1] * (MAX_MATCH - len(last_first))]], dtype=torch.int32)

    assert matcher(*arguments, recent(3, 2)).tolist() == [[4, 5]]
    assert matcher(*arguments, recent(4)).tolist() == [[5, 6]]
    assert matcher(*arguments, recent(8, 4)).tolist() == matcher(*arguments).tolist() == [[0, 0]], "no match"


@needs_kernels
def test_the_kernel_takes_last_tokens_as_the_reference_does() -> None:
    for seed in range(300):
        case, generator = random_case(seed), torch.Generator().manual_seed(seed)
        recent = torch.randint(0, 3, (len(case.slots), MAX_MATCH), generator=generator, dtype=torch.int32)
        counts = torch.randint(1, MAX_MATCH + 1, (len(case.slots), 1), generator=generator)
        recent = recent.masked_fill(torch.arange(MAX_MATCH) >= counts, -1)
        assert longest_suffix_match(*case, recent).equal(eager_suffix_match(*case, recent))


def on(device: str, case: Case) -> Case:
    return Case(*(value.to(device) if isinstance(value, Tensor) else value for value in case))


def test_no_host_sync() -> None:
    """On meta tensors any read of a value raises; on CUDA it would stall every round and break graph capture."""
    case = on("meta", random_case(0))
    assert longest_suffix_match(*case).shape == (len(case.slots), case.gamma)
    with pytest.raises(RuntimeError):
        case.lengths.amax().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_drafts_by_the_definition_in_a_captured_graph(cases: Cases) -> None:
    """Prevents a compilation within the capture, and a program that captures today's lengths."""
    case, other = random_case(3), random_case(3)._replace(lengths=torch.ones_like(random_case(3).lengths))
    static = on("cuda", other)
    longest_suffix_match(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drafts = longest_suffix_match(*static)
    for now in (other, case):
        static.lengths.copy_(now.lengths)
        graph.replay()
        assert drafts.tolist() == naive(now)
    assert differing(lambda *arguments: longest_suffix_match(*on("cuda", Case(*arguments))), cases[:200]) == 0


@needs_kernels
def test_threads_change_no_draft() -> None:
    """Rows are shared out among threads."""
    texts = torch.randint(0, 3, (48, 3000), dtype=torch.int32)
    slots = torch.randperm(48)[:33]
    lengths, starts, first = torch.randint(1, 3001, (48,)), torch.randint(0, 1000, (48,)), slots // 16 * 16
    arguments = texts, lengths, starts, slots, first, first + 16, 8, 16, 3000
    expected = longest_suffix_match(*arguments)
    strided = lengths.repeat_interleave(2)[::2]
    assert longest_suffix_match(texts, strided, *arguments[2:]).equal(expected)
    torch.set_num_threads(2)
    try:
        assert longest_suffix_match(*arguments).equal(expected)
    finally:
        torch.set_num_threads(1)


@needs_kernels
def test_texts_that_do_not_lie_in_rows_are_refused() -> None:
    """The kernel reads a text in place: with another stride it would read other texts."""
    case = random_case(2)
    with pytest.raises(AssertionError):
        cpu.suffix_match(case.texts.repeat(1, 2)[:, ::2], *case[1:7], MAX_MATCH)
    with pytest.raises(AssertionError):
        cpu.suffix_match(case.texts.long(), *case[1:7], MAX_MATCH)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lets `compiled_on_gpu` compile on the CPU; holds what was compiled."""
    graphs: list[Any] = []
    compile_ = torch.compile

    def counting(function: Callable, **options: Any) -> Callable:
        def backend(graph: Any, inputs: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx

            graphs.append(graph)
            return compile_fx(graph, inputs)

        return compile_(function, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(cpu, "is_supported", lambda texts: False)
    monkeypatch.setattr(samplers, "runs_triton", lambda device: True)
    monkeypatch.setattr(torch, "compile", counting)
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiled_program_drafts_by_the_definition(
    cases: Cases, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs run, here by Inductor on the CPU. Three programs for all sizes (a single row, a row for every slot,
    any other): compiling takes seconds, in the middle of a rollout. Texts have more tokens than there are slots, for
    sizes that happen to be equal are compiled apart.
    """
    fresh = samplers.compiled_on_gpu(eager_suffix_match.__wrapped__)
    monkeypatch.setattr(matching, "eager_suffix_match", fresh)
    usual = [(case, drafts) for case, drafts in cases if case.texts.shape[1] > len(case.texts) > 1 < case.width]
    assert len(usual) > 1000
    assert differing(longest_suffix_match, usual) == 0
    assert 0 < len(compiled) <= 3
