"""The pipeline: reproducible, independent of its batch, at home in diffusers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import DDIMScheduler, TextDiffusionPipeline, UserError, ops
from embdiff.denoiser import Denoiser
from embdiff.guidance import ClassifierFreeGuidance
from embdiff.guidance.base import Run
from embdiff.pipeline import load
from embdiff.prediction import Predictor
from embdiff.schedulers import SCHEDULERS, to_diffusers, with_solver


def seeds(*values):
    return [torch.Generator().manual_seed(v) for v in values]


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_same_seeds_give_the_same_texts_in_every_batch(pipe, name, scale):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    prompts = [f"the {w} ." for w in ("cat", "dog", "house", "tree", "red", "blue", "small")]
    together = pipe(prompts, guidance_scale=scale, num_inference_steps=6, generator=seeds(*range(7)))
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, guidance_scale=scale, num_inference_steps=6, generator=seeds(i))
        assert alone.texts[0] == together.texts[i]
        assert torch.equal(alone.sequences[0], together.sequences[i])


def test_one_generator_reproduces_a_run_bit_for_bit(pipe):
    one, two = (
        pipe(
            num_samples=3,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )
    assert torch.equal(one.latents, two.latents)
    other = pipe(num_samples=3, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(6))
    assert not torch.equal(one.latents, other.latents)


def test_samples_come_in_the_order_of_their_prompts(pipe):
    pairs = pipe(["the cat .", "a dog"], num_samples=2, num_inference_steps=3, generator=seeds(0, 1, 2, 3)).texts
    assert pairs[2:] == pipe("a dog", num_samples=2, num_inference_steps=3, generator=seeds(2, 3)).texts


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_levels_of_a_run_are_known_without_reading_the_device(pipe, name):
    scheduler = with_solver(pipe.scheduler, name)
    scheduler.set_timesteps(4, device="meta")  # which nothing can be read from
    assert len(scheduler.gammas.tolist()) == len(scheduler.timesteps)
    assert scheduler.timesteps.is_meta


def test_a_negative_prompt_matters_only_with_guidance(pipe):
    def text(**options):
        return pipe("the cat .", num_inference_steps=4, generator=seeds(0), output_type="latent", **options).latents

    assert torch.equal(text(), text(negative_prompt="a dog"))
    assert not torch.equal(text(guidance_scale=3.0), text(guidance_scale=3.0, negative_prompt="a dog"))


def test_latents_that_a_callback_gives_are_guided_anew(pipe):
    def drawn(every, **more):
        guidance = [ClassifierFreeGuidance(3.0, every=every)]
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "the cat", num_inference_steps=4, guidance=guidance, generator=generator, output_type="latent", **more
        )

    always = drawn(1).latents
    assert not torch.allclose(drawn(9).latents, always, atol=1e-3)
    same = drawn(9, callback_on_step_end=lambda pipe, i, t, seen: {"latents": seen["latents"]}).latents
    assert torch.equal(same, always)


def test_callbacks_see_every_step_and_may_change_the_latents(pipe):
    seen = []

    def watch(pipe, step, timestep, state):
        seen.append((step, float(timestep)))
        assert state["x0"].shape == state["latents"].shape == (1, 12, 16)
        return {"latents": torch.ones_like(state["latents"])}

    out = pipe(num_inference_steps=3, callback_on_step_end=watch, output_type="latent")
    assert [s for s, _ in seen] == [0, 1, 2]
    assert torch.equal(out.latents, torch.ones(1, 12, 16))


def predictor_of(denoiser, **options):
    return Predictor(Run(denoiser, None, samples=1, length=4), kept=(0, 2), **options)


def test_lengths_are_drawn_as_the_posterior_has_them(pipe):
    """Each position is padding for the share of samples that its probability says, and words lie before the end."""
    count = 4000
    predictor = predictor_of(pipe.denoiser, temperature=0.7, quantile=(torch.arange(count) + 0.5) / count)
    table = pipe.denoiser.space.table()
    probabilities = torch.tensor([[0.0, 0.1], [0.1, 0.3], [0.4, 0.5], [0.9, 0.1]])  # padding, end of text
    word = table[7]
    x0 = predictor._x0(ops.Posterior(word.expand(count, 4, -1), probabilities.expand(count, -1, -1)), 0.0)
    ids = pipe.denoiser.space.round(x0)
    assert torch.allclose((ids == 0).float().mean(0), probabilities[:, 0], atol=1e-3)
    assert torch.allclose((ids == 2).float().mean(0), probabilities[:, 1], atol=1e-3)
    assert torch.all((ids == 2).sum(1) == 1)  # exactly one end, for these are the probabilities of one length
    after = (ids == 2).cumsum(1) - (ids == 2).long()
    assert torch.equal(after == 1, ids == 0)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-3, 3).filter(bool))
def test_the_length_bias_divides_the_odds_of_ending(pad, share, bias):
    denoiser = Denoiser(9, dim=8, width=8, depth=1, heads=2, condition_width=8)
    predictor = predictor_of(denoiser, length_bias=bias)
    kept = torch.tensor([[[pad * share, pad * (1 - share)]]], dtype=torch.float32)
    table = torch.eye(9, 8)
    table[8] = 0
    predictor.table, predictor.kept_embeddings = table, table[[0, 2]]
    x0 = predictor._x0(ops.Posterior(table[7].expand(1, 1, -1), kept), 0.0)[0, 0]
    p = pad * math.exp(-bias) / (pad * math.exp(-bias) + 1 - pad)
    assert x0[0].item() == pytest.approx(p * share, abs=1e-5)
    assert x0[2].item() == pytest.approx(p * (1 - share), abs=1e-5)
    assert x0.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_without_drawn_lengths_x0_is_the_posterior_mean(pipe):
    z, self_cond = torch.randn(2, 3, 12, 16)
    predictor = predictor_of(pipe.denoiser)
    h = pipe.denoiser(z, torch.full((3,), 0.5), None, self_cond)
    assert torch.allclose(predictor(z, 0.5, self_cond), pipe.denoiser.x0(h), atol=1e-5)


@pytest.mark.parametrize("name", ["renoise", "dpm++3m-sde", "unipc"])
def test_noise_scaled_to_nothing_leaves_one_text_for_each_prompt(pipe, name):
    pipe.scheduler = with_solver(pipe.scheduler, name)
    options = {"num_inference_steps": 3, "num_samples": 3, "draw_length": False, "output_type": "latent"}

    def latents(scale: float) -> torch.Tensor:
        return pipe(["a cat", "tree"], noise_scale=scale, generator=seeds(*range(6)), **options).latents

    first, second = latents(0.0).split(3)
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-5)
    assert not torch.allclose(first, second)
    base = torch.cat([first, second])
    near, far = ((latents(scale) - base).norm() for scale in (1e-4, 1.0))
    assert 0 < near < 0.1 * far


def test_noise_that_a_scheduler_draws_itself_is_not_scaled(pipe):
    pipe.scheduler = to_diffusers(DDIMScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(UserError, match="DDIMScheduler draws its own noise"):
        pipe(noise_scale=0.5)


def test_output_types(pipe):
    texts, sequences = pipe(num_inference_steps=2, generator=seeds(0), return_dict=False)
    assert sequences.shape == (1, 12)
    assert pipe.decode(sequences) == texts
    assert pipe(num_inference_steps=2, generator=seeds(0), output_type="seq").texts == []
    assert pipe(num_inference_steps=2, max_length=5).sequences.shape == (1, 5)


def test_saving_and_loading_keep_every_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    again = TextDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert dict(again.scheduler.config)["noise_schedule"] == dict(pipe.scheduler.config)["noise_schedule"]
    options = {"num_inference_steps": 4, "num_samples": 2, "output_type": "latent"}
    assert torch.equal(pipe(generator=seeds(1, 2), **options).latents, again(generator=seeds(1, 2), **options).latents)
    again.scheduler = DDIMScheduler.from_config(again.scheduler.config)
    assert again.scheduler.noise_schedule == pipe.scheduler.noise_schedule


def test_what_is_saved_does_not_tell_where_it_was_loaded_from(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "private")
    TextDiffusionPipeline.from_pretrained(tmp_path / "private").save_pretrained(tmp_path / "published")
    assert not [p for p in (tmp_path / "published").rglob("*.json") if "private" in p.read_text()]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"num_inference_steps": 0}, "steps"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"temperature": 0.0}, "temperature"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"max_length": 99}, "max_length"),
        ({"num_samples": 0}, "num_samples"),
        ({"output_type": "image"}, "output_type"),
        ({"generator": [torch.Generator()] * 3}, "generators"),
        ({"prompt": ["a", "the"], "negative_prompt": ["a"]}, "negative"),
        ({"prompt": []}, "empty"),
        ({"prompt": 5}, "prompt 5 is no string"),
        ({"prompt": ["a"], "negative_prompt": 5, "guidance_scale": 2.0}, "negative_prompt 5 is no string"),
        ({"generator": 42}, "generator 42"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"shortlist": 0}, "shortlist 0"),
        ({"shortlist": "all"}, "shortlist all"),
    ],
)
def test_bad_arguments_are_named(pipe, options, cause):
    with pytest.raises(UserError, match=cause):
        pipe(**options)


def test_numbers_of_other_libraries_and_prompts_that_lack_a_negative_one_will_do(pipe):
    options = {"num_inference_steps": np.int64(2), "num_samples": np.int64(2), "max_length": np.int64(6)}
    found = pipe(["the cat", "a dog"], negative_prompt=[None, "x"], guidance_scale=2.0, **options)
    assert len(found.texts) == 4
    assert found.sequences.shape == (4, 6)


def test_weights_that_would_be_unpickled_are_not_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert list((tmp_path / "denoiser").glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        TextDiffusionPipeline.from_pretrained(tmp_path)


def test_diffusers_own_schedulers_sample_too(pipe):
    """The same steps from the same config; 10 divides their 1,000 timesteps."""
    options = {"num_inference_steps": 10, "num_samples": 4, "output_type": "seq"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ours = pipe(generator=torch.Generator().manual_seed(0), **options).sequences
    pipe.scheduler = to_diffusers(pipe.scheduler)
    assert type(pipe.scheduler).__module__.startswith("diffusers")
    theirs = pipe(generator=torch.Generator().manual_seed(0), **options).sequences
    assert (ours == theirs).float().mean() > 0.95


def test_an_unfit_scheduler_is_refused_with_the_reason(pipe):
    from diffusers import UnCLIPScheduler

    pipe.scheduler = UnCLIPScheduler()
    with pytest.raises(UserError, match="UnCLIPScheduler can't sample from embdiff models: its samples hold"):
        pipe()


def test_foreign_and_damaged_folders_are_refused(pipe, tmp_path):
    with pytest.raises(UserError, match="no model"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no embdiff model"):
        load(str(tmp_path / "empty"))
    pipe.save_pretrained(tmp_path / "model")
    weights = next((tmp_path / "model" / "denoiser").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_whole_sampling_loop_compiles_without_a_break(pipe, name):
    """Guided, with self-conditioning, lengths drawn, and noise handed in; fullgraph raises at any break."""
    solver = SCHEDULERS[name](noise_schedule=pipe.scheduler.config.noise_schedule)
    solver.set_timesteps(3)
    run = pipe._run(["the cat", "a small dog"], None, 1, 12)
    predictor = Predictor(
        run, [ClassifierFreeGuidance(2.0)], gammas=solver.gammas.tolist(), temperature=0.7, kept=pipe._kept_tokens(),
        quantile=torch.tensor([0.3, 0.6]), draw_above=float(solver.noise_schedule.gamma(0.5)), length_bias=1.0,
    )  # fmt: skip
    gammas = solver.gammas.tolist()

    def loop(z, noise):
        solver.set_begin_index(0)
        x0 = None
        for k, t in enumerate(solver.timesteps):
            x0 = predictor(solver.scale_model_input(z, t), gammas[k], x0)
            z = solver.step(x0, t, z, variance_noise=noise[k], return_dict=False)[0]
        return z

    z, *noise = torch.randn(4, 2, 12, pipe.denoiser.dim, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(loop, fullgraph=True, backend="eager")(z, noise), loop(z, noise), atol=1e-5)
