"""Classifier guidance: what is learnt, what its gradient is, and what a model keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from embdiff import TextDiffusionPipeline
from embdiff.batches import encode
from embdiff.classification import ClassifierConfig, heads, levels, train_classifier
from embdiff.cli import app
from embdiff.data import Example
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.guidance import ClassifierGuidance, Lexical, Toxicity
from embdiff.guidance.base import Run
from embdiff.guidance.classifier import NoisyClassifier, classifier_of, slope
from embdiff.noise import GumbelSchedule
from embdiff.schedulers import RenoiseScheduler
from tests.conftest import WORDS, lively, sentences


def examples(count=2000):
    """Texts labelled by whether they have a cat."""
    return [Example(text, "cat" if "cat" in text.split() else "none") for text in sentences(count)]


CONFIG = ClassifierConfig(max_steps=250, width=64, depth=1)


@pytest.fixture
def cats(pipe):
    """A classifier of cats, with how often it is right; every test's model has the same space, so it is learnt once."""
    if not LEARNT:
        LEARNT.append(train_classifier(pipe, examples(), CONFIG))
    return LEARNT[0]


LEARNT = []


def test_it_learns_what_low_noise_shows_and_guesses_at_high_noise(pipe, cats):
    classifier, found = cats
    assert found[0].right > found[0].guess + 0.05
    assert found[-1].right == pytest.approx(found[-1].guess, abs=0.03)
    assert set(classifier.config.labels) == {"cat", "none"}
    first, again = (train_classifier(pipe, examples(100), ClassifierConfig(max_steps=3))[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_it_finds_one_word_in_a_long_text(tokenizer):
    denoiser = lively(Denoiser(len(tokenizer), dim=16, width=16, depth=1, heads=1, max_length=64))
    schedule = GumbelSchedule.initial(16, len(tokenizer))
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler(noise_schedule=schedule.config()))
    generator = np.random.default_rng(0)
    others = [word for word in WORDS if word != "cat"]
    texts = [list(generator.choice(others, 60)) for _ in range(2400)]
    for text in texts[::2]:
        text[generator.integers(60)] = "cat"
    labelled = [Example(" ".join(text), "cat" if "cat" in text else "none") for text in texts]
    classifier, _ = train_classifier(pipe, labelled[400:], ClassifierConfig(max_steps=300, width=32, depth=1))
    ids = encode([Example(example.text) for example in labelled[:400]], tokenizer, 64).batch(np.arange(400)).ids
    with torch.no_grad():
        logits = classifier(denoiser.space.embed(ids), torch.full((400,), -3.0))
    named = [classifier.config.labels[i] for i in logits.argmax(1)]
    assert np.mean([name == example.prompt for name, example in zip(named, labelled, strict=False)]) > 0.95


@given(st.integers(1, 80), st.integers(0, 99))
def test_half_of_the_noise_levels_show_something(count, seed):
    schedule = GumbelSchedule.initial(16, 50)
    low, median, high = schedule.gamma(np.array([0.0, 0.5, 1.0]))
    gamma = levels(schedule, count, np.random.default_rng(seed))
    assert len(gamma) == count
    assert ((low <= gamma) & (gamma <= high)).all()
    assert (gamma <= median).sum() >= count // 2


def test_guidance_makes_labels_likelier_and_rarer(pipe, cats):
    pipe.classifiers["cats"], _ = cats

    def share(*guidance):
        generator = torch.Generator().manual_seed(0)
        out = pipe(num_samples=40, num_inference_steps=6, temperature=1.0, generator=generator, guidance=guidance)
        x = pipe.denoiser.space.embed(out.sequences)
        with torch.no_grad():
            logits = pipe.classifiers["cats"](x, torch.full((40,), -3.0))
        return float(logits.softmax(-1)[:, list(pipe.classifiers["cats"].config.labels).index("cat")].mean())

    towards, away = (ClassifierGuidance("cat", "cats", against, strength=8.0) for against in (False, True))
    assert share(towards) > share() + 0.2
    assert share(away) < share() + 1e-3
    assert share(ClassifierGuidance("cat", "cats", strength=0.0)) == share()
    outside = ClassifierGuidance("cat", "cats", strength=8.0, min_gamma=50.0)
    assert share(outside) == share()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("against", [False, True])
def test_the_slope_is_that_of_the_log_probability(several, against):
    classifier = NoisyClassifier(4, ["a", "b", "c"], several, width=16, depth=1, heads=2).double()
    for p in classifier.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    found = slope(classifier, "b", against)(z, 0.7).double()

    def value(z):
        logits = classifier(z, torch.full((2,), 0.7, dtype=torch.float64))
        p = logits.sigmoid()[:, 1] if several else logits.softmax(-1)[:, 1]
        return (1 - p if against else p).log().sum().item()

    step = 1e-4
    for index in ((0, 0, 0), (1, 4, 3)):
        bump = torch.zeros_like(z)
        bump[index] = step
        assert found[index].item() == pytest.approx(
            (value(z + bump) - value(z - bump)) / (2 * step), rel=1e-2, abs=1e-4
        )


@given(length=st.integers(1, 9), patch=st.integers(1, 4))
def test_patches_are_neighbours_side_by_side(length, patch):
    classifier = NoisyClassifier(3, ["a", "b"], width=16, depth=1, heads=2, patch=patch)
    z = torch.randn(2, length, 3)
    found = classifier.patches(z)
    assert found.shape == (2, -(-length // patch), 3 * patch)
    assert torch.equal(found.reshape(2, -1, 3)[:, :length], z)
    assert not found.reshape(2, -1, 3)[:, length:].any()
    (gradient,) = torch.autograd.grad(classifier(z.requires_grad_(), torch.ones(2))[:, 0].sum(), z)
    assert gradient.shape == z.shape


def test_the_slope_does_not_mind_inference_mode(pipe, cats):
    classifier, _ = cats
    pipe.classifiers["cats"] = classifier
    z = torch.randn(2, 5, pipe.denoiser.dim)
    outside = slope(classifier, "cat", False)(z, 0.7)
    guidance = ClassifierGuidance("cat", "cats", strength=5.0)

    def text():
        return pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), guidance=[guidance]).texts

    plain = text()
    with torch.inference_mode():
        assert torch.equal(slope(classifier, "cat", False)(z.clone(), 0.7), outside)
        assert text() == plain


def test_the_classifier_guides_in_the_precision_of_the_denoiser(pipe, cats):
    pipe.classifiers["cats"] = classifier = cats[0]
    z, run = (
        torch.randn(2, 5, pipe.denoiser.dim),
        Run(pipe.denoiser, pipe.tokenizer, 2, 5, classifiers=pipe.classifiers),
    )
    exact = slope(classifier_of(run, "cats"), "cat", False)(z, 0.7)
    pipe.denoiser.to(torch.bfloat16)
    guide = classifier_of(run, "cats")
    assert {p.dtype for p in guide.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert torch.cosine_similarity(slope(guide, "cat", False)(z, 0.7).flatten(), exact.flatten(), dim=0) > 0.99


def test_classifiers_are_saved_and_loaded_with_the_model(pipe, cats, tmp_path):
    pipe.classifiers["cats"], _ = cats
    pipe.save_pretrained(tmp_path)
    again = TextDiffusionPipeline.from_pretrained(tmp_path)
    assert list(again.classifiers) == ["cats"]
    for one, other in zip(pipe.classifiers["cats"].parameters(), again.classifiers["cats"].parameters(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        again.denoiser.space.weight.normal_()
    with pytest.raises(UserError, match="another embedding space"):
        again(guidance=[ClassifierGuidance("cat", "cats")], num_inference_steps=1)


def test_the_command_trains_stores_and_refuses(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    data = tmp_path / "labels.jsonl"
    data.write_text("\n".join(json.dumps({"text": e.text, "label": e.prompt}) for e in examples(120)))
    arguments = ["train-classifier", str(data), "--label-column", "label", "--model", str(tmp_path / "model"),
                 "--name", "cats", "--max-steps", "3", "--width", "64"]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "stored in" in result.stdout
    texts = CliRunner().invoke(
        app, ["sample", str(tmp_path / "model"), "--steps", "2", "--guidance", "classifier:classifier=cats,label=cat"],
        catch_exceptions=False,
    )  # fmt: skip
    assert texts.exit_code == 0
    with pytest.raises(UserError, match="already has"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        ([Example("a cat", None)] * 40, "no label"),
        ([Example(text, "one") for text in sentences(40)], "1 label"),
        ([Example(text, text) for text in sentences(40)], "right one"),
    ],
)
def test_data_without_labels_to_tell_apart_is_refused(pipe, texts, cause):
    with pytest.raises(UserError, match=cause):
        train_classifier(pipe, texts, ClassifierConfig(max_steps=1))
    if texts[0].prompt is None:
        with pytest.raises(UserError, match="name the column"):
            train_classifier(pipe, texts, ClassifierConfig(max_steps=1, several=True))


def test_texts_with_several_labels(pipe):
    several = [Example(e.text, "|".join(w for w in ("cat", "dog") if w in e.text)) for e in examples()]
    classifier, found = train_classifier(
        pipe, [Example(e.text, e.prompt or None) for e in several], replace(CONFIG, several=True)
    )
    assert classifier.config.several
    assert found[0].right > found[0].guess


@pytest.mark.parametrize(
    ("guidance", "cause"),
    [
        (lambda: ClassifierGuidance("cat", "cats"), "has no classifier 'cats'"),
        (lambda: Toxicity(), "nothing to go by"),
        (lambda: Toxicity(lexicon="missing.txt"), "cannot read lexicon"),
        (lambda: ClassifierGuidance("cat", strength=-1.0), "out of range"),
        (lambda: Toxicity(strength=float("nan")), "out of range"),
    ],
)
def test_what_a_model_lacks_is_named(pipe, guidance, cause):
    with pytest.raises(UserError, match=cause):
        pipe(guidance=[guidance()], num_inference_steps=1)


def test_toxicity_adds_up_what_is_given(pipe, cats, tmp_path):
    (tmp_path / "words.txt").write_text("# colours\nred\nblue cat\n\n")
    pipe.classifiers["toxicity"], _ = cats
    generator = torch.Generator().manual_seed(0)
    module = Toxicity(strength=5.0, label="cat", lexicon=str(tmp_path / "words.txt"), negative="the cat", max_gamma=4.0)
    texts = pipe("a dog", num_samples=20, num_inference_steps=6, generator=generator, guidance=[module]).texts
    assert not any("red" in text.split() or "blue cat" in text for text in texts)
    plain = pipe("a dog", num_samples=20, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).texts
    assert texts != plain


def test_a_lexicon_is_not_shown_in_errors(pipe, tmp_path):
    (tmp_path / "words.txt").write_text("secret\ncat\n")
    with pytest.raises(UserError) as error:
        pipe(guidance=[Toxicity(lexicon=str(tmp_path / "words.txt")), Lexical(include=["cat"])])
    assert "secret" not in str(error.value)


@given(st.integers(1, 400).map(lambda n: 2 * n))
def test_heads_share_out_any_even_width(width):
    n = heads(width)
    assert width % n == 0
    assert width // n % 2 == 0  # rotary positions turn pairs
    assert n == 1 or width // n >= 64
