"""diffusers' schedulers under our models, and configs that go both ways."""

import inspect
import json
import os
from pathlib import Path

import diffusers.schedulers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.schedulers import DIFFUSERS, SCHEDULERS, DDIMScheduler, adapted, from_diffusers, to_diffusers, with_solver
from embdiff.schedulers.foreign import ForeignScheduler, dry_run

diffusers_logging.set_verbosity_error()
NOISE = {"name": "cosine", "gamma_min": -6.0, "gamma_max": 8.0}
# What diffusers has for latents that are tensors of numbers; the others are for tokens, masks, two inputs or one paper.
WORKING = (
    *("CogVideoXDDIM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "FlowMapEulerDiscrete", "HeunDiscrete"),
    *("KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"),
)
REFUSED = ("CMStochasticIterative", "DDIMInverse", "DDPMWuerstchen", "DPMSolverMultistepInverse", "DiscreteDDIM",
           "KarrasVe", "RePaint", "ScoreSdeVe", "ScoreSdeVp", "UnCLIP")  # fmt: skip
TABLE = Path(__file__).parents[2] / "docs" / "diffusers.md"


def foreign(name: str):
    cls = getattr(diffusers.schedulers, f"{name}Scheduler", None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}Scheduler")
    return cls()


def curve(z, gamma):
    """A prediction that is far from linear in z, and depends on the level."""
    return torch.tanh(1.5 * z + 0.2 * gamma)


def end(scheduler, predict, start, steps, seed=0):
    """Where a scheduler's run ends."""
    solver = adapted(scheduler)
    solver.set_timesteps(steps)
    solver.set_begin_index(0)
    sample = start * solver.init_noise_sigma
    generator = torch.Generator().manual_seed(seed)
    for gamma, t in zip(solver.gammas, solver.timesteps, strict=True):
        x0 = predict(solver.scale_model_input(sample, t), gamma)
        sample = solver.step(x0, t, sample, generator=generator, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("steps", [4, 20])
def test_a_foreign_scheduler_ends_at_the_true_x0(name, steps):
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    reached = end(foreign(name), lambda z, gamma: x, start, steps)
    assert (reached - x).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("name", WORKING)
def test_a_foreign_scheduler_shows_the_model_what_its_gamma_says(name):
    """z = alpha x + sigma eps with alpha^2 + sigma^2 = 1 at every call."""
    x = 2 * torch.ones(1, 32, 64)
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    seen = []

    def predict(z, gamma):
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        seen.append((((z - alpha * x) / sigma).square().mean().sqrt().item(), gamma.item()))
        return x

    end(foreign(name), predict, start, 20)
    # Pure noise stands for the first sample, which lacks alpha x; below, the noise is as strong as gamma says.
    assert all(0.8 < noise < 1.25 for noise, gamma in seen if gamma < 3)
    assert len({gamma for _, gamma in seen}) > 10


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_cannot_be_right_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=rf"scheduler {name}Scheduler (can't sample from embdiff models: \w+|is no)"):
        adapted(foreign(name))


def verdict(cls) -> tuple[str, str]:
    """What becomes of one of diffusers' schedulers under our models, in 20 steps."""
    try:
        scheduler = cls()
    except (TypeError, ImportError) as error:
        return "-", "needs arguments of its own" if isinstance(error, TypeError) else "needs another library"
    try:
        solver = adapted(scheduler)
        error = dry_run(solver.scheduler, solver.convert, 20).error
    except UserError as error:
        return "refused", str(error).split(": ", 1)[1].removesuffix("; take one of embdiff's")
    kind = {"sample": "x0", "epsilon": "noise", "velocity": "v", "flow": "flow", "edm": "EDM's F"}
    return (
        "runs",
        f"takes {kind[solver.convert.__name__[1:]]}; ends {'< 1e-6' if error < 1e-6 else f'{error:.0e}'} from x0",
    )


def test_the_table_in_the_docs_says_what_happens():
    """Every class that diffusers exports is in it. `WRITE_DOCS=1 pytest tests/schedulers/test_foreign.py` writes it."""
    names = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))
    classes = {name: getattr(diffusers.schedulers, name) for name in names}
    rows = {name: verdict(cls) for name, cls in classes.items() if inspect.isclass(cls)}
    assert {name for name, (word, _) in rows.items() if word == "runs"} >= {f"{name}Scheduler" for name in WORKING}
    heading = f"# diffusers' schedulers under our models\n\ndiffusers {diffusers.__version__}; 20 steps, a known x0."
    lines = [
        "| scheduler | verdict | why |",
        "|---|---|---|",
        *(f"| {name} | {a} | {b} |" for name, (a, b) in rows.items()),
    ]
    if os.environ.get("WRITE_DOCS"):
        legend = (
            '"ends": how far from that x0 a run ends; "-": not tried. '
            "Written by `WRITE_DOCS=1 python -m pytest tests/schedulers/test_foreign.py`."
        )
        TABLE.write_text(f"{heading} {legend}\n\n" + "\n".join(lines) + "\n")
    text = TABLE.read_text()
    if not text.startswith(heading):
        pytest.skip("the table is of another version of diffusers")
    words = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if "Scheduler" in line
    }
    missing = [name for name, (word, _) in rows.items() if word != "-" and words.get(name) != word]
    assert not missing, f"docs/diffusers.md is out of date for {missing}: write it again with WRITE_DOCS=1"


def test_one_that_is_right_with_many_steps_only_says_so():
    """IPNDM extrapolates as if its levels were evenly spaced."""
    x, start = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    assert (end(foreign("IPNDM"), lambda z, gamma: x, start, 20) - x).square().mean().sqrt() < 1e-3
    with pytest.raises(UserError, match="IPNDMScheduler can't take 4 steps"):
        end(foreign("IPNDM"), lambda z, gamma: x, start, 4)


def test_what_is_no_scheduler_is_refused():
    with pytest.raises(UserError, match="no diffusers scheduler"):
        adapted(torch.nn.Linear(1, 1))


def test_few_steps_start_from_noise_too():
    """diffusers' default spacing starts a run of one step at its cleanest level."""
    for name in ("DDIM", "DDPM", "CogVideoXDDIM", "EulerDiscrete", "LMSDiscrete"):
        solver = adapted(foreign(name))
        for steps in (1, 2, 4):
            solver.set_timesteps(steps)
            assert solver.gammas[0] > 3
    own = adapted(diffusers.schedulers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1))
    with pytest.raises(UserError, match="can't take 1 steps: it starts from pure noise"):
        own.set_timesteps(1)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "UniPCMultistep", "LCM"])
def test_a_saved_scheduler_samples_at_the_same_levels(name, tmp_path):
    """A saved config names all options, those that nobody chose too."""
    scheduler = foreign(name)
    scheduler.save_pretrained(tmp_path)
    levels = []
    for each in (scheduler, type(scheduler).from_pretrained(tmp_path)):
        solver = adapted(each)
        solver.set_timesteps(5)
        levels.append(solver.gammas)
    assert torch.equal(*levels)


@pytest.mark.parametrize("name", ["LCM", "TCD", "HeunDiscrete", "KDPM2Discrete", "DDIM", "UniPCMultistep"])
def test_the_noise_schedule_of_a_default_scheduler_is_its_own(name):
    """Their defaults differ: what a class has by default is no other class's default."""
    theirs = foreign(name)
    schedules = [DDIMScheduler.from_config(theirs.config).noise_schedule, with_solver(theirs, "unipc").noise_schedule]
    kept = theirs.alphas_cumprod.double().numpy()
    for schedule in schedules:
        gamma = schedule.gamma(np.arange(1, len(kept) + 1) / len(kept))
        assert np.allclose(1 / (1 + np.exp(gamma)), kept, atol=1e-6)


def test_a_signal_that_all_but_vanishes_is_kept():
    theirs = diffusers.schedulers.DDPMScheduler(num_train_timesteps=4000)
    assert from_diffusers(theirs).noise_schedule.gamma_max == pytest.approx(-float(theirs.alphas_cumprod[-1].log()))


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscrete", "IPNDM", "ScoreSdeVp"])
def test_a_config_without_betas_is_refused(name):
    with pytest.raises(UserError, match="has no betas"):
        DDIMScheduler.from_config(getattr(diffusers.schedulers, f"{name}Scheduler")().config)


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.schedulers.DPMSolverMultistepScheduler(solver_type="heun"),
        diffusers.schedulers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        diffusers.schedulers.DDPMScheduler(variance_type="fixed_large"),
        diffusers.schedulers.UniPCMultistepScheduler(predict_x0=False),
    ],
    ids=lambda theirs: type(theirs).__name__,
)
def test_options_without_a_counterpart_are_refused(theirs):
    with pytest.raises(
        UserError, match=r"(solver_type|algorithm_type='dpmsolver'|variance_type|predict_x0).*counterpart"
    ):
        from_diffusers(theirs)


def test_betas_by_a_formula_of_their_own_are_taken_from_the_scheduler():
    theirs = diffusers.schedulers.DDPMScheduler(beta_schedule="sigmoid")
    assert from_diffusers(theirs).noise_schedule.gamma_max > 5
    with pytest.raises(UserError, match=r"sigmoid.*from_diffusers"):
        DDIMScheduler.from_config(theirs.config)


def test_steps_that_are_a_whole_float_are_a_number_of_steps():
    solver = adapted(foreign("DDIM"))
    solver.set_timesteps(4.0)
    assert len(solver.timesteps) == 4


@pytest.mark.parametrize("steps", [0, 2.5, 5000])
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "UniPCMultistep", "FlowMatchEulerDiscrete", "HeunDiscrete"])
def test_steps_that_a_foreign_scheduler_cannot_take_are_refused(name, steps):
    if steps == 5000 and name in ("FlowMatchEulerDiscrete", "HeunDiscrete", "UniPCMultistep"):
        pytest.skip("it can take them")
    with pytest.raises(UserError, match="steps"):
        adapted(foreign(name)).set_timesteps(steps)


def test_what_was_set_at_run_time_stays():
    shifted = diffusers.schedulers.FlowMatchEulerDiscreteScheduler()
    shifted.set_shift(5.0)
    solver = adapted(shifted)
    solver.set_timesteps(4)
    shifted.set_timesteps(4)
    sigma = shifted.sigmas[:4].double().clamp(max=1 - 1e-4)
    assert torch.allclose(solver.gammas.double(), 2 * (sigma / (1 - sigma)).log(), atol=1e-2)


def test_a_noise_schedule_that_was_changed_over_there_comes_back_changed():
    ours = DDIMScheduler(noise_schedule=NOISE)
    changed = diffusers.schedulers.DDIMScheduler.from_config(
        ours.config, trained_betas=None, beta_schedule="scaled_linear"
    )
    for back in (DDIMScheduler.from_config(changed.config), from_diffusers(changed)):
        kept = changed.alphas_cumprod[499].double()
        assert back.gamma_of(500).item() == pytest.approx(((1 - kept) / kept).log().item(), abs=1e-3)


def test_configs_without_betas_need_a_noise_schedule():
    for cls in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
        config = getattr(diffusers.schedulers, cls)().config
        with pytest.raises(UserError, match="no betas"):
            DDIMScheduler.from_config(config)
        assert DDIMScheduler.from_config(config, noise_schedule="cosine").noise_schedule.name == "cosine"


def test_options_without_an_image_are_refused():
    with pytest.raises(UserError, match="counterpart of nodes"):
        to_diffusers(DDIMScheduler(noise_schedule=NOISE, nodes="karras"))
    with pytest.raises(UserError, match="counterpart of levels"):
        to_diffusers(DDIMScheduler(noise_schedule=NOISE, levels={"2": [5.0, 1.0]}))
    with pytest.raises(UserError, match=r"eta 0\.5"):
        to_diffusers(DDIMScheduler(noise_schedule=NOISE, eta=0.5))
    assert type(to_diffusers(DDIMScheduler(noise_schedule=NOISE, eta=1.0))).__name__ == "DDPMScheduler"
    with pytest.raises(UserError, match="use_karras_sigmas"):
        from_diffusers(diffusers.schedulers.EulerDiscreteScheduler(use_karras_sigmas=True))
    with pytest.raises(UserError, match="solver_type"):
        from_diffusers(diffusers.schedulers.UniPCMultistepScheduler(solver_type="bh1"))

    class Own(DDIMScheduler):
        pass

    with pytest.raises(UserError, match="Own is no scheduler of embdiff"):
        to_diffusers(Own(noise_schedule=NOISE))


def test_clipping_is_off():
    assert diffusers.schedulers.DDIMScheduler().config.clip_sample
    assert not ForeignScheduler(diffusers.schedulers.DDIMScheduler()).scheduler.config.clip_sample


@pytest.mark.parametrize("name", sorted(set(DIFFUSERS) - {"dpm++3m", "dpm++3m-sde", "heun"}))
@given(st.integers(2, 25), st.integers(0, 99))
def test_our_solvers_and_their_diffusers_counterparts_go_the_same_way(name, steps, seed):
    """Both from one config; 1,000 steps divide evenly by few N, so levels differ by rounding to whole timesteps."""
    steps = min((n for n in (2, 4, 5, 8, 10, 20, 25)), key=lambda n: abs(n - steps))
    ours = SCHEDULERS[name](noise_schedule=NOISE)
    start = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))
    theirs = to_diffusers(ours)
    assert torch.allclose(end(ours, curve, start, steps, seed), end(theirs, curve, start, steps, seed), atol=2e-3)


@pytest.mark.parametrize("name", sorted(DIFFUSERS))
def test_a_config_survives_the_way_there_and_back(name):
    ours = SCHEDULERS[name](noise_schedule=NOISE)
    back = from_diffusers(to_diffusers(ours))
    assert type(back) is type(ours)
    times = torch.linspace(10, 1000, 50)
    assert torch.allclose(back.gamma_of(times), ours.gamma_of(times), atol=2e-2)


@pytest.mark.parametrize("cls", ["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_from_config_of_either_side_keeps_the_noise_schedule(cls):
    ours = DDIMScheduler(noise_schedule=NOISE)
    theirs = getattr(diffusers.schedulers, cls).from_config(ours.config)
    assert theirs.config.prediction_type == "sample"
    kept = theirs.alphas_cumprod[[99, 499, 999]].double()
    gamma = (1 - kept).log() - kept.log()
    assert torch.allclose(gamma.float(), ours.gamma_of(torch.tensor([100, 500, 1000])), atol=1e-2)
    default = getattr(diffusers.schedulers, cls)(beta_schedule="scaled_linear")
    moved = SCHEDULERS["dpm++"].from_config(default.config)
    kept = default.alphas_cumprod[[99, 499, 999]].double()
    assert torch.allclose(((1 - kept) / kept).log().float(), moved.gamma_of(torch.tensor([100, 500, 1000])), atol=1e-3)


def test_a_saved_config_holds_our_own_options_only(tmp_path):
    DDIMScheduler(noise_schedule=NOISE).save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert set(saved) - {"_class_name", "_diffusers_version"} <= set(inspect.signature(DDIMScheduler).parameters)
    assert saved["trained_betas"] is None


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(UserError, match="no counterpart"):
        from_diffusers(diffusers.schedulers.LCMScheduler())
    with pytest.raises(UserError, match="no counterpart of renoise"):
        to_diffusers(SCHEDULERS["renoise"]())
    with pytest.raises(UserError, match="has no betas"):
        to_diffusers(SCHEDULERS["ddim"](), diffusers.schedulers.EDMEulerScheduler)
    assert "trained_betas" in inspect.signature(diffusers.schedulers.LCMScheduler.__init__).parameters
    assert to_diffusers(SCHEDULERS["renoise"](noise_schedule=NOISE), diffusers.schedulers.LCMScheduler)
