"""The context rule and what else the denoiser promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff.denoiser import KEPT, Context, Denoiser, Rotary, attention_mask
from tests.conftest import lively

B, C, L, V = 3, 5, 7, 30


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return lively(Denoiser(V, dim=16, width=32, depth=3, heads=4, condition_width=16)).double()


def draw(seed: int):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(V, (B, C), generator=generator)
    n = torch.randint(0, C + 1, (B, 1), generator=generator)
    column = torch.arange(C)[None]
    z, self_cond = torch.randn(2, B, L, 16, generator=generator, dtype=torch.float64)
    gamma = torch.randn(B, generator=generator, dtype=torch.float64)
    return prompt, column < n, column - n, z, gamma, self_cond


@given(st.integers(0, 50))
def test_context_encoded_once_equals_a_joint_pass(model, seed):
    prompt, present, positions, z, gamma, self_cond = draw(seed)
    cached = model(z, gamma, model.encode_context(prompt, present, positions), self_cond)
    clean = model.space.embed(prompt).double()
    true = torch.ones(B, L, dtype=torch.bool)
    joint = model(
        torch.cat([clean, z], 1),
        gamma,
        None,
        torch.cat([torch.zeros_like(clean), self_cond], 1),
        known=torch.cat([torch.ones(B, C, dtype=torch.bool), ~true], 1),
        present=torch.cat([present, true], 1),
        positions=torch.cat([positions, torch.arange(L).expand(B, L)], 1),
    )
    assert torch.allclose(model.logits(cached), model.logits(joint[:, C:]), atol=1e-6)


@given(st.integers(0, 50))
def test_context_does_not_see_the_target(model, seed):
    prompt, present, _, z, gamma, _ = draw(seed)
    known = torch.cat([torch.ones(B, C, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)], 1)
    layout = {"known": known, "present": torch.cat([present, torch.ones(B, L, dtype=torch.bool)], 1)}
    clean = model.space.embed(prompt).double()
    one, two = (
        model(torch.cat([clean, v], 1), g, **layout)[..., :32] for v, g in ((z, gamma), (z.flip(0) + 1, gamma - 1))
    )
    assert torch.allclose(one[:, :C], two[:, :C], atol=1e-12)
    assert not torch.allclose(one[:, C:], two[:, C:])


@given(st.integers(0, 50))
def test_a_dropped_context_is_no_context(model, seed):
    prompt, present, positions, z, gamma, self_cond = draw(seed)
    context = model.encode_context(prompt, present, positions)
    assert torch.allclose(
        model(z, gamma, context.hidden_from(torch.zeros(len(z), dtype=torch.bool)), self_cond),
        model(z, gamma, None, self_cond),
        atol=1e-9,
    )


@given(st.integers(0, 50), st.integers(0, 4))
def test_padding_of_a_prompt_changes_nothing(model, seed, extra):
    prompt, present, positions, z, gamma, _ = draw(seed)
    wider = [
        torch.nn.functional.pad(x, (0, extra), value=v) for x, v in ((prompt, 0), (present, False), (positions, 9))
    ]
    short, long = model.encode_context(prompt, present, positions), model.encode_context(*wider)
    assert torch.allclose(model(z, gamma, short), model(z, gamma, long), atol=1e-9)


@given(st.integers(0, 50))
def test_gamma_per_position_equals_gamma_per_example_when_constant(model, seed):
    *_, z, gamma, self_cond = draw(seed)
    assert torch.allclose(
        model(z, gamma, None, self_cond), model(z, gamma[:, None].expand(B, L), None, self_cond), atol=1e-9
    )


@given(st.integers(0, 50), st.lists(st.integers(1, L), min_size=B, max_size=B))
def test_some_rows_are_what_a_pass_without_the_others_gives(model, seed, lengths):
    prompt, present, positions, z, _, self_cond = draw(seed)
    gamma, context = torch.full((B,), 0.3), model.encode_context(prompt, present, positions)
    seen = torch.arange(L) < torch.tensor(lengths)[:, None]
    some = model(z, gamma[:1], context, self_cond, rows=seen.flatten().nonzero()[:, 0])
    assert torch.allclose(some, model(z, gamma, context, self_cond, present=seen)[seen], atol=1e-9)
    every = model(z, gamma[:1], None, self_cond, rows=torch.arange(B * L))
    assert torch.allclose(every, model(z, gamma, None, self_cond).flatten(0, 1), atol=1e-9)


@given(st.integers(0, 50))
def test_examples_do_not_see_each_other(model, seed):
    *_, z, gamma, self_cond = draw(seed)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(
        model(z, gamma, None, self_cond)[order],
        model(z[order], gamma[order], None, self_cond[order]),
        atol=1e-9,
    )
    assert torch.allclose(model(z, gamma, None, self_cond)[:1], model(z[:1], gamma[:1], None, self_cond[:1]), atol=1e-9)


def test_no_self_conditioning_is_zeros(model):
    *_, z, gamma, _ = draw(0)
    assert torch.equal(model(z, gamma), model(z, gamma, None, torch.zeros_like(z)))


def test_the_matched_filter_is_the_log_likelihood_of_each_token(model):
    """With the Transformer's head off, softmax(logits) is the exact posterior under a uniform prior."""
    *_, z, gamma, _ = draw(1)
    h = model(z, gamma)
    h[..., : model.config.width] = 0
    sigma2 = torch.sigmoid(gamma)[:, None, None]
    table = model.space.table().double()
    distance = (z[:, :, None] - torch.sigmoid(-gamma).sqrt()[:, None, None, None] * table).square().sum(-1)
    exact = (-distance / (2 * sigma2)).log_softmax(-1)
    assert torch.allclose(model.logits(h).log_softmax(-1), exact, atol=1e-4)


def test_contexts_stack_along_the_batch(model):
    prompt, present, positions, z, gamma, _ = draw(2)
    one = model.encode_context(prompt, present, positions)
    both = Context.stack([one, one.hidden_from(torch.zeros(len(one.mask), dtype=torch.bool))])
    twice = model(torch.cat([z, z]), torch.cat([gamma, gamma]), both)
    assert torch.allclose(twice[:B], model(z, gamma, one), atol=1e-9)
    assert torch.allclose(twice[B:], model(z, gamma), atol=1e-9)


def test_without_context_or_padding_there_is_no_mask():
    assert attention_mask(4, None, None, None) is None


def test_save_and_load_keep_every_weight(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = Denoiser.from_pretrained(tmp_path, torch_dtype=torch.float64)
    for (name, p), (other, q) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q)


def test_dropout_acts_in_training_alone_and_only_where_gradients_are_taken():
    model = lively(Denoiser(V, dim=16, width=32, depth=2, heads=4, condition_width=16))
    _, _, _, z, gamma, _ = draw(0)
    z, gamma = z.float(), gamma.float()
    plain = model(z, gamma)
    for block in model.blocks:
        block.dropout = 0.3
    assert torch.equal(model.eval()(z, gamma), plain)
    model.train()
    assert not torch.allclose(model(z, gamma), plain)
    with torch.no_grad():  # the first pass of self-conditioning is as in sampling
        assert torch.equal(model(z, gamma), plain)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(model):
    prompt, present, positions, z, gamma, self_cond = draw(0)
    found = []
    for turn in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        turn()
        kept = [0]

        def pack(tensor, kept=kept):
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            h = model(z, gamma, model.encode_context(prompt, present, positions), self_cond)
        model.zero_grad()
        h.square().sum().backward()
        found.append((kept[0], [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (less, recomputed), (more, plain) = found
    assert less < 0.5 * more
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(recomputed, plain, strict=True))


def test_autocast_that_takes_norms_in_fp32_makes_features_no_wider(model, monkeypatch):
    """As it does on a GPU; on a CPU it leaves them alone."""
    _, _, _, z, gamma, self_cond = draw(0)
    model = lively(Denoiser(V, dim=16, width=32, depth=2, heads=4, condition_width=16))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(z.float(), gamma.float(), None, self_cond.float())
        norm = torch.nn.functional.rms_norm
        monkeypatch.setattr("embdiff.denoiser.F.rms_norm", lambda x, *args, **more: norm(x.float(), *args, **more))
        wide = model(z.float(), gamma.float(), None, self_cond.float())
    assert plain.dtype is wide.dtype is torch.bfloat16
    assert torch.allclose(plain.float(), wide.float(), atol=0.1 * plain.float().std().item())


@pytest.mark.parametrize("length", [7, KEPT + 3])
def test_kept_rotations_are_those_of_their_positions_in_any_precision(length):
    rotary = Rotary(8)
    asked = rotary(length, torch.arange(length)[None])
    for model in (rotary, Rotary(8).to(torch.bfloat16), Rotary(8).to(torch.float64)):
        for kept, made in zip(model(length), asked, strict=True):
            assert kept.dtype is torch.float32
            torch.testing.assert_close(kept, made, rtol=0, atol=1e-6)
    cos, sin = asked
    assert cos.shape == (1, 1, length, 4)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    assert not rotary.state_dict()
