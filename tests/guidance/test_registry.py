"""Guidance by name: what the command line may say, and modules of other packages."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from embdiff.errors import UserError
from embdiff.guidance import ClassifierFreeGuidance, Guidance, Length, Lexical, TopK, TopP, parse, registry
from embdiff.guidance.base import Tilt


@pytest.mark.parametrize(
    ("spec", "module"),
    [
        ("length:words=12", Length(words="12")),
        ("length:words=8-12,tokens=-20,complete=false,strength=0.5", Length("-20", "8-12", None, False, 0.5)),
        ("length:words=1|2-3", Length(words="1|2-3")),
        ("lexical:include=cheap pub|riverside, exclude=the", Lexical(["cheap pub", "riverside"], ["the"])),
        ('lexical:"include=no, thanks",ordered=yes', Lexical(["no, thanks"], ordered=True)),
        ('lexical:"include=cheap\npub"', Lexical(["cheap\npub"])),
        ("lexical:keep=0=the|5=cat", Lexical(keep={0: "the", 5: "cat"})),
        ("top-k", TopK()),
        ("top-p:p=0.5,max-gamma=4", TopP(0.5, max_gamma=4.0)),
        ("cfg:scale=2,space=logits,min_gamma=-1", ClassifierFreeGuidance(2.0, "logits", min_gamma=-1.0)),
    ],
)
def test_specs_name_modules(spec, module):
    assert parse(spec) == module


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("rhyme", "'rhyme' is unknown: choose one of autoguidance, cfg, classifier, length"),
        ("length:sentences=3", "no option 'sentences': choose among"),
        ("length:words", "no option 'words'"),
        ("length:words=1,words=2", "twice"),
        ("top-k:k=many", "'many' of guidance top-k is not of the right kind: it takes int"),
        ("length:words=3,complete=maybe", "it takes bool"),
        ("lexical:keep=the", "position=text"),
        ("top-p:p=1.5", "out of range"),
        ("length", "words=12"),
        ("lexical:include=cheap\npub", "a comma or a line break goes into quotes"),
        ("top-k:min_gamma=3,max_gamma=2", "must not be above"),
    ],
)
def test_bad_specs_are_named(spec, cause):
    with pytest.raises(UserError, match=cause) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Rhyme(Guidance):
    """What another package may add."""

    name = "rhyme"

    word: str
    nats: float = 2.0

    def parts(self, run):
        bias = torch.zeros(run.vocabulary)
        bias[[i for i, text in enumerate(run.pieces) if text and text.endswith(self.word[-2:])]] = self.nats
        yield Tilt(lambda words: words.logits + bias)


def test_other_packages_add_theirs_by_an_entry_point(monkeypatch, pipe):
    entry = EntryPoint("rhyme", f"{__name__}:Rhyme", "embdiff.guidance")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(UserError, match=r"choose one of .*length.*rhyme"):
        parse("chyme")
    module = parse("rhyme:word=house,nats=50")
    assert module == Rhyme("house", 50.0)
    texts = pipe(
        num_samples=4, num_inference_steps=3, generator=torch.Generator().manual_seed(0), guidance=[module]
    ).texts
    assert {word for text in texts for word in text.split()} == {"house"}
    with pytest.raises(UserError, match="needs word"):
        parse("rhyme")


@pytest.mark.parametrize(("value", "cause"), [("math:inf", "no subclass"), ("math:nothing", "cannot be loaded")])
def test_entry_points_that_are_no_guidance_are_refused(monkeypatch, value, cause):
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("odd", value, group)])
    with pytest.raises(UserError, match=cause):
        parse("odd:words=3")
    assert parse("length:words=3").words == "3"
