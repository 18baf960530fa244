"""Sampling controls: what they keep, on their own and as transformers has them."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.guidance import Lexical, Toxicity, sampling
from embdiff.guidance.base import Ban, Run, Words
from embdiff.guidance.sampling import MinP, NoRepeatNgram, Processors, RepetitionPenalty, TopK, TopP, repeated

V = 30


def logits(seed):
    drawn = torch.randn(8, V, generator=torch.Generator().manual_seed(seed)) * 2
    drawn[:, :2] = -torch.inf  # padding and the end of text
    return drawn


def run_of(pipe):
    return Run(pipe.denoiser, pipe.tokenizer, samples=2, length=4)


def applied(module, pipe, scores, draft=None):
    (part,) = module.parts(run_of(pipe))
    if isinstance(part, Ban):
        return scores.index_fill(1, torch.tensor(part.tokens), -torch.inf)
    return part.apply(Words(scores, torch.arange(len(scores)), draft))


@given(seed=st.integers(0, 99), k=st.integers(1, 20), p=st.floats(0.05, 0.95))
def test_they_equal_transformers_own(seed, k, p):
    scores = logits(seed)
    pairs = [
        (TopK(k), transformers.TopKLogitsWarper(k)),
        (TopP(p), transformers.TopPLogitsWarper(p)),
        (MinP(p), transformers.MinPLogitsWarper(p)),
    ]
    for ours, theirs in pairs:
        (part,) = ours.parts(FakeRun)
        assert torch.equal(part.apply(Words(scores, torch.arange(8), None)), theirs(None, scores.clone()))


@pytest.mark.parametrize("likeliest", [1, 3, 1000])
def test_a_nucleus_is_the_same_however_many_words_are_sorted_at_first(likeliest, monkeypatch):
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    for seed in range(30):
        p, scores = 0.05 + 0.03 * seed, logits(seed)
        (part,) = TopP(p).parts(FakeRun)
        found = part.apply(Words(scores, torch.arange(8), None))
        assert torch.equal(found, transformers.TopPLogitsWarper(p)(None, scores.clone()))


class FakeRun:
    vocabulary = V


def test_neutral_values_give_no_part():
    for module in (TopK(V), TopP(1.0), MinP(0.0), RepetitionPenalty(1.0)):
        assert not list(module.parts(FakeRun))


@given(st.integers(0, 99))
def test_the_penalty_falls_on_words_that_stand_earlier_in_the_draft(seed):
    scores = logits(seed)
    draft = torch.randint(2, V, (2, 4), generator=torch.Generator().manual_seed(seed))
    (part,) = RepetitionPenalty(1.5).parts(FakeRun)
    found = part.apply(Words(scores, torch.arange(8), draft))
    logs = scores.log_softmax(-1)
    for row in range(8):
        b, i = divmod(row, 4)
        seen = set(draft[b, :i].tolist())
        for token in range(2, V):
            assert found[row, token].item() == pytest.approx(logs[row, token].item() * (1.5 if token in seen else 1.0))
    # In chunks the same, and at the first step nothing.
    assert torch.equal(part.apply(Words(scores[3:6], torch.arange(3, 6), draft)), found[3:6])
    assert torch.equal(part.apply(Words(scores, torch.arange(8), None)), scores)


@given(st.lists(st.integers(2, 4), max_size=9), st.integers(1, 3))
def test_repeated_runs_are_marked_where_they_end(tokens, n):
    ids = torch.tensor([[*tokens, 0, *[2] * 9]])
    expected = [tuple(tokens[i - n : i]) in {tuple(tokens[j - n : j]) for j in range(n, i)} if i >= n else False
                for i in range(1, len(tokens) + 1)]  # fmt: skip
    ends = SimpleNamespace(eos_token_id=0, pad_token_id=1)
    assert repeated(ids, n, ends)[0].tolist() == expected + [False] * 10


@pytest.mark.parametrize("n", [1, 2])
def test_no_ngram_occurs_twice_in_a_text(pipe, n):
    out = pipe(num_samples=4, num_inference_steps=3, guidance=[NoRepeatNgram(n)])
    assert not repeated(out.sequences, n, pipe.tokenizer).any()


CUTS = [
    lambda: TopK(1), lambda: TopP(0.3), lambda: MinP(0.9), lambda: Processors([transformers.TypicalLogitsWarper(0.2)]),
]  # fmt: skip


@pytest.mark.parametrize("cutting", CUTS)
@pytest.mark.parametrize("ban", ["words", "lexicon", "tokens", "n-grams"])
def test_bans_and_cuts_in_either_order_give_the_same_texts_without_what_is_banned(pipe, tmp_path, cutting, ban):
    def drawn(*guidance):
        generator, steps = torch.Generator().manual_seed(0), []
        out = pipe(num_samples=6, num_inference_steps=4, generator=generator, guidance=guidance,
                   callback_on_step_end=lambda pipe, i, t, state: steps.append(state["x0"]) or {})  # fmt: skip
        assert all(x0.isfinite().all() for x0 in steps)
        assert any(out.texts)
        return out

    common = sorted({word for text in drawn(cutting()).texts for word in text.split()} - {"<unk>"})
    (tmp_path / "words.txt").write_text("\n".join(common))
    tokens = [pipe.tokenizer.convert_tokens_to_ids(word) for word in common]
    banning = {
        "words": lambda: Lexical(exclude=common),
        "lexicon": lambda: Toxicity(lexicon=str(tmp_path / "words.txt")),
        "tokens": lambda: Processors([transformers.SuppressTokensLogitsProcessor(tokens)]),
        "n-grams": lambda: NoRepeatNgram(1),
    }[ban]
    one, other = drawn(cutting(), banning()), drawn(banning(), cutting())
    assert torch.equal(one.sequences, other.sequences)
    if ban == "n-grams":
        assert not repeated(one.sequences, 1, pipe.tokenizer).any()
    else:
        assert not {word for text in one.texts for word in text.split()} & set(common)


def test_a_text_of_which_every_word_is_banned_is_empty(pipe):
    every = [text.strip() for text in run_of(pipe).pieces if text]
    assert pipe(num_samples=2, num_inference_steps=3, guidance=[TopP(0.5), Lexical(exclude=every)]).texts == ["", ""]


def test_processors_that_suppress_are_bans(pipe):
    bans = [transformers.SuppressTokensLogitsProcessor([5, 6])]
    others = [
        transformers.TopKLogitsWarper(3), transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.1),
        transformers.TypicalLogitsWarper(0.5), transformers.TemperatureLogitsWarper(0.5),
        transformers.EpsilonLogitsWarper(0.02),
    ]  # fmt: skip
    parts = list(Processors([*others, *bans]).parts(run_of(pipe)))
    assert [isinstance(part, Ban) for part in parts] == [False] * len(others) + [True]
    assert list(parts[-1].tokens) == [5, 6]


@given(st.lists(st.integers(2, 3), max_size=9), st.integers(1, 3))
def test_all_of_what_is_repeated_is_marked(tokens, n):
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    twice = {j for i, run in enumerate(runs) if runs.count(run) > 1 for j in range(i, i + n)}
    ends = SimpleNamespace(eos_token_id=0, pad_token_id=1)
    marked = repeated(torch.tensor([[*tokens, 0, *[2] * 9]]), n, ends, whole=True)
    assert set(marked[0].nonzero()[:, 0].tolist()) == twice


def test_processors_that_look_at_scores_alone_are_taken_as_they_are(pipe):
    vocabulary = len(pipe.tokenizer)
    scores = torch.randn(8, vocabulary)
    scores[:, [0, 2]] = -torch.inf
    for processor in (
        transformers.TopKLogitsWarper(3), transformers.TypicalLogitsWarper(0.5), transformers.EpsilonLogitsWarper(0.02),
        transformers.TemperatureLogitsWarper(0.5), transformers.SuppressTokensLogitsProcessor([5, 6]),
    ):  # fmt: skip
        assert torch.equal(applied(Processors([processor]), pipe, scores), processor(None, scores.clone()))


def test_processors_that_ours_stand_for(pipe):
    parts = Processors(
        [transformers.RepetitionPenaltyLogitsProcessor(1.3), transformers.NoRepeatNGramLogitsProcessor(2)]
    ).parts(run_of(pipe))
    assert [type(part).__name__ for part in parts] == ["Tilt", "Veto"]


class Alternating(transformers.LogitsProcessor):
    """Looks at the word before."""

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] % 2 else scores + 1


@pytest.mark.parametrize(
    ("processor", "cause"),
    [
        (lambda: transformers.MinLengthLogitsProcessor(5, 1), "use Length"),
        (lambda: transformers.NoBadWordsLogitsProcessor([[5, 6]], 1), "use Lexical"),
        (Alternating, "Alternating looks at the words before"),
    ],
)
def test_processors_that_look_back_are_refused(pipe, processor, cause):
    with pytest.raises(UserError, match=cause):
        pipe(num_inference_steps=2, guidance=[Processors([processor()])])


@pytest.mark.parametrize(
    "module",
    [lambda: TopK(0), lambda: TopP(0.0), lambda: TopP(1.1), lambda: MinP(-0.1), lambda: RepetitionPenalty(0.5),
     lambda: NoRepeatNgram(0)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(module):
    with pytest.raises(UserError, match="out of range"):
        module()
