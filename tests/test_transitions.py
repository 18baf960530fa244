"""The chain against sums and maxima over all texts, and what rounding makes of it."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embdiff import losses, ops
from embdiff.batches import Batch
from embdiff.denoiser import Denoiser
from embdiff.guidance import Autoguidance, ClassifierFreeGuidance, Length, Lexical, MinP, NoRepeatNgram, TopK
from embdiff.guidance.base import Guidance, Run, Tilt
from embdiff.pipeline import load
from embdiff.prediction import Predictor
from embdiff.transitions import Transitions, chain_logsumexp

shapes = st.tuples(st.integers(1, 5), st.integers(2, 4), st.integers(0, 2**16))


def chain(L, V, seed, candidates=32):
    """Transitions with random scores, and logits [2, L, V]."""
    torch.manual_seed(seed)
    transitions = Transitions(V, 3, candidates)
    torch.nn.init.normal_(transitions.right)
    return transitions, 2 * torch.randn(2, L, V)


def nats(transitions, logits, ids):
    """-log p of texts ids [B, L] per position, among the most probable candidates."""
    top = logits.topk(transitions.candidates, -1)
    return transitions.nats(top.values, top.indices, logits.gather(-1, ids[..., None])[..., 0], ids)


def score(transitions, logits, text):
    """The score of a text [L] under each row of logits, [2]."""
    total = sum(logits[:, position, token] for position, token in enumerate(text))
    return total + sum(transitions.left[a] @ transitions.right[b] for a, b in pairwise(text))


@given(shapes)
def test_probabilities_of_all_texts_add_up_to_one(shape):
    L, V, seed = shape
    transitions, logits = chain(L, V, seed)
    texts = torch.tensor(list(product(range(V), repeat=L)))
    of_each = [nats(transitions, logits, text.expand(2, L)) * L for text in texts]
    assert torch.allclose(torch.stack(of_each).neg().exp().sum(0), torch.ones(2), atol=1e-4)


@torch.no_grad()
@given(shapes)
def test_the_best_text_is_the_best_of_all(shape):
    L, V, seed = shape
    transitions, logits = chain(L, V, seed)
    top = logits.topk(transitions.candidates, -1)
    found = transitions.best(top.values, top.indices)
    texts = list(product(range(V), repeat=L))
    scores = torch.stack([score(transitions, logits, text) for text in texts])
    for row in range(2):
        own = score(transitions, logits, found[row].tolist())[row]
        assert float(own) == pytest.approx(float(scores[:, row].max()), abs=1e-4)


@given(shapes)
def test_without_scores_of_pairs_positions_are_independent(shape):
    L, V, seed = shape
    transitions, logits = chain(L, V, seed)
    torch.nn.init.zeros_(transitions.right)
    ids = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(seed))
    alone = ops.cross_entropy_reference(logits, torch.eye(V), ids).mean(1)
    assert torch.allclose(nats(transitions, logits, ids), alone, atol=1e-5)
    top = logits.topk(transitions.candidates, -1)
    assert torch.equal(transitions.best(top.values, top.indices), logits.argmax(-1))


@given(st.integers(1, 17), st.integers(0, 2**16))
def test_products_in_rounds_are_the_recursion(L, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, pairs = (torch.randn(2, n, 3, *m, generator=generator) * 20 for n, m in ((L, ()), (L - 1, (3,))))
    total = scores[:, 0]
    for position in range(1, L):
        total = (total[..., None] + pairs[:, position - 1]).logsumexp(1) + scores[:, position]
    assert torch.allclose(chain_logsumexp(scores, pairs), total.logsumexp(-1), rtol=1e-4, atol=1e-3)


def test_a_text_that_is_no_candidate_is_charged_as_one():
    transitions, logits = chain(3, 40, 0, candidates=4)
    worst = logits.argmin(-1)
    found = nats(transitions, logits, worst)
    assert found.isfinite().all()
    assert (found > nats(transitions, logits, logits.argmax(-1))).all()


def test_given_positions_cost_nothing_and_the_denoiser_is_left_alone():
    torch.manual_seed(0)
    model = Denoiser(30, dim=8, width=32, depth=1, heads=2, max_length=6, transition_rank=4)
    batch = Batch(torch.randint(30, (3, 6)), torch.ones(3, 6, dtype=torch.bool))
    features = torch.randn(3, 6, 40)
    assert losses.transition_loss(model, features, batch, torch.tensor([0, 2])).abs().max() < 1e-3
    losses.transition_loss(model, features, Batch(batch.ids), torch.tensor([1])).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"transitions.left", "transitions.right"}


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"guidance": [TopK(3)]}])
def test_texts_rounded_as_a_chain_do_not_depend_on_their_batch(chained, pipe, options):
    prompts = ["the cat", "a dog", "the red house"]
    together = chained(prompts, num_inference_steps=3, generator=seeds(0, 1, 2), **options).texts
    assert together != pipe(prompts, num_inference_steps=3, generator=seeds(0, 1, 2), **options).texts
    for i, prompt in enumerate(prompts):
        assert chained(prompt, num_inference_steps=3, generator=seeds(i), **options).texts == [together[i]]


def test_transitions_are_saved_with_the_model(chained, tmp_path):
    chained.save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    one, two = (p(num_samples=3, num_inference_steps=3, generator=seeds(0, 1, 2)).texts for p in (chained, loaded))
    assert one == two


def test_positions_that_are_looked_at_no_more_are_padding(chained):
    """What transitions make of all positions, where those behind the text are surely padding."""
    predictor = Predictor(Run(chained.denoiser, chained.tokenizer, 2, 6), kept=chained._kept_tokens(), temperature=0.5)
    features = torch.randn(2 * 6, chained.denoiser.output_weight().shape[1])
    rows = torch.tensor([0, 1, 2, 6, 7])
    predictor.see(0.0, features[rows], rows)
    found = predictor.round(torch.zeros(2, 6, chained.denoiser.dim))
    assert (found.flatten()[[3, 4, 5, 8, 9, 10, 11]] == chained.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("guidance", [[Length(words=5)], [Length(words=(3, 6)), Lexical(["dog"], ["the", "house"])]])
@pytest.mark.parametrize("max_gamma", [math.inf, 0.0])
def test_exact_control_holds_for_a_chain(chained, guidance, max_gamma):
    """Also where it acts late, or what it asks for lies in what was taken for padding."""
    guidance = [replace(module, max_gamma=max_gamma) for module in guidance]
    options = {"num_inference_steps": 4, "guidance": guidance}
    together = chained(num_samples=6, generator=seeds(*range(6)), **options).texts
    for i, text in enumerate(together):
        words = text.split()
        assert len(words) == 5 if len(guidance) == 1 else "dog" in words
        assert len(guidance) == 1 or not {"the", "house"} & set(words)
        assert chained(generator=seeds(i), **options).texts == [text]


def test_a_chain_changes_tokens_within_their_classes_alone(chained):
    run = Run(chained.denoiser, chained.tokenizer, 4, 8)
    module = Lexical(["dog"])
    predictor = Predictor(run, [module], kept=chained._kept_tokens(), temperature=0.5)
    z = torch.randn(4, 8, chained.denoiser.dim)
    alone = predictor.round(z)
    predictor.see(0.0, torch.randn(4, 8, chained.denoiser.output_weight().shape[1]))
    found = predictor.round(z)
    classes = predictor.automaton.class_of_tokens(len(chained.tokenizer), predictor.kept_ids.flip(0))
    assert not torch.equal(found, alone)
    assert torch.equal(classes[found], classes[alone])
    assert (classes[alone] >= 0).all()


@pytest.mark.parametrize(
    "control", [[], [Length(words=5)], [Lexical(["dog", "house"])], [TopK(1)], [MinP(0.5), Length(words=5)]]
)
@pytest.mark.parametrize("skip_padding", [False, True])
def test_vetoes_hold_for_a_chain(chained, control, skip_padding):
    """No word comes twice, in as many words as were asked for, whatever the batch."""
    chained.denoiser.transitions.candidates = 5
    options = {"num_inference_steps": 4, "guidance": [NoRepeatNgram(1), *control], "skip_padding": skip_padding}
    together = chained(num_samples=6, generator=seeds(*range(6)), **options).texts
    free = chained(num_samples=6, generator=seeds(*range(6)), **options | {"guidance": control}).texts
    for i, text in enumerate(together):
        words = text.split()
        assert len(set(words)) == len(words)
        assert chained(generator=seeds(i), **options).texts == [text]
        assert Length(words=5) not in control or len(words) == 5
        assert Lexical(["dog", "house"]) not in control or {"dog", "house"} <= set(words)
    assert together != free


@pytest.mark.parametrize("control", [[], [NoRepeatNgram(2)], [Length(words=5)]])
def test_a_tilt_of_all_words_alike_changes_nothing(chained, control):
    """Words stay as probable beside padding and the end of text."""

    class Louder(Guidance):
        def parts(self, run):
            return [Tilt(lambda words: words.logits + 100.0)]

    options = {"num_samples": 6, "num_inference_steps": 4, "generator": seeds(*range(6))}
    alone = chained(guidance=control, **options).texts
    options["generator"] = seeds(*range(6))
    assert chained(guidance=[*control, Louder()], **options).texts == alone


def test_lengths_drawn_in_the_last_step_are_kept(chained, pipe):
    """In one step they are drawn there, and a chain knows nothing of them."""
    one, two = (p(num_samples=6, num_inference_steps=1, generator=seeds(*range(6))).texts for p in (chained, pipe))
    assert one == two


@torch.no_grad()
@given(
    seed=st.integers(0, 2**16),
    looked_at=st.sampled_from([None, [0, 1, 2, 3, 4, 8, 9, 10]]),
    candidates=st.sampled_from([1, 5, 32]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_chain_over_all_words_is_the_one_over_candidates(chained, seed, looked_at, candidates):
    """What is looked for after a veto, as long as it has marked nothing."""
    torch.manual_seed(seed)
    chained.denoiser.transitions.candidates = min(candidates, len(chained.tokenizer))
    predictor = Predictor(Run(chained.denoiser, chained.tokenizer, 2, 8), kept=chained._kept_tokens(), temperature=0.5)
    rows = None if looked_at is None else torch.tensor(looked_at)
    features = 10 * torch.randn(16, chained.denoiser.output_weight().shape[1])
    z, pull = torch.randn(2, 2, 8, chained.denoiser.dim)
    predictor.see(0.0, features if rows is None else features[rows], rows, pull=pull)
    samples = torch.arange(2)
    assert torch.equal(predictor.round(z), predictor._nearest_by(predictor._scores(z, samples), samples))


@torch.no_grad()
def test_gradients_pull_words_of_a_chain(chained):
    """To those nearest to where they point."""
    predictor = Predictor(Run(chained.denoiser, chained.tokenizer, 2, 8))
    features = torch.randn(2, 8, chained.denoiser.output_weight().shape[1])
    z = torch.zeros(2, 8, chained.denoiser.dim)
    predictor.see(0.0, features)
    alone = predictor.round(z)
    predictor.see(0.0, features, pull=torch.zeros_like(z))
    assert torch.equal(predictor.round(z), alone)
    wanted = torch.randint(len(chained.tokenizer), (2, 8))
    predictor.see(0.0, features, pull=1e4 * predictor.table[wanted])
    assert torch.equal(predictor.round(z), wanted)
    assert not torch.equal(alone, wanted)


@pytest.mark.parametrize(
    ("guidance", "steps"),
    [
        ([], 3),
        ([ClassifierFreeGuidance(2.0, "logits")], 3),
        ([ClassifierFreeGuidance(2.0, "x0"), NoRepeatNgram(1), TopK(5)], 3),
        ([Autoguidance(2.0)], 3),
        ([ClassifierFreeGuidance(2.0, radius=0.5)], 4),
        ([Lexical(["dog"])], 4),
    ],
)
@pytest.mark.parametrize("skip_padding", [False, True])
def test_a_chain_asks_for_no_mean_in_the_last_step(chained, monkeypatch, guidance, steps, skip_padding):
    """Of what nothing but the text is told, unless a constraint or a branch needs it."""
    steps_with_means = set[float]()
    x0 = Predictor._x0
    monkeypatch.setattr(Predictor, "_x0", lambda *args: steps_with_means.add(args[-1]) or x0(*args))
    prompts = ["the cat", "a dog", "the red house"]
    options = {"num_inference_steps": 4, "guidance": guidance, "skip_padding": skip_padding}
    texts = chained(prompts, generator=seeds(0, 1, 2), **options).texts
    assert len(steps_with_means) == steps
    watched = {"callback_on_step_end": lambda *args: None}
    assert chained(prompts, generator=seeds(0, 1, 2), **options, **watched).texts == texts
    assert len(steps_with_means) == 4


def test_changed_latents_are_rounded_without_a_chain(chained, pipe):
    options = {"callback_on_step_end": lambda pipe, step, t, state: {"latents": state["latents"]}}
    one, two = (p(num_samples=3, num_inference_steps=3, generator=seeds(0, 1, 2), **options).texts
                for p in (chained, pipe))  # fmt: skip
    assert one == two


def test_no_rows_make_gradients_of_zero():
    """As all processes share gradients, also those without a row at low noise."""
    model = Denoiser(30, dim=8, width=32, depth=1, heads=2, max_length=6, transition_rank=4)
    batch = Batch(torch.randint(30, (3, 6)))
    nothing = losses.transition_loss(model, torch.randn(3, 6, 40), batch, torch.zeros(0, dtype=torch.long))
    nothing.sum().backward()
    assert all((p.grad == 0).all() for p in model.transitions.parameters())
