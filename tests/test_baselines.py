"""The baselines: exact probabilities, the masked bound against all orders, and sampling that draws from the model."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import baselines, pipeline
from embdiff.baselines import BASELINES, AutoregressiveModel, MaskedModel
from embdiff.batches import Batch, Prompts, encode
from embdiff.data import Example
from embdiff.errors import UserError
from tests.conftest import lively, sentences

PAD, END, V, L, B, P = 0, 2, 5, 3, 4, 4
SHAPE = {"vocab_size": V, "width": 16, "depth": 2, "heads": 2, "max_length": L, "max_prompt_length": P}


@pytest.fixture(scope="module")
def writer() -> AutoregressiveModel:
    return lively(AutoregressiveModel(**SHAPE, end_id=END, pad_id=PAD)).double()


@pytest.fixture(scope="module")
def masked() -> MaskedModel:
    return lively(MaskedModel(**SHAPE)).double()


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + seed) for seed in range(count)]


def prompts(seed: int = 0, count: int = B) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (count, P), generator=generator)
    return Prompts.aligned(ids, torch.randint(0, P + 1, (count,), generator=generator))


def first(some: Prompts, copies: int) -> Prompts:
    """The first prompt, several times."""
    return Prompts(*(x[:1].expand(copies, -1) for x in (some.ids, some.present, some.positions)))


def texts(seed: int = 0, length: int = L) -> torch.Tensor:
    """Words alone, as many as there are positions."""
    return torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(seed))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations above its mean Pearson's statistic is."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum().item()
    freedom = int((probabilities > 0).sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def index(ids: torch.Tensor) -> torch.Tensor:
    """A number for each text."""
    return (ids * V ** torch.arange(ids.shape[1])).sum(1)


# ------------------------------------------------------------------------------------------ autoregressive


@given(st.integers(0, 20), st.booleans())
def test_cached_steps_are_one_joint_pass(writer, seed, prompted):
    batch = Batch(texts(seed, 7), prompts=prompts(seed) if prompted else None)
    h = writer(batch.ids, writer._prompt_context(batch.prompts, B))
    seen = writer._prompt_context(batch.prompts, B)
    for j in range(7):
        logits, seen = writer.step(batch.ids[:, :j], seen)
        assert torch.allclose(logits[:, 1:], writer.logits(h[:, j])[:, 1:], atol=1e-9)
        assert torch.all(logits[:, PAD] == -math.inf)
    log_probs = writer.logits(h).log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
    assert torch.allclose(log_probs.float(), writer.log_probs(batch), atol=1e-5)


@given(st.integers(0, 20), st.integers(0, 6))
def test_a_token_changes_no_probability_before_it(writer, seed, j):
    ids = texts(seed, 7)
    other = ids.clone()
    other[:, j] = 3 + 4 - ids[:, j]
    one, two = (writer.log_probs(Batch(x, prompts=prompts(seed))) for x in (ids, other))
    assert torch.equal(one[:, :j], two[:, :j])
    assert not torch.isclose(one[:, j], two[:, j]).any()
    assert j == 6 or not torch.isclose(one[:, j + 1 :], two[:, j + 1 :]).all(1).any()


@pytest.mark.parametrize("prompted", [False, True])
def test_the_probabilities_of_all_texts_sum_to_one(writer, prompted):
    ids, p = distribution(writer, prompts() if prompted else None)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert len(ids) == 1 + 3 + 9 + 3**L  # ends after 0, 1 or 2 words, or none


def distribution(writer, some: Prompts | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Every text there is, and its probability."""
    words = [i for i in range(V) if i not in (PAD, END)]
    every = [[*text, END, *[PAD] * (L - n - 1)] for n in range(L) for text in itertools.product(words, repeat=n)] + [
        list(text) for text in itertools.product(words, repeat=L)
    ]
    ids = torch.tensor(every)
    batch = Batch(ids, prompts=None if some is None else first(some, len(ids)))
    return ids, writer.log_probs(batch).sum(1).exp()


@pytest.mark.parametrize("prompted", [False, True])
def test_samples_are_as_frequent_as_they_are_probable(writer, prompted):
    some = prompts() if prompted else None
    ids, p = distribution(writer, some)
    drawn = writer.sample(seeds(4000), None if some is None else first(some, 4000))
    counts = torch.bincount(index(drawn), minlength=V**L).double()
    exact = torch.zeros_like(counts).index_add(0, index(ids), p.double())
    assert counts[exact == 0].sum() == 0
    assert chi_square(counts, exact) < 4


def test_what_follows_the_end_is_not_charged_and_a_truncated_text_has_none(writer, tokenizer):
    encoded = encode([Example(t) for t in [*sentences(20), "the cat " * 20]], tokenizer, 8)
    model = lively(
        AutoregressiveModel(len(tokenizer), width=16, depth=1, heads=2, max_length=8, end_id=tokenizer.eos_token_id)
    )
    ids = encoded.batch(range(21)).ids
    log_probs = model.log_probs(Batch(ids))
    assert (log_probs != 0).sum(1).tolist() == encoded.text_length.tolist()
    charged = model.charged(ids)
    noise = torch.where(charged, ids, torch.randint(len(tokenizer), ids.shape))
    assert torch.allclose(model.log_probs(Batch(noise)), log_probs, atol=1e-5)
    without = ids.masked_fill(ids == tokenizer.eos_token_id, tokenizer.pad_token_id)  # an end that was left out
    assert torch.equal(model.charged(without), charged & (ids != tokenizer.eos_token_id))
    longest = int(charged[:20].sum(1).max())
    assert torch.allclose(model.log_probs(Batch(ids[:20, :longest])), log_probs[:20, :longest], atol=1e-5)


def test_low_temperature_and_a_small_nucleus_are_greedy(writer):
    ids = torch.empty(1, 0, dtype=torch.long)
    seen = None
    for _ in range(L):
        logits, seen = writer.step(ids, seen)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    for options in ({"temperature": 1e-3}, {"top_p": 1e-6}):
        for sample in writer.sample(seeds(5), **options):
            charged = writer.charged(ids)[0]
            assert torch.equal(sample[charged], ids[0][charged])


@given(st.integers(0, 50), st.floats(0.05, 1.0))
def test_quantiles_of_a_nucleus_share_out_its_probability(seed, top_p):
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    n = 4000
    drawn = baselines.draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, 0.7, top_p)
    shares = torch.bincount(drawn, minlength=9) / n
    p = (logits / 0.7).softmax(-1)
    kept = shares > 0
    assert p[kept].sum() >= top_p - 1e-3
    assert p[kept].sum() - p[kept].min() < top_p  # and none of them is too many
    assert p[kept].min() >= p.masked_fill(kept, 0.0).max() - 1e-3
    assert torch.allclose(shares[kept], (p[kept] / p[kept].sum()).float(), atol=2e-3)


def test_masked_samples_end_as_often_at_any_temperature_that_spares_the_ends(masked):
    """In one step each position is drawn by itself, from the same distribution of ends."""
    drawn = masked.sample(seeds(3000), steps=1, temperature=0.3, keep=(PAD, END))
    with torch.no_grad():
        p = masked.logits(masked(texts()[:1], torch.ones(1, L, dtype=torch.bool))).softmax(-1)[0]
    for token in (PAD, END):
        assert torch.allclose((drawn == token).double().mean(0), p[:, token], atol=0.04)


@given(st.integers(0, 50), st.floats(0.3, 2.0), st.sets(st.integers(0, 6), max_size=3))
def test_a_temperature_leaves_the_tokens_that_are_kept_alone(seed, temperature, keep):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = 4000
    drawn = baselines.draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, temperature, keep=sorted(keep))
    shares = torch.bincount(drawn, minlength=7) / n
    kept = torch.tensor([i in keep for i in range(7)])
    p = logits.softmax(-1).float()
    words = (p ** (1 / temperature)).masked_fill(kept, 0.0)
    expected = torch.where(kept, p, words / words.sum() * p[~kept].sum())
    assert torch.allclose(shares, expected, atol=1e-3)


# --------------------------------------------------------------------------------------------------- masked


def in_order(model: MaskedModel, ids: torch.Tensor, order: tuple[int, ...], known=(), some=None) -> torch.Tensor:
    """-log p [n] of each text if its positions are unmasked in this order."""
    hidden = torch.ones(ids.shape, dtype=torch.bool)
    hidden[:, list(known)] = False
    total = torch.zeros(len(ids), dtype=torch.float64)
    for j in order:
        total += model.cross_entropy(Batch(ids, prompts=some), hidden)[:, j]
        hidden[:, j] = False
    return total


def test_bound_and_loss_are_the_mean_over_all_orders(masked):
    """An any-order model: exact by enumeration, and above -log of the mean probability."""
    ids = texts(1)[:1]
    nats = torch.stack([in_order(masked, ids, order) for order in itertools.permutations(range(L))])
    exact, n = nats.mean().item(), 20_000
    many = Batch(ids.expand(n, -1))
    generator = torch.Generator().manual_seed(0)
    for estimate in (
        masked.bound(many, generator, samples=1),
        torch.stack([masked_loss(masked, many.take(slice(k, k + 100)), generator) for k in range(0, n, 100)]) * L,
    ):
        error = estimate.std().item() / math.sqrt(len(estimate))
        assert estimate.mean().item() == pytest.approx(exact, abs=4 * error)
        assert error < 0.05 * exact
    assert exact >= -(-nats).exp().mean().log().item()


def masked_loss(model: MaskedModel, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    rows = len(batch.ids)
    t = (torch.arange(rows) + torch.rand(1, generator=generator)) / rows
    with torch.no_grad():
        return model.loss(batch, t, torch.rand(batch.ids.shape, generator=generator))


def test_the_bound_of_what_is_given_is_the_mean_over_the_orders_of_the_rest(masked):
    ids, some = texts(2)[:1], prompts(3)
    known = torch.tensor([[False, True, False]])
    exact = torch.stack([in_order(masked, ids, o, [1], first(some, 1)) for o in ((0, 2), (2, 0))]).mean().item()
    n = 8000
    many = Batch(ids.expand(n, -1), known.expand(n, -1), first(some, n))
    estimate = masked.bound(many, torch.Generator().manual_seed(0), samples=1)
    assert estimate.mean().item() == pytest.approx(exact, abs=4 * estimate.std().item() / math.sqrt(n))
    everything = Batch(ids, torch.ones_like(known))
    assert masked.bound(everything, torch.Generator()).item() == 0.0


@given(st.integers(1, 6), st.integers(1, 5))
def test_a_uniform_model_needs_log_v_nats_a_position(samples, rows):
    model = MaskedModel(**SHAPE)
    torch.nn.init.zeros_(model.head.weight)
    bound = model.bound(Batch(texts()[:rows]), torch.Generator().manual_seed(samples), samples=samples)
    assert torch.allclose(bound, torch.full((min(rows, B),), L * math.log(V)), rtol=1e-5)


@given(st.integers(0, 20))
def test_masked_tokens_are_not_seen_and_others_cost_nothing(masked, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, hidden = texts(seed), torch.rand(B, L, generator=generator) < 0.5
    other = torch.where(hidden, torch.randint(V, ids.shape, generator=generator), ids)
    assert torch.equal(masked(ids, hidden), masked(other, hidden))
    losses = masked.cross_entropy(Batch(ids), hidden)
    assert torch.all((losses > 0) == hidden)
    exact = -masked.logits(masked(ids, hidden)).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(losses[hidden], exact[hidden].float(), atol=1e-5)


def test_in_one_step_all_positions_are_drawn_apart_in_many_one_after_the_other(masked):
    every = torch.tensor(list(itertools.product(range(V), repeat=L)))
    with torch.no_grad():
        nothing = torch.ones(1, L, dtype=torch.bool)
        marginals = masked.logits(masked(texts()[:1], nothing)).softmax(-1)[0]
        apart = torch.stack([marginals[j, every[:, j]] for j in range(L)]).prod(0)
        orders = itertools.permutations(range(L))
        joint = torch.stack([(-in_order(masked, every, order)).exp() for order in orders]).mean(0)
    assert (apart - joint).abs().sum() > 0.1  # else the test would tell nothing
    for steps, p in ((1, apart), (100_000, joint)):
        counts = torch.bincount(index(masked.sample(seeds(3000), steps=steps)), minlength=V**L).double()
        exact = torch.zeros_like(counts).index_add(0, index(every), p)
        assert exact.sum().item() == pytest.approx(1.0, abs=1e-6)
        assert chi_square(counts, exact) < 4


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_marginals_of_a_model_that_ignores_its_input_are_its_softmax(steps):
    model = lively(MaskedModel(**SHAPE)).double()
    with torch.no_grad():
        model.final.weight[SHAPE["width"] :] = -1.0  # the hidden state is multiplied by 0, its shift stays
        p = model.logits(model.final.weight[: SHAPE["width"], 0]).softmax(-1)
    ids = model.sample(seeds(3000), steps=steps)
    for j in range(L):
        assert chi_square(torch.bincount(ids[:, j], minlength=V).double(), p) < 4


@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_what_is_unmasked_stays_and_in_the_end_all_is(masked, monkeypatch, steps):
    seen = []
    forward = MaskedModel.forward

    def spy(self, ids, hidden, context=None):
        seen.append((ids.clone(), hidden.clone()))
        return forward(self, ids, hidden, context)

    monkeypatch.setattr(MaskedModel, "forward", spy)
    final = masked.sample(seeds(B), prompts(), steps=steps)
    assert 1 <= len(seen) <= min(steps, L)
    assert seen[0][1].all()
    for (ids, hidden), (_, before) in zip(seen[1:], seen, strict=False):
        assert torch.equal(ids[~hidden], final[~hidden])
        assert torch.all(before | ~hidden)
        assert not torch.equal(before, hidden)  # no step for nothing
    assert torch.all((final >= 0) & (final < V))


# ----------------------------------------------------------------------------------------------------- both


@pytest.fixture(params=list(BASELINES))
def model(request, writer, masked):
    return writer if request.param == "autoregressive" else masked


def nats(model, batch: Batch) -> torch.Tensor:
    """Of every position, of which those in the middle are masked."""
    if isinstance(model, AutoregressiveModel):
        return model.log_probs(batch)
    return model.cross_entropy(batch, torch.tensor([[False, True, True]]).expand(len(batch.ids), -1))


def test_samples_do_not_depend_on_their_batch(model):
    some = prompts()
    together = model.sample(seeds(B), some)
    assert len({tuple(row) for row in together.tolist()}) > 1
    for b in range(B):
        alone = model.sample(seeds(1, b), some.take(slice(b, b + 1)))
        assert torch.equal(alone[0], together[b])


def test_padding_of_a_prompt_changes_nothing_and_an_empty_one_is_none(model):
    some = prompts(1)
    pad = torch.nn.functional.pad
    wider = Prompts(pad(some.ids, (0, 3)), pad(some.present, (0, 3)), pad(some.positions, (0, 3), value=9))
    one, two = (nats(model, Batch(texts(), prompts=p)) for p in (some, wider))
    assert torch.allclose(one, two, atol=1e-9)
    plain = nats(model, Batch(texts()))
    assert not torch.isclose(one, plain).all()
    empty = Prompts.aligned(some.ids, torch.zeros(B, dtype=torch.long))
    assert torch.allclose(nats(model, Batch(texts(), prompts=empty)), plain, atol=1e-9)
    hidden = replace(Batch(texts(), prompts=some), prompted=torch.zeros(B, dtype=torch.bool))
    assert torch.allclose(nats(model, hidden), plain, atol=1e-9)


def test_several_draws_share_a_prompt(model):
    some, ids = prompts(2), texts(2)
    twice = nats(model, Batch(ids.repeat_interleave(2, 0), prompts=some))
    assert torch.allclose(twice[::2], nats(model, Batch(ids, prompts=some)), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"steps": 0}, "steps"),
        ({"generators": []}, "no generator"),
        ({"prompts": prompts()}, "generators for 4 prompts"),
    ],
)
def test_bad_arguments_are_named(writer, masked, options, cause):
    model = masked if "steps" in options else writer
    with pytest.raises(UserError, match=cause):
        model.sample(**{"generators": seeds(2)} | options)


def test_prompts_need_a_model_that_was_trained_with_them():
    for cls in BASELINES.values():
        with pytest.raises(UserError, match="without prompts"):
            cls(**SHAPE | {"max_prompt_length": 0}).sample(seeds(B), prompts())


# --------------------------------------------------------------------------------------------- in a folder


@pytest.fixture(params=list(BASELINES))
def folder(request, tmp_path, tokenizer):
    model = lively(BASELINES[request.param](len(tokenizer), width=16, depth=1, heads=2, max_length=6))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text("{}")
    return tmp_path, request.param, model


def test_saving_and_loading_keep_every_bit(folder):
    path, kind, model = folder
    assert baselines.kind(path) == kind
    again, tokenizer = baselines.load(path)
    assert type(again) is BASELINES[kind]
    assert torch.equal(again.sample(seeds(3)), model.sample(seeds(3)))
    assert len(tokenizer) == model.config.vocab_size
    assert not [p for p in path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_a_pipeline_is_no_baseline_nor_the_other_way_round(folder, pipe, tmp_path):
    path, kind, _ = folder
    with pytest.raises(UserError, match=f"the {kind} model in .* is a baseline, for embdiff eval --judge"):
        pipeline.load(str(path))
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match="holds a diffusion pipeline, no baseline"):
        baselines.load(tmp_path / "pipe")
    assert baselines.kind(tmp_path / "pipe") is None


def damage(path, what: str) -> None:
    config, weights = path / "model" / "config.json", next((path / "model").glob("*.safetensors"))
    if what == "config":
        config.write_text("{")
    elif what == "class":
        config.write_text('{"_class_name": "Denoiser"}')
    elif what == "weights":
        weights.write_bytes(weights.read_bytes()[:300])
    elif what == "no weights":
        weights.unlink()
    elif what == "tokenizer":
        from embdiff.vocabulary import train_word

        train_word(["other words entirely"], min_count=1).save_pretrained(path / "tokenizer")


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("config", "damaged"),
        ("class", "damaged or of another kind"),
        ("weights", "damaged"),
        ("no weights", "damaged"),
        ("tokenizer", "no pair"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder, what, cause):
    path, _, _ = folder
    damage(path, what)
    with pytest.raises(UserError, match=cause) as caught:
        baselines.load(path)
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        baselines.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no baseline"):
        baselines.load(str(tmp_path))
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        baselines.load(tmp_path)
