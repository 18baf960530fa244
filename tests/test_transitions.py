"""The chain against sums and maxima over all texts, and what rounding makes of it."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import TextDiffusionPipeline, losses, ops
from embdiff.batches import Batch
from embdiff.denoiser import Denoiser
from embdiff.guidance import Length, Lexical, NoRepeatNgram, TopK
from embdiff.guidance.base import Run
from embdiff.pipeline import load
from embdiff.prediction import Changes, Predictor, Seen
from embdiff.transitions import Transitions, chain_logsumexp

shapes = st.tuples(st.integers(1, 5), st.integers(2, 4), st.integers(0, 2**16))


def chain(L, V, seed, candidates=32):
    """Transitions with random scores, and logits [2, L, V]."""
    torch.manual_seed(seed)
    transitions = Transitions(V, 3, candidates)
    torch.nn.init.normal_(transitions.right)
    return transitions, 2 * torch.randn(2, L, V)


def score(transitions, logits, text):
    """The score of a text [L] under each row of logits, [2]."""
    total = sum(logits[:, position, token] for position, token in enumerate(text))
    return total + sum(transitions.left[a] @ transitions.right[b] for a, b in pairwise(text))


@given(shapes)
def test_probabilities_of_all_texts_add_up_to_one(shape):
    L, V, seed = shape
    transitions, logits = chain(L, V, seed)
    texts = torch.tensor(list(product(range(V), repeat=L)))
    nats = [transitions.nats(logits, text.expand(2, L)) * L for text in texts]
    assert torch.allclose(torch.stack(nats).neg().exp().sum(0), torch.ones(2), atol=1e-4)


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
    assert torch.allclose(transitions.nats(logits, ids), alone, atol=1e-5)
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
    nats = transitions.nats(logits, worst)
    assert nats.isfinite().all()
    assert (nats > transitions.nats(logits, logits.argmax(-1))).all()


def test_given_positions_cost_nothing_and_the_denoiser_is_left_alone():
    torch.manual_seed(0)
    model = Denoiser(30, dim=8, width=32, depth=1, heads=2, max_length=6, transition_rank=4)
    batch = Batch(torch.randint(30, (3, 6)), torch.ones(3, 6, dtype=torch.bool))
    features = torch.randn(3, 6, 40)
    assert losses.transition_loss(model, features, batch, torch.tensor([0, 2])).abs().max() < 1e-3
    losses.transition_loss(model, features, Batch(batch.ids), torch.tensor([1])).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"transitions.left", "transitions.right"}


@pytest.fixture
def chained(pipe):
    """A pipeline whose denoiser has transitions that matter."""
    config = {name: value for name, value in pipe.denoiser.config.items() if name[0] != "_"}
    denoiser = Denoiser(**config | {"transition_rank": 4})
    denoiser.load_state_dict(pipe.denoiser.state_dict(), strict=False)
    torch.nn.init.normal_(denoiser.transitions.right, std=10)
    return TextDiffusionPipeline(denoiser.eval(), pipe.tokenizer, pipe.scheduler)


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
    kept = (chained.tokenizer.pad_token_id, chained.tokenizer.eos_token_id)
    predictor = Predictor(Run(chained.denoiser, chained.tokenizer, 2, 6), kept=kept, temperature=0.5)
    features = torch.randn(2 * 6, chained.denoiser.output_weight().shape[1])
    rows = torch.tensor([0, 1, 2, 6, 7])
    predictor.seen = Seen(features[rows], rows, Changes([], []))
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
    kept = (chained.tokenizer.pad_token_id, chained.tokenizer.eos_token_id)
    module = Lexical(["dog"], ["the"])
    predictor = Predictor(run, [module], kept=kept, temperature=0.5)
    z = torch.randn(4, 8, chained.denoiser.dim)
    alone = predictor.round(z)
    predictor.seen = Seen(torch.randn(4, 8, chained.denoiser.output_weight().shape[1]), None, Changes([], []))
    found = predictor.round(z)
    classes = predictor.automaton.class_of_tokens(len(chained.tokenizer), predictor.kept_ids.flip(0))
    assert not torch.equal(found, alone)
    assert torch.equal(classes[found], classes[alone])
    assert (classes[alone] >= 0).all()


def test_vetoes_and_changed_latents_are_rounded_without_a_chain(chained, pipe):
    for options in (
        {"guidance": [NoRepeatNgram(1)]},
        {"callback_on_step_end": lambda pipe, step, t, state: {"latents": state["latents"]}},
    ):
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
