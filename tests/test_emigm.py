"""emigm.py: what a token may see, how many are revealed, the head's closed forms, exactness."""

import math

import numpy as np
import plot_joint_law
import pytest
import torch
import torch.nn as nn
from conftest import randomize
from torch import Tensor

import train
from emigm import (
    Head,
    MaskedPrior,
    TokenDraws,
    draw_tokens,
    hidden_share,
    midpoint,
    reveal_counts,
    sampling_order,
    visible_slots,
)

B, K, D, CLASSES = 5, 6, 3, 4
SCHEDULES = ("exp", "cosine", "linear", "log")
LABELS = torch.tensor([0, 3, -1, 1, 2])
GAMMA = {  # of numbers, in words of their own
    "exp": lambda t: 1 - math.exp(-5 * t),
    "cosine": lambda t: math.cos(math.pi / 2 * (1 - t)),
    "linear": lambda t: t,
    "log": lambda t: math.log(1 + (math.exp(5) - 1) * t) / 5,
}


def exactly(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def small_prior(**changes) -> MaskedPrior:
    """In float64, nothing zero or the identity, with mean and std that are not 0 and 1."""
    sizes = dict(num_latents=K, latent_dim=D, width=16, heads=2, encoder_depth=2, decoder_depth=2)
    sizes |= dict(buffer=2, head_width=12, head_depth=2, num_classes=CLASSES)
    prior = randomize(MaskedPrior(**{**sizes, **changes}), 0.2).double()
    prior.fit(0.5 + 2 * torch.randn(50, prior.mean.shape[0], prior.mean.shape[1]))
    return prior


def some_latents(batch: int = B) -> tuple[Tensor, Tensor]:
    """Latents (batch, K, D) in float64, and an order (batch, K)."""
    return torch.randn(batch, K, D).double(), torch.rand(batch, K).argsort(dim=1)


# --------------------------------------------------------------------------------------------------
# An independent reference: one picture, tokens where they belong, attention written out


def layer_by_hand(layer: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    """x (T, C); the keys of tokens where `seen` (T,) is False get a score of minus infinity."""
    (T, C), heads = x.shape, layer.attention.heads
    y = layer.norm1(x)
    weights, biases = layer.attention.qkv.weight.chunk(3), layer.attention.qkv.bias.chunk(3)
    q, k, v = ((y @ w.T + b).view(T, heads, C // heads) for w, b in zip(weights, biases))  # noqa: B905
    score = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(C // heads)
    score = score.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hij,jhc->ihc", score.exp() / score.exp().sum(-1, keepdim=True), v)
    x = x + layer.attention.proj(out.reshape(T, C))
    return x + layer.mlp(layer.norm2(x))


def features_by_hand(prior: MaskedPrior, z: Tensor, label: int, seen: Tensor, drop: bool) -> Tensor:
    """h (K, C) of one z (K, D). Hidden tokens leave the encoder (drop), or are masked as keys."""
    front, ahead = prior.buffer, torch.ones(prior.buffer, dtype=torch.bool)
    name = prior.mask_token if label < 0 else prior.class_embed[label]
    x = torch.cat((name.expand(front, -1), prior.proj_in((z - prior.mean) / prior.std)))
    x, keys = prior.norm_in(x + prior.encoder_position), torch.cat((ahead, seen))
    places = torch.arange(len(x))
    if drop:
        x, places, keys = x[keys], places[keys], keys[keys]
    for layer in prior.encoder:
        x = layer_by_hand(layer, x, keys)
    x = prior.proj_decoder(prior.encoder_norm(x))
    tokens = [prior.mask_token] * (front + len(z))
    for i, place in enumerate(places.tolist()):
        if place < front or seen[place - front]:
            tokens[place] = x[i]
    x = torch.stack(tokens) + prior.decoder_position
    for layer in prior.decoder:
        x = layer_by_hand(layer, x, torch.ones(len(x), dtype=torch.bool))
    return prior.norm_out(x)[front:] + prior.head_position


def shown(order: Tensor, count: int) -> Tensor:
    """Which tokens (K,) are among the first `count` of one order (K,)."""
    return torch.tensor([i in order[:count].tolist() for i in range(len(order))])


# --------------------------------------------------------------------------------------------------
# What a token may see


@pytest.mark.parametrize("slots", [4, K])
def test_what_hidden_tokens_hold_changes_no_bit(slots):
    prior, (z, order) = small_prior(), some_latents()
    visible = torch.tensor([0, 1, 4, 2, 3])
    h = prior.features(z, LABELS, order, visible, slots)
    for value in (math.nan, math.inf, 1e9):
        spoiled = z.clone()
        for i in range(B):
            spoiled[i, order[i, visible[i] :]] = value
        assert torch.equal(prior.features(spoiled, LABELS, order, visible, slots), h)
    z[1, order[1, 0]] += 1  # and what a visible one holds, all places of its picture
    changed = (prior.features(z, LABELS, order, visible, slots) != h).any(dim=2)
    assert changed[1].all() and not changed[[0, 2, 3, 4]].any()


def test_the_order_of_the_visible_tokens_does_not_matter():
    prior, (z, order) = small_prior(), some_latents()
    for n in (2, 4):
        other = order.clone()
        other[:, :n] = other[:, :n].flip(1)
        other[:, n:] = other[:, n:].flip(1)
        for slots in (n, K):
            h = prior.features(z, LABELS, order, n, slots)
            assert (prior.features(z, LABELS, other, n, slots) - h).abs().max() < 1e-12


def test_empty_slots_are_hidden_keys_are_no_tokens_at_all():
    prior, (z, order) = small_prior(), some_latents()
    visible = torch.tensor([0, 1, 4, 2, 3])
    padded = prior.features(z, LABELS, order, visible, 4)
    assert padded.shape == (B, K, 16) and (padded[0] - padded[1]).abs().max() > 0.1
    assert (prior.features(z, LABELS, order, visible, K) - padded).abs().max() < 1e-12
    for i, n in enumerate(visible.tolist()):
        seen = shown(order[i], n)
        for drop in (True, False):
            alone = features_by_hand(prior, z[i], int(LABELS[i]), seen, drop)
            assert (padded[i] - alone).abs().max() < 1e-12
        one = slice(i, i + 1)
        alone = prior.features(z[one], LABELS[one], order[one], n, n)
        assert (padded[one] - alone).abs().max() < 1e-12


def test_with_all_tokens_hidden_features_depend_on_the_label_alone():
    prior, (z, order) = small_prior(), some_latents()
    h = prior.features(z, LABELS, order, 0, 4)
    assert torch.equal(prior.features(z.flip(0), LABELS, order.flip(0), 0, 4), h)
    same = prior.features(z, torch.full((B,), 3), order, 0, 4)
    assert (same - same[:1]).abs().max() < 1e-12
    assert (h[0] - h[1]).abs().max() > 0.1


def test_the_null_class_ignores_the_class_table_and_is_the_mask_token():
    prior, (z, order) = small_prior(), some_latents()
    null = torch.full((B,), -1)
    h = prior.features(z, null, order, 2, 2)
    with torch.no_grad():
        prior.class_embed += 1
    assert torch.equal(prior.features(z, null, order, 2, 2), h)
    assert (prior.features(z, LABELS, order, 2, 2) - h).abs().amax(dim=(1, 2))[2] == 0
    with torch.no_grad():
        prior.class_embed[1] = prior.mask_token
    assert torch.equal(prior.features(z, torch.full((B,), 1), order, 2, 2), h)
    assert (prior.features(z, torch.zeros_like(null), order, 2, 2) - h).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# How many are hidden


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_least_one_token_goes_in_each_step_and_all_in_all(schedule):
    for tokens in (1, 2, 7, 16, 128):
        for steps in (1, 2, 3, 8, 16, 64, 200):
            counts = reveal_counts(tokens, steps, schedule)
            assert len(counts) == min(steps, tokens)
            assert min(counts) >= 1 and sum(counts) == tokens


def test_reveal_counts_are_the_ones_of_the_plan():
    late = [1, 1, 1, 1, 1, 1, 1, 2, 4, 5, 8, 10, 13, 19, 25, 35]
    assert reveal_counts(128, 16, "exp") == late
    assert reveal_counts(16, 8, "cosine") == [1, 1, 1, 1, 3, 2, 3, 4]
    assert reveal_counts(16, 8, "exp") == [1, 1, 1, 1, 1, 1, 2, 8]
    assert reveal_counts(16, 4, "cosine") == [1, 3, 5, 7]
    assert reveal_counts(20, 10, "linear") == [2] * 10  # 20 * 0.7 is not quite 14
    assert visible_slots(128, "exp", 0.2) == 47
    assert [visible_slots(16, name, 0.0) for name in SCHEDULES] == [15] * 4


def test_every_token_is_revealed_once_in_the_order_and_then_stays():
    prior, (u, order) = small_prior(), some_latents()
    met, told, features = [], [], prior.features

    def remember(z: Tensor, labels: Tensor, places: Tensor, visible: int, slots: int) -> Tensor:
        met.append((z.clone(), visible))
        assert torch.equal(places, order) and slots == visible
        return features(z, labels, places, visible, slots)

    prior.features = remember
    how = dict(steps=3, schedule="cosine", order=order, watch=lambda *step: told.append(step))
    z, before = prior.sample(u, LABELS, **how), u.clone()
    counts = reveal_counts(K, 3, "cosine")
    assert told == list(enumerate(counts)) and torch.equal(u, before)
    assert [visible for _, visible in met] == [0, counts[0], counts[0] + counts[1]]
    for state, visible in met:
        for i in range(B):
            assert torch.equal(state[i, order[i, :visible]], z[i, order[i, :visible]])
            assert (state[i, order[i, visible:]] != z[i, order[i, visible:]]).all()


@pytest.mark.parametrize("schedule, t_min", [("exp", 0.2), ("cosine", 0.0), ("log", 0.3)])
def test_hidden_shares_are_those_of_gamma(schedule, t_min):
    tokens = 4000
    draws = draw_tokens(500, tokens, 1, schedule, t_min, repeats=1)
    grid = [t_min + (1 - t_min) * (i + 0.5) / 5000 for i in range(5000)]
    expected = sum(GAMMA[schedule](t) for t in grid) / 5000
    share = 1 - draws.visible.double() / tokens
    assert abs(share.mean() - expected) < 5e-4
    if (schedule, t_min) == ("exp", 0.2):
        assert abs(expected - 0.910) < 5e-4
    # Stratified: one t in each of 500 equal parts. gamma grows, so the quantiles are gamma's, too.
    for i, found in enumerate(share.sort().values.tolist()):
        low, high = (GAMMA[schedule](t_min + (1 - t_min) * (i + j) / 500) for j in (0, 1))
        assert low - 1e-6 <= found <= high + 1.001 / tokens
    t = torch.rand(9).double()
    gamma = exactly([GAMMA[schedule](float(x)) for x in t])
    assert (hidden_share(t, schedule) - gamma).abs().max() < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_at_least_is_hidden_and_no_more_are_visible_than_there_are_slots(schedule):
    for tokens, t_min in ((1, 0.0), (2, 0.0), (16, 0.0), (16, 0.25), (16, 0.5), (128, 0.2)):
        draws = draw_tokens(2000, tokens, 1, schedule, t_min, repeats=1)
        slots = visible_slots(tokens, schedule, t_min)
        assert draws.visible.min() == 0 and draws.visible.max() <= slots <= tokens - 1
        assert slots == min(tokens - 1, tokens - math.ceil(tokens * GAMMA[schedule](t_min) - 1e-6))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_the_very_least_time_no_more_are_visible_than_there_are_slots(schedule, monkeypatch):
    """A uniform number is 0 once in 2^24, and nothing is hidden at t = 0."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.zeros(shape))
    visible = draw_tokens(4, 16, 1, schedule, 0.0, repeats=1).visible
    assert visible.max() == visible_slots(16, schedule, 0.0) == 15


def test_draws_are_of_the_generator_alone_and_rows_are_a_share_of_them():
    def drawn(seed: int) -> TokenDraws:
        return draw_tokens(8, K, D, "linear", 0.1, 3, torch.Generator().manual_seed(seed))

    one, again, other = drawn(5), drawn(5), drawn(6)
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert one.tau.shape == (8, 3, K) and one.noise.shape == (8, 3, K, D)
    assert torch.equal(one.order.sort(dim=1).values, torch.arange(K).expand(8, K))
    assert len({tuple(order) for order in one.order.tolist()}) > 1
    parts = [one.rows(0, 4), one.rows(4, 8)]
    assert all(torch.equal(torch.cat(p), x) for *p, x in zip(*parts, one, strict=True))
    # A process's share of the batch has few and many hidden tokens, not one end of the range.
    assert draw_tokens(512, 100, 1, "linear", 0.0, 1).visible[:64].double().std() > 20


def test_the_order_of_sample_i_is_its_own():
    orders = sampling_order(3, range(40), K)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(dim=1).values, torch.arange(K).expand(40, K))
    assert torch.equal(sampling_order(3, [7, 2], K), orders[[7, 2]])
    assert not torch.equal(sampling_order(4, range(40), K), orders)
    by_hand = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 5, 2))))
    assert orders[5].tolist() == by_hand.permutation(K).tolist()


# --------------------------------------------------------------------------------------------------
# The head, its loss and its solver


def test_the_head_is_its_formula():
    head = randomize(Head(D, 12, 2, 16), 0.3).double()
    x, tau, h = torch.randn(D).double(), 0.37, torch.randn(16).double()
    angles = [1000 * tau * 10000 ** (-i / 128) for i in range(128)]
    waves = exactly([f(a) for f in (math.cos, math.sin) for a in angles])

    def silu(y: Tensor) -> Tensor:
        return y * torch.sigmoid(y)

    first, _, second = head.time
    c = silu(second(silu(first(waves))) + head.feature(h))
    v = head.proj_in(x)
    for block in head.blocks:
        shift, scale, gate = block.modulation(c).view(3, 12)
        y = block.norm(v) * (1 + scale) + shift
        v = v + gate * block.mlp[2](silu(block.mlp[0](y)))
    shift, scale = head.modulation(c).view(2, 12)
    v = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()
    expected = head.proj_out(v * (1 + scale) + shift)
    assert (head(x, exactly(tau), h) - expected).abs().max() < 1e-12
    # One feature for all times is a feature a time.
    sizes = (2, 4, 5, D), (2, 4, 5), (2, 1, 5, 16)
    x, tau, h = (torch.randn(size).double() for size in sizes)
    assert (head(x, tau, h) - head(x, tau, h.expand(2, 4, 5, 16))).abs().max() < 1e-12


def test_the_loss_is_the_error_of_the_hidden_tokens_alone():
    prior, (z, _) = small_prior(), some_latents()
    draws = draw_tokens(B, K, D, "cosine", 0.0, repeats=2)
    loss = prior(z, LABELS, draws, visible_slots(K, "cosine", 0.0))
    assert loss.shape == (B,)
    for i in range(B):
        hidden = draws.order[i, draws.visible[i] :].tolist()
        seen = shown(draws.order[i], int(draws.visible[i]))
        h = features_by_hand(prior, z[i], int(LABELS[i]), seen, drop=True)
        x, errors = (z[i] - prior.mean) / prior.std, []
        for place in hidden:
            for r in range(2):
                tau, eps = draws.tau[i, r, place].double(), draws.noise[i, r, place].double()
                v = prior.head(tau * x[place] + (1 - tau) * eps, tau, h[place])
                errors.append((v - (x[place] - eps)).square())
        assert abs(loss[i] - torch.stack(errors).mean()) < 1e-12


def test_a_single_token_is_plain_conditional_flow_matching():
    prior, calls = small_prior(num_latents=1), []
    prior.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    z, u = torch.randn(2, B, 1, D).double()
    h = torch.stack(
        [features_by_hand(prior, z[0], label, torch.tensor([False]), True) for label in LABELS]
    )[:, 0]
    draws = draw_tokens(B, 1, D, "exp", 0.2, repeats=3)
    assert visible_slots(1, "exp", 0.2) == 0
    x, eps = ((z - prior.mean) / prior.std)[:, 0], draws.noise[:, :, 0].double()
    losses = torch.zeros(B).double()
    for r in range(3):
        tau = draws.tau[:, r, 0].double()
        x_tau = tau[:, None] * x + (1 - tau[:, None]) * eps[:, r]
        losses += (prior.head(x_tau, tau, h) - (x - eps[:, r])).square().mean(dim=1) / 3
    assert (prior(z, LABELS, draws, 0) - losses).abs().max() < 1e-12

    x = u[:, 0]
    for step in range(3):  # the midpoint rule, a third at a time
        tau = exactly([step / 3, (step + 0.5) / 3])
        half = x + prior.head(x, tau[0].expand(B), h) / 6
        x = x + prior.head(half, tau[1].expand(B), h) / 3
    calls.clear()
    sampled = prior.sample(u, LABELS, steps=16, evaluations=6)
    assert (sampled[:, 0] - (prior.mean + prior.std * x)).abs().max() < 1e-12
    assert len(calls) == 1


def velocity_of_a_gaussian(mean: float, std: float):
    """E[x - eps | x_tau] for x ~ N(mean, std^2): the velocity that a perfect head would give."""

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        slope = (tau * std**2 - (1 - tau)) / (tau**2 * std**2 + (1 - tau) ** 2)
        return mean + slope * (x - tau * mean)

    return velocity


@pytest.mark.parametrize("std, ratio", [(0.33, 0.994), (0.6, 0.997), (1.0, 0.998)])
def test_eight_evaluations_carry_noise_to_a_gaussian(std, ratio):
    velocity = velocity_of_a_gaussian(0.7, std)
    noise = exactly([0.0, 1.0])  # the solution is linear: mean, and mean + std

    def error(steps: int) -> float:
        zero, one = midpoint(velocity, noise, steps)
        assert abs(zero - 0.7) < 1e-12  # the mean is exact
        return float(one - zero) / std - 1

    assert abs(1 + error(4) - ratio) < 1e-3
    assert 7 < error(8) / error(16) < 9 and 7 < error(16) / error(32) < 9
    x = noise
    for step in range(8):  # Euler's rule, as many evaluations
        x = x + velocity(x, exactly(step / 8)) / 8
    assert 0.78 < float(x[1] - x[0]) / std < 0.86


def test_the_loss_of_a_fresh_prior_is_2():
    prior = MaskedPrior(16, 8, 32, 4, 1, 1, 2, 32, 2, 10)
    z = 3 + 0.2 * torch.randn(4000, 16, 8)
    prior.fit(z)
    draws = draw_tokens(4000, 16, 8, "cosine", 0.0, 1)
    assert (prior.head(torch.randn(3, 8), torch.rand(3), torch.randn(3, 32)) == 0).all()
    with torch.no_grad():
        loss = prior(z, torch.arange(4000) % 10, draws, 15)
    assert abs(loss.mean() - 2) < 0.02


def test_the_loss_of_independent_gaussians_falls_to_half_pi_times_their_std():
    std, tokens, numbers, batch = 0.5, 2, 8, 64
    prior = MaskedPrior(tokens, numbers, 16, 2, 1, 1, 1, 32, 2, 0)
    optimizer = torch.optim.AdamW(prior.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=300)
    null = torch.full((batch,), -1)
    for _ in range(300):
        z = std * torch.randn(batch, tokens, numbers)
        loss = prior(z, null, draw_tokens(batch, tokens, numbers, "linear", 0.0), 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        draws = draw_tokens(8000, tokens, numbers, "linear", 0.0)  # one token is visible, or none
        z, null = std * torch.randn(8000, tokens, numbers), torch.full((8000,), -1)
        loss = prior(z, null, draws, 1).mean()
    assert abs(loss / (math.pi * std / 2) - 1) < 0.02


# --------------------------------------------------------------------------------------------------
# Sampling


def test_tokens_revealed_together_are_independent_and_one_after_the_other_they_agree():
    prior = plot_joint_law.train_prior()
    for steps, correlation in ((1, 0.0), (2, 1.0)):
        z = plot_joint_law.sample(prior, 2000, steps)
        assert abs(torch.corrcoef(z.T)[0, 1] - correlation) < 0.08
        same = (z[:, 0] * z[:, 1] > 0).double().mean()
        assert abs(same - (0.5 if steps == 1 else 1.0)) < 0.05
        # Each token alone is as it should be: -1 or +1, as often, the second one 0.1 wide.
        assert ((z > 0).double().mean(dim=0) - 0.5).abs().max() < 0.05
        size = z.abs()
        assert (size.mean(dim=0) - 1).abs().max() < 0.02
        assert size[:, 0].std() < 0.09 and 0.08 < size[:, 1].std() < 0.13


def test_network_calls_are_as_the_formula_says():
    prior, rows, head = small_prior(num_latents=20), [], []
    prior.encoder[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    prior.head.register_forward_hook(lambda module, given, out: head.append(len(out)))
    u = torch.randn(2, 20, D).double()
    prior.sample(u, LABELS[:2], 3.0, (0.1, 0.3), steps=16, evaluations=6)
    assert rows == 11 * [2] + 3 * [4] + 2 * [2]  # ends 4/16, 3/16 and 2/16 are guided
    assert head == [n for n in rows for _ in range(6)]
    rows.clear()
    prior.sample(u, None, 0.0, (0, 1), steps=50)
    assert rows == 20 * [2]  # no more steps than tokens
    rows.clear()
    prior.sample(u, LABELS[:2], 1.0, (0, 1), steps=4)
    assert rows == 4 * [4]


@pytest.mark.parametrize("steps, interval, guided", [(64, (0.25, 0.5), 16), (128, (0.18, 0.6), 53)])
def test_as_many_steps_are_guided_as_in_the_paper(steps, interval, guided):
    prior, rows = MaskedPrior(128, 2, 8, 2, 1, 1, 1, 8, 1, 2), []
    prior.encoder[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    prior.sample(torch.randn(1, 128, 2), torch.zeros(1), 1.0, interval, steps, evaluations=2)
    assert len(rows) == steps and rows.count(2) == guided


def test_a_step_that_ends_on_the_low_end_is_guided_and_one_on_the_high_end_is_not():
    prior, rows = small_prior(num_latents=10), []
    prior.encoder[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    prior.sample(torch.randn(1, 10, D).double(), LABELS[:1], 1.0, (0.1, 0.3), steps=10)
    assert rows == [1] * 7 + [2] * 2 + [1]  # ends 0.2 and 0.1


def test_guidance_zero_is_no_guidance_to_the_bit():
    prior, (u, order) = small_prior(), some_latents()
    how = dict(steps=3, order=order)
    plain = prior.sample(u, LABELS, **how)
    assert torch.equal(prior.sample(u, LABELS, 0.0, (0, 1), **how), plain)
    assert torch.equal(prior.sample(u, LABELS, 3.0, (0.9, 0.9), **how), plain)  # none ends there
    guided = prior.sample(u, LABELS, 3.0, (0, 1), **how)
    moved = (guided - plain).abs().amax(dim=(1, 2))
    assert moved[2] < 1e-12 and (moved[[0, 1, 3, 4]] > 1e-3).all()  # row 2 has no label
    unlabelled = prior.sample(u, None, 3.0, (0, 1), **how)
    assert torch.equal(prior.sample(u, torch.full((B,), -1), 3.0, (0, 1), **how), unlabelled)


def test_guidance_does_nothing_for_a_class_that_is_the_mask_token():
    prior, (u, order) = small_prior(), some_latents()
    with torch.no_grad():
        prior.class_embed[1] = prior.mask_token
    labels, how = torch.ones(B, dtype=torch.int64), dict(steps=3, order=order)
    plain = prior.sample(u, labels, **how)
    assert (prior.sample(u, labels, 3.0, (0, 1), **how) - plain).abs().max() < 1e-12


def test_guiding_the_velocity_is_guiding_the_noise_that_it_implies():
    prior, w = small_prior(num_latents=2), 1.7
    u, order, x = torch.randn(1, 2, D).double(), torch.tensor([[1, 0]]), {}
    nothing = torch.zeros(1, 2, D).double()
    h, h_null = (prior.features(nothing, torch.tensor([c]), order, 0, 0)[0] for c in (2, -1))

    def guided(x: Tensor, tau: float) -> Tensor:
        velocities = [prior.head(x, exactly(tau), f) for f in (h, h_null)]
        if tau == 0:  # x_0 is the noise itself; the token that v implies is guided instead
            ends = [x + v for v in velocities]
            return ends[0] + w * (ends[0] - ends[1]) - x
        eps = [x - tau * v for v in velocities]
        return (x - (eps[0] + w * (eps[0] - eps[1]))) / tau

    x = u[0]
    for step in range(2):
        x = x + guided(x + guided(x, step / 2) / 4, (step + 0.5) / 2) / 2
    how = dict(steps=1, evaluations=4, order=order)
    sampled = prior.sample(u, torch.tensor([2]), w, (0, 1), **how)
    assert (sampled[0] - (prior.mean + prior.std * x)).abs().max() < 1e-12
    assert (sampled - prior.sample(u, torch.tensor([2]), **how)).abs().max() > 1e-2


def test_a_sample_is_the_same_alone_and_in_a_batch():
    prior, (u, order) = small_prior(), some_latents()
    how = dict(guidance=2.0, interval=(0.0, 0.5), steps=4)
    together = prior.sample(u, LABELS, order=order, **how)
    for i in range(B):
        one = slice(i, i + 1)
        alone = prior.sample(u[one], LABELS[one], order=order[one], **how)
        assert (together[one] - alone).abs().max() < 1e-12
    orders = sampling_order(0, range(B), K)  # what judge.py gets, which knows of no order
    assert torch.equal(prior.sample(u, LABELS, **how), prior.sample(u, LABELS, order=orders, **how))
    assert (prior.sample(u, LABELS, order=orders.flip(1), **how) - together).abs().max() > 1e-2


def test_samples_have_the_mean_and_std_that_fit_has_seen():
    prior = MaskedPrior(K, D, 16, 2, 1, 1, 1, 8, 1, 0)
    mean, std = 5 * torch.randn(K, D), 0.1 + torch.rand(K, D)
    mean[0, 0], std[0, 0] = 7.0, 0.0  # a number that never changes
    z = mean + std * torch.randn(4000, K, D)
    prior.fit(z)
    x = prior.standardise(z)
    assert x.mean(dim=0).abs().max() < 1e-4
    assert (x.std(dim=0).flatten()[1:] - 1).abs().max() < 1e-4
    assert prior.std[0, 0] == 1 and prior.mean[0, 0] == 7
    # A fresh head leaves the noise as it is.
    u = torch.randn(4, K, D)
    assert (prior.sample(u) - (prior.mean + prior.std * u)).abs().max() < 1e-5
    other = MaskedPrior(K, D, 16, 2, 1, 1, 1, 8, 1, 0)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.mean, prior.mean) and torch.equal(other.sample(u), prior.sample(u))
    assert not {"mean", "std"} & {name for name, _ in prior.named_parameters()}


# --------------------------------------------------------------------------------------------------
# Sizes and types


def test_parameters_are_counted_as_in_the_plan():
    with torch.device("meta"):
        full = MaskedPrior()
        laptop = MaskedPrior(16, 8, 96, 4, 2, 3, 4, 96, 3, 10)
    assert round(train.count_parameters(full) / 1e5) == 4780  # 478.0 M
    assert round(train.count_parameters(laptop) / 1e3) == 780  # 0.780 M


@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_every_parameter_gets_a_gradient(classes):
    prior, (z, _) = small_prior(num_classes=classes), some_latents()
    labels = LABELS if classes else torch.full((B,), -1)
    prior(z, labels, draw_tokens(B, K, D, "linear", 0.0), 5).mean().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.numel() == 0 or parameter.grad.abs().sum() > 0, name
    # In a fresh prior's first step the output layer alone moves; the others get a gradient of 0.
    fresh = MaskedPrior(K, D, 16, 2, 1, 1, 1, 8, 1, 4)
    fresh(z.float(), LABELS, draw_tokens(B, K, D, "linear", 0.0), 5).mean().backward()
    moved = {name for name, p in fresh.named_parameters() if p.grad.any()}
    assert moved == {"head.proj_out.weight", "head.proj_out.bias"}


def test_half_types_keep_a_float32_state():
    prior, (z, order) = small_prior().float(), some_latents()
    draws = draw_tokens(B, K, D, "linear", 0.0)
    exact = prior(z.float(), LABELS, draws, 5)
    sampled = prior.sample(z.float(), LABELS, 1.0, (0, 1), order=order)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prior(z.float(), LABELS, draws, 5)
        half = prior.sample(z.float(), LABELS, 1.0, (0, 1), order=order)
        v = prior.head(torch.randn(2, D), torch.rand(2), torch.randn(2, 16))
    assert loss.dtype == half.dtype == v.dtype == torch.float32  # guidance extrapolates v
    assert (loss / exact - 1).abs().max() < 0.05
    assert (half - sampled).abs().max() < 0.1 * sampled.std()
    prior = prior.bfloat16()
    assert prior(z.bfloat16(), LABELS, draws, 5).dtype == torch.float32
    assert prior.sample(z.bfloat16(), LABELS, 1.0, (0, 1), order=order).dtype == torch.float32


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(evaluations=7), dict(evaluations=0)])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        small_prior().sample(some_latents()[0], **wrong)
