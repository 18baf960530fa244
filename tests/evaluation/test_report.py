"""A whole evaluation: complete, repeatable, fair between samples and real texts."""

import json

import diffusers
import pytest
import torch

from embdiff.data import Example
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.evaluation.judges import NGramJudge, cross_entropy
from embdiff.evaluation.report import Protocol, evaluate, reference_figures, text_figures
from embdiff.guidance import ClassifierFreeGuidance as Guidance
from embdiff.schedulers import DDIMScheduler
from tests.conftest import sentences

JUDGES = [NGramJudge(sentences(100), order=3), NGramJudge(sentences(100), order=1)]


@pytest.fixture
def pairs():
    prompts = ["the cat", "a dog", "the red house", "a tree", "the blue dog", "a cat", "or", "the small tree"]
    return [Example(text, prompts[i % 8]) for i, text in enumerate(sentences(20, seed=2))]


def without_time(figures):
    return json.loads(json.dumps(figures | {"run": figures["run"] | {"seconds": 0}}))


def test_the_same_call_gives_the_same_figures_whatever_the_batch(pipe, pairs):
    train = sentences(60, seed=1)
    runs = []
    for batch_size in (50, 3):
        protocol = Protocol(samples=9, steps=3, batch_size=batch_size, bound_texts=0)
        runs.append(without_time(evaluate(pipe, [Example(e.text) for e in pairs], JUDGES, protocol, train=train)))
        runs[-1]["protocol"].pop("batch_size")
    assert runs[0] == runs[1]


def test_a_report_has_every_part(pipe, pairs):
    told: list[tuple[str, int, int]] = []
    protocol = Protocol(samples=8, steps=2, mbr=3, bound_texts=7, flow_texts=2, flow_tolerance=0.1, levels=2)
    found = evaluate(
        pipe, pairs, JUDGES, protocol, train=sentences(60), advance=lambda *progress: told.append(progress)
    )
    assert found["likelihood"]["bound"]["texts"] == 7
    assert found["likelihood"]["flow"]["texts"] == 2
    assert set(found["samples"]["cross_entropy"]) == {"3-gram", "1-gram"}
    assert set(found["samples"]) == set(found["real"])
    assert found["samples"]["texts"] == found["real"]["texts"] == 8  # one for each prompt
    assert set(found["conditional"]) == {"one sample a prompt", "mbr of 3"}
    assert all(each["mbr"] for each in found["texts"])
    assert set(found["samples"]["standard_errors"]) < set(found["samples"])
    assert found["conditional"]["one sample a prompt"]["references"] == 20
    assert {"embdiff", "torch", "python"} <= set(found["run"]["versions"])
    assert found["run"]["dtype"] == "float32"
    assert found["run"]["scheduler"]["name"] == "RenoiseScheduler"
    assert [text["seed"] for text in found["texts"]] == list(range(8))
    assert {what: done for what, done, _ in told} == {what: total for what, _, total in told}
    assert {what for what, _, _ in told} == {"bound", "flow", "samples", "candidates"}


def test_real_texts_of_the_training_set_are_nearer_than_noise(tokenizer):
    real = sentences(200, seed=3)
    noise = [" ".join(reversed(text.split())) for text in sentences(100, seed=4)]
    near, far = (text_figures(texts, real, JUDGES) for texts in (sentences(100, seed=4), noise))
    assert near["reverse_cross_entropy"] < far["reverse_cross_entropy"]
    assert near["cross_entropy"]["3-gram"] < far["cross_entropy"]["3-gram"]
    assert near["unigram_entropy"] == pytest.approx(far["unigram_entropy"])
    longer = [f"{text} {text}" for text in sentences(100, seed=4)]
    assert text_figures(longer, real, JUDGES)["length_distance"] > near["length_distance"] + 3


def test_judges_see_words_that_the_model_cannot_write_as_unk(pipe, pairs):
    strange = [Example(f"zebra {e.text}") for e in pairs]
    found = evaluate(pipe, strange, JUDGES[:1], Protocol(samples=20, steps=2, bound_texts=0))
    known = [f"<unk> {e.text}" for e in pairs]
    assert found["real"]["cross_entropy"]["3-gram"] == pytest.approx(cross_entropy(JUDGES[0], known), abs=1e-4)
    assert found["real"]["mauve_style"] is None  # there are no other real texts to say what is near


def test_references_that_are_the_texts_score_full_marks():
    texts = sentences(9)
    found = reference_figures(texts, [[text, "something else"] for text in texts])
    assert found["bleu"] == found["chrf"] == found["rouge_1"] == found["rouge_l"] == 100
    shout = [text.upper() for text in texts]
    assert reference_figures(shout, [[text] for text in texts])["bleu"] < 100
    assert reference_figures(shout, [[text] for text in texts], lowercase=True)["bleu"] == pytest.approx(100)


def test_references_of_their_own_take_the_place_of_the_texts(pipe, pairs):
    own = {prompt: ["no such words"] for prompt in {e.prompt for e in pairs}}
    protocol = Protocol(samples=20, steps=2, bound_texts=0)
    assert evaluate(pipe, pairs, [], protocol, references=own)["conditional"]["one sample a prompt"]["bleu"] == 0
    own.pop("a dog")
    with pytest.raises(UserError, match="1 of 8 prompts have no reference, the first is 'a dog'"):
        evaluate(pipe, pairs, [], protocol, references=own)
    alone = [Example(e.text) for e in pairs]
    with pytest.raises(UserError, match="references are for prompts"):
        evaluate(pipe, alone, [], protocol, references=own)
    with pytest.raises(UserError, match="mbr 2 is for prompts"):
        evaluate(pipe, alone, [], Protocol(samples=20, steps=2, mbr=2))
    with pytest.raises(UserError, match="references are for samples"):
        evaluate(pipe, pairs, [], Protocol(samples=0), references=own)


def test_a_bound_is_a_word_as_well_as_a_token(pipe, pairs):
    """One text is as likely by either count, and the flow has as many passes as the bound, up to two."""
    for passes, of_flow in ((1, 1), (3, 2)):
        protocol = Protocol(samples=0, passes=passes, flow_texts=2, flow_tolerance=0.5)
        found = evaluate(pipe, pairs, [], protocol)["likelihood"]
        assert (found["bound"]["passes"], found["flow"]["passes"]) == (passes, of_flow)
        for each in found.values():
            nats = each["nats_per_token"] * each["tokens"]
            assert each["nats_per_word"] * each["words"] == pytest.approx(nats, rel=1e-3)
        assert found["bound"]["words"] == sum(len(e.text.split()) + 1 for e in pairs)


def test_a_model_without_self_conditioning_is_looked_at_once(pipe, pairs, monkeypatch):
    protocol = Protocol(samples=0, flow_texts=2, flow_tolerance=0.5)
    torch.nn.init.zeros_(pipe.denoiser.embed_self_cond.weight)
    assert not pipe.denoiser.self_conditions
    found = evaluate(pipe, pairs, [], protocol)["likelihood"]
    assert {each["passes"] for each in found.values()} == {1}
    monkeypatch.setattr(Denoiser, "self_conditions", True)
    thrice = evaluate(pipe, pairs, [], protocol)["likelihood"]
    assert thrice["bound"]["passes"] == 3
    assert found["bound"]["nats_per_token"] == pytest.approx(thrice["bound"]["nats_per_token"], abs=2e-4)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"samples": 3}, "3 samples are too few"),
        ({"samples": -1}, "samples -1"),
        ({"steps": 0}, "steps 0"),
        ({"mbr": 1}, "nothing to choose from"),
        ({"levels": 3}, "even number"),
        ({"passes": 0}, "passes 0 is out of range"),
        ({"bound_texts": -3}, "bound_texts -3"),
        ({"seed": -1}, "seed -1"),
        ({"mbr": 4}, "mbr 4 chooses among samples"),
    ],
)
def test_protocols_that_measure_nothing_are_refused(pipe, pairs, settings, cause):
    with pytest.raises(UserError, match=cause):
        evaluate(pipe, pairs, JUDGES, Protocol(**({"samples": 0} | settings)))


def test_what_is_not_finite_is_null(pipe, pairs):
    figures = evaluate(pipe, pairs, [], Protocol(samples=0, bound_texts=1, options={"guidance": [Guidance(1.0)]}))
    assert figures["likelihood"]["bound"]["standard_error"] is None  # of one text
    assert figures["protocol"]["options"]["guidance"][0]["max_gamma"] is None  # no limit
    json.dumps(figures, allow_nan=False)


def test_texts_too_long_for_the_model_are_left_out_and_counted(pipe, pairs):
    long = [Example("the " * 30, "a dog")] * 4
    found = evaluate(pipe, [*pairs, *long], JUDGES, Protocol(samples=8, steps=1, bound_texts=0))
    assert found["too_long"] == 4
    assert found["real"] == evaluate(pipe, pairs, JUDGES, Protocol(samples=8, steps=1, bound_texts=0))["real"]
    with pytest.raises(UserError, match="7 texts are too few to evaluate with beside 4 longer"):
        evaluate(pipe, [*pairs[:7], *long], JUDGES, Protocol())


def test_too_few_texts_are_refused(pipe, pairs):
    with pytest.raises(UserError, match="1 different prompts are too few"):
        evaluate(pipe, [Example(e.text, "a dog") for e in pairs], JUDGES, Protocol())
    with pytest.raises(UserError, match="7 texts are too few"):
        evaluate(pipe, pairs[:7], JUDGES, Protocol())


def test_the_likelihood_is_the_models_whatever_scheduler_is_assigned(pipe, pairs):
    protocol, found = Protocol(samples=0, levels=2), list[float]()
    for scheduler in (pipe.scheduler, DDIMScheduler(noise_schedule="cosine"), diffusers.DDIMScheduler()):
        pipe.scheduler = scheduler
        found.append(evaluate(pipe, pairs, [], protocol)["likelihood"]["bound"]["nats_per_token"])
    assert found[0] == found[1] == found[2]
