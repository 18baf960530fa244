"""One guided prediction: what is left out, and that the rest doesn't mind."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embdiff import ops, prediction, vocabulary
from embdiff.errors import UserError
from embdiff.guidance import ClassifierFreeGuidance, Length, Lexical, NoRepeatNgram, RepetitionPenalty, TopK
from embdiff.guidance.base import Ban, Gradient, Guidance, Run, Tilt
from embdiff.guidance.sampling import repeated


@pytest.mark.parametrize(("strength", "cut"), [(1.0, True), (0.1, False), (0.0, False)])
def test_positions_that_a_weak_demand_will_need_are_looked_at(pipe, monkeypatch, strength, cut):
    monkeypatch.setattr(prediction, "live", lambda padding: torch.tensor([0]))
    run = Run(pipe.denoiser, pipe.tokenizer, 1, length=12)
    predictor = prediction.Predictor(
        run, [Length(words=3, strength=strength)], kept=pipe._kept_tokens(), draw_above=9.0, skip_padding=True
    )
    with torch.no_grad():
        predictor(torch.randn(1, 12, 16), 0.0, None)
    assert (predictor.rows is not None) == cut


class Pull(Guidance):
    """A gradient of log p(y | z) that is known."""

    name = "pull"

    def __init__(self, gradient, strength):
        self.gradient, self.strength = gradient, strength

    def parts(self, run):
        yield Gradient(lambda z, gamma: self.gradient, self.strength)


@dataclass(frozen=True)
class Without(Guidance):
    """No word of some, by a ban or by a tilt to nothing."""

    tokens: tuple[int, ...] = ()
    by_tilt: bool = False

    def parts(self, run):
        tokens = torch.tensor(self.tokens)
        tilt = Tilt(lambda words: words.logits.index_fill(1, tokens, -torch.inf))
        yield tilt if self.by_tilt else Ban(self.tokens)


@torch.no_grad()
@pytest.mark.parametrize(
    "others", [[], [Length(words=3)], [Lexical(["cat"])], [TopK(5)], [ClassifierFreeGuidance(2.0)]]
)
def test_a_ban_is_a_tilt_to_nothing_that_comes_first(pipe, others):
    tokens = tuple(pipe.tokenizer.convert_tokens_to_ids(["dog", "house", "red"]))
    z, run = torch.randn(2, 12, 16), pipe._run(["the cat .", "a dog"], None, 1, 12)

    def predict(*modules):
        return prediction.Predictor(run, modules, kept=pipe._kept_tokens())(z, 0.5, None)

    found = predict(*others, Without(tokens))
    assert torch.allclose(found, predict(Without(tokens, by_tilt=True), *others), atol=1e-4)
    assert not torch.allclose(found, predict(*others), atol=1e-3)


def test_a_text_that_is_rounded_as_a_chain_has_no_banned_word(chained):
    def drawn(*guidance):
        generator = torch.Generator().manual_seed(0)
        out = chained(num_samples=4, num_inference_steps=2, generator=generator, guidance=guidance)
        return out.sequences.unique().tolist()

    tokens = drawn()
    banned = tuple(token for token in tokens if token not in chained._kept_tokens())
    assert banned
    assert not set(drawn(Without(banned))) & set(banned)


@pytest.mark.parametrize("space", [None, "x0", "logits"])
@pytest.mark.parametrize("gamma", [-2.0, 1.0])
def test_gradients_move_x0_and_words(pipe, gamma, space):
    torch.manual_seed(0)
    z, gradient, strength = torch.randn(2, 12, 16), 0.1 * torch.randn(2, 12, 16), 0.7
    alpha = (1 / (1 + torch.tensor(gamma).exp())).sqrt()
    scale, table = 3.0, pipe.denoiser.space.table()
    context = Run(pipe.denoiser, pipe.tokenizer, 2, 12).encode(["a cat"] * 2)
    run = Run(pipe.denoiser, pipe.tokenizer, 2, 12, context=context)
    others = [] if space is None else [ClassifierFreeGuidance(scale, space)]
    with torch.no_grad():
        found = prediction.Predictor(run, [*others, Pull(gradient, strength)])(z, gamma, None)
        level = torch.full((2,), gamma)
        logits = pipe.denoiser.logits(pipe.denoiser(z, level, run.context))
        alone = pipe.denoiser.logits(pipe.denoiser(z, level))
        felt = prediction.FELT * alpha * strength * gradient @ table.T
        if space == "logits":
            logits = alone + scale * (logits - alone)
        expected = (logits + felt).softmax(-1) @ table
        if space == "x0":
            less = (alone + felt).softmax(-1) @ table
            expected = less + scale * (expected - less)
    expected = expected + (1 - alpha**2) / alpha * strength * gradient
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


PROMPTS = ["a cat", "the dog sees", "tree"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.98, 0.995, 1.0]), min_size=9, max_size=9), min_size=1))
def test_what_is_left_out_is_surely_padding_to_the_end(padding):
    padding = torch.tensor(padding)
    rows = prediction.live(padding)
    kept = torch.ones_like(padding, dtype=torch.bool)
    if rows is not None:
        kept = torch.zeros(padding.numel(), dtype=torch.bool).index_fill(0, rows, True).view_as(padding)
        assert not kept.all()
    assert (padding[~kept] > prediction.SURE).all()
    assert (kept.long().diff(dim=1) <= 0).all()  # what is kept are the first positions
    assert (kept.sum(1) >= min(prediction.MARGIN, 9)).all()
    # No more than needed: the last position kept, but for the margin, is one that is not sure.
    last = kept.sum(1) - prediction.MARGIN - 1
    assert all(
        n < 0 or p[n] <= prediction.SURE or k.all() for n, p, k in zip(last.tolist(), padding, kept, strict=True)
    )


def test_a_posterior_of_some_rows_is_padding_elsewhere():
    rows = torch.tensor([0, 1, 3])
    part = ops.Posterior(torch.randn(3, 4), torch.rand(3, 2) / 2, torch.rand(3, 5), torch.randn(3, 5, 4))
    whole = prediction.spread(part, rows, (2, 3))
    for name in ops.Posterior._fields:
        assert torch.equal(getattr(whole, name).flatten(0, 1)[rows], getattr(part, name))
    assert whole.kept.flatten(0, 1)[[2, 4, 5]].tolist() == [[1.0, 0.0]] * 3


MODULES = [
    [], [ClassifierFreeGuidance(2.0)], [ClassifierFreeGuidance(2.0, "logits")], [Length(words=3)], [TopK(3)],
    [Lexical(["cat"], ["dog"]), RepetitionPenalty(2.0), NoRepeatNgram(1)],
]  # fmt: skip


@pytest.mark.parametrize("guidance", MODULES)
def test_left_out_positions_are_padding_and_guidance_holds(pipe, monkeypatch, guidance):
    monkeypatch.setattr(prediction, "SURE", -1.0)  # all but the first positions are cut off
    generator = torch.Generator().manual_seed(0)
    seen = []

    def watch(self, *args, original=prediction.Predictor.__call__):
        x0 = original(self, *args)
        seen.append(12 * 9 if self.rows is None else len(self.rows))
        return x0

    monkeypatch.setattr(prediction.Predictor, "__call__", watch)
    out = pipe(PROMPTS, num_samples=3, num_inference_steps=5, generator=generator, guidance=guidance)
    assert seen[0] == 12 * 9
    assert seen[-1] == prediction.MARGIN * 9
    if guidance and isinstance(guidance[0], Length):
        assert all(len(text.split()) == 3 for text in out.texts)
    if guidance and isinstance(guidance[0], Lexical):
        assert all("cat" in text and "dog" not in text for text in out.texts)


def test_nothing_is_left_out_unless_asked(pipe, monkeypatch):
    monkeypatch.setattr(prediction, "live", lambda padding: pytest.fail("asked what is padding"))
    pipe(num_inference_steps=3, skip_padding=False)


def test_left_out_positions_do_not_depend_on_the_batch(pipe, monkeypatch):
    monkeypatch.setattr(prediction, "SURE", -1.0)

    def drawn(seeds):
        return pipe(num_samples=len(seeds), num_inference_steps=5,
                    generator=[torch.Generator().manual_seed(s) for s in seeds]).sequences  # fmt: skip

    assert torch.equal(drawn(range(5))[3:], torch.cat([drawn([3]), drawn([4])]))


def predictor_of(pipe, *guidance, samples=1):
    run = Run(pipe.denoiser, pipe.tokenizer, samples, length=12)
    return prediction.Predictor(run, guidance, kept=pipe._kept_tokens())


def ids_of(pipe, text):
    """[1, 12]"""
    pad, end = pipe._kept_tokens()
    tokens = [*vocabulary.tokens(pipe.tokenizer, text), end]
    return torch.tensor([tokens + [pad] * (12 - len(tokens))])


@pytest.mark.parametrize(
    ("text", "guidance", "changed"),
    [
        ("a cat sees the dog", [Lexical(keep={1: "cat"}), NoRepeatNgram(1)], []),
        ("a cat sees the cat", [NoRepeatNgram(1)], [4]),
        ("a cat sees the cat", [Lexical(keep={4: "cat"}), NoRepeatNgram(1)], [1]),
        ("the cat sees the cat", [Lexical(keep={3: "the", 4: "cat"}), NoRepeatNgram(2)], [1]),
        ("the cat sees the cat", [Lexical(keep={1: "cat", 4: "cat"}), NoRepeatNgram(2)], [3]),
        ("a dog cat dog the cat", [Lexical(keep={1: "dog", 5: "cat"}), NoRepeatNgram(1)], [2, 3]),
        ("a cat sees the dog", [Lexical(keep={1: "cat"}), Lexical(exclude=["cat sees"])], [2]),
        ("a cat sees the dog", [Lexical(keep={2: "sees"}), Lexical(exclude=["a cat sees"])], [0]),
    ],
)
def test_of_what_may_not_be_constraints_keep_what_they_need(pipe, text, guidance, changed):
    ids = ids_of(pipe, text)
    rounded = predictor_of(pipe, *guidance).round(pipe.denoiser.space.embed(ids))
    assert (rounded != ids).nonzero()[:, 1].tolist() == changed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it isn't changed
@given(st.data())
def test_rounding_finds_a_text_without_repetition_around_what_is_kept(pipe, data):
    words = st.sampled_from(["a", "cat", "dog", "the", "sees"])
    texts = [" ".join(data.draw(st.lists(words, min_size=3, max_size=9))) for _ in range(3)]
    places = data.draw(st.lists(st.integers(0, 7), max_size=3, unique=True))
    keep = dict(zip(places, data.draw(st.permutations(["cat", "dog", "the"])), strict=False))
    n = data.draw(st.integers(1, 2))
    guidance = [NoRepeatNgram(n), *([Lexical(keep=keep)] if keep else [])]
    ids = torch.cat([ids_of(pipe, text) for text in texts])
    rounded = predictor_of(pipe, *guidance, samples=3).round(pipe.denoiser.space.embed(ids))
    assert not repeated(rounded, n, pipe.tokenizer).any()
    for place, word in keep.items():
        assert (rounded[:, place] == pipe.tokenizer.convert_tokens_to_ids(word)).all()
    alone = predictor_of(pipe, *guidance).round(pipe.denoiser.space.embed(ids[2:]))
    assert torch.equal(alone, rounded[2:])


def test_what_is_kept_twice_may_not_be_forbidden_to_repeat(pipe):
    with pytest.raises(UserError, match="no text of 12 tokens can have all of"):
        predictor_of(pipe, Lexical(keep={1: "cat", 4: "cat"}), NoRepeatNgram(1))


@pytest.mark.parametrize(
    "others", [[], [TopK(1)], [NoRepeatNgram(1)], [NoRepeatNgram(1), TopK(1)], [TopK(1), Length(words=5)]]
)
def test_what_must_come_is_aimed_at_whatever_is_cut_or_barred(pipe, others):
    predictor = predictor_of(pipe, Lexical(keep={3: "cat"}), *others, samples=4)
    draft = pipe.denoiser.space.embed(ids_of(pipe, "a cat sees cat .")).expand(4, -1, -1)
    z = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    wanted = pipe.denoiser.space.table()[pipe.tokenizer.convert_tokens_to_ids("cat")]
    with torch.no_grad():
        x0 = predictor(z, 0.0, draft)
    assert (torch.cosine_similarity(x0[:, 3], wanted, dim=-1) > 0.99).all()


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.5])
def test_each_demand_guides_with_its_own_strength(pipe, strength):
    z = 0.3 * torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))  # so that words are probable

    def x0(*guidance):
        with torch.no_grad():
            return predictor_of(pipe, *guidance, samples=4)(z, 0.0, None)

    pad, end = pipe.denoiser.space.table()[list(pipe._kept_tokens())]
    length = Length(tokens=3, complete=False)
    found = x0(length, Lexical(["cat"], strength=strength))
    assert torch.allclose(found[:, 3], end.expand(4, -1), atol=1e-3)  # as certain as without the other
    assert torch.allclose(found[:, 4:], pad.expand(4, 8, -1), atol=1e-3)
    # None is one without strength, and the order doesn't matter.
    assert torch.allclose(x0(length, Lexical(["cat"], strength=1e-7)), x0(length), atol=1e-3)
    assert torch.allclose(x0(Lexical(["cat"], strength=strength), length), found, atol=1e-5)
    if strength:
        together = Length(tokens=3, complete=False, strength=strength), Lexical(["cat"], strength=strength)
        assert len(predictor_of(pipe, *together, samples=4).plan(0.0).demands) == 1


def test_tables_are_kept_until_a_weight_changes(denoiser):
    with torch.inference_mode():
        before = prediction.output_of(denoiser)
    assert prediction.output_of(denoiser) is before
    h = torch.randn(2, before.weight.shape[1], requires_grad=True)
    (h @ before.weight.T).square().sum().backward()  # whoever made them
    for change in (lambda: denoiser.space.weight[3].add_(1.0), lambda: denoiser.head.weight.zero_()):
        with torch.no_grad():
            change()
        found = prediction.output_of(denoiser)
        assert torch.equal(found.table, denoiser.space.table())
        assert torch.equal(found.weight, denoiser.output_weight())
    assert prediction.output_of(denoiser.to(torch.bfloat16)).weight.dtype is torch.bfloat16
    with torch.inference_mode():  # such weights don't tell of changes
        denoiser.head.weight = torch.nn.Parameter(torch.zeros_like(denoiser.head.weight))
        prediction.output_of(denoiser)
        denoiser.head.weight.fill_(1.0)
        assert torch.equal(prediction.output_of(denoiser).weight.float(), denoiser.output_weight().bfloat16().float())
