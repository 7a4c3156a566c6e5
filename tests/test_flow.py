"""flow.py: exactness first. Inverse, determinant, causal order, density, guidance."""

import math

import pytest
import torch
from conftest import randomize

from flow import CausalGatedAttention, Guidance, KeyValueCache, Layer, NormalizingFlow, jacobi

VARIANTS = [dict(gated=True, scale="exp"), dict(gated=False, scale="softplus")]


def small_flow(std: float = 0.1, **changes) -> NormalizingFlow:
    sizes = dict(num_latents=6, latent_dim=3, width=16, depths=(1, 1, 2), head_dim=8, num_classes=4)
    return randomize(NormalizingFlow(**{**sizes, **changes}), std)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverse_of_forward_is_the_input_for_128_tokens(variant):
    flow = small_flow(num_latents=128, latent_dim=8, **variant)
    z, labels = torch.randn(3, 128, 8), torch.tensor([0, 3, -1])
    u, _ = flow(z, labels)
    assert (u - z).abs().max() > 0.1
    assert (flow.inverse(u, labels) - z).abs().max() < 1e-4
    for block in flow.blocks:
        x, _ = block(z, labels)
        assert (block.inverse(x, labels) - z).abs().max() < 1e-4
    assert [block.backward for block in flow.blocks] == [False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logdet_is_that_of_the_dense_jacobian(variant):
    flow = small_flow(**variant).double()
    z, labels = torch.randn(2, 6, 3).double(), torch.tensor([1, -1])
    _, logdet = flow(z, labels)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, i=i: flow(x.view(1, 6, 3), labels[i : i + 1])[0].flatten(), z[i].flatten()
        )
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign == 1
        assert abs(logdet[i] - expected) < 1e-8
        assert abs(expected) > 0.01


@pytest.mark.parametrize("number", [0, 1])
def test_a_token_ignores_the_later_ones_in_the_order_of_the_block(number):
    block = small_flow().blocks[number].double()
    z, labels = torch.randn(1, 6, 3).double(), torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x, labels)[0], z)
    influence = jacobian[0, :, :, 0].abs().amax(dim=(1, 3))  # (token of u, token of x)
    if number == 1:  # reads the tokens last to first
        influence = influence.flip(0, 1)
    assert (influence.triu(1) == 0).all()
    assert (influence.tril() > 0).sum() == 21  # and sees all the earlier ones


def test_first_token_of_each_block_passes_unchanged():
    flow, z = small_flow(), torch.randn(2, 6, 3)
    labels = torch.tensor([0, 1])
    assert torch.equal(flow.blocks[0](z, labels)[0][:, 0], z[:, 0])
    assert torch.equal(flow.blocks[1](z, labels)[0][:, -1], z[:, -1])


def test_cached_inverse_equals_the_uncached_one():
    block = small_flow().blocks[2]
    u, labels = torch.randn(2, 6, 3), torch.tensor([0, -1])
    x = u.clone()
    for i in range(1, 6):  # recompute the whole sequence for every token
        mu, alpha = block.predict(block.embed(x, block.position, block.condition(labels)))
        x[:, i] = u[:, i] * torch.exp(alpha[:, i - 1]) + mu[:, i - 1]
    torch.testing.assert_close(block.inverse(u, labels), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
@pytest.mark.parametrize("annealed", [True, False])
def test_guidance_in_the_deep_block_is_the_formula_token_by_token(rule, annealed):
    flow = small_flow()
    u, labels, w = torch.randn(2, 6, 3), torch.tensor([0, 3]), 1.5
    deep, null = flow.blocks[2], torch.tensor([-1, -1])
    x = u.clone()
    for i in range(1, 6):
        embedded = (deep.embed(x, deep.position, deep.condition(y)) for y in (labels, null))
        (mu_c, a_c), (mu_u, a_u) = ((p[:, i - 1] for p in deep.predict(h)) for h in embedded)
        w_i = w * i / 5 if annealed else w
        if rule == "tarflow":
            mu, sigma = mu_c + w_i * (mu_c - mu_u), torch.exp(a_c + w_i * (a_c - a_u))
        else:
            s = torch.minimum(a_c.exp() / a_u.exp(), torch.ones(())) ** 2
            mu = ((1 + w_i) * mu_c - w_i * s * mu_u) / (1 + w_i - w_i * s)
            sigma = a_c.exp() / torch.sqrt(1 + w_i - w_i * s)
        x[:, i] = u[:, i] * sigma + mu
    expected = flow.blocks[0].inverse(flow.blocks[1].inverse(x, labels), labels)
    guided = flow.inverse(u, labels, guidance=w, annealed=annealed, rule=rule)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
    assert (guided - flow.inverse(u, labels)).abs().max() > 1e-3


def test_guidance_zero_is_no_guidance_to_the_bit():
    flow, u, labels = small_flow(), torch.randn(2, 6, 3), torch.tensor([0, 3])
    assert torch.equal(flow.inverse(u, labels, guidance=0.0), flow.inverse(u, labels))


def test_guidance_moves_every_channel_and_spares_unlabelled_samples():
    flow, u = small_flow(), torch.randn(2, 6, 3)
    labels = torch.tensor([1, -1])
    change = flow.inverse(u, labels, guidance=3.0) - flow.inverse(u, labels)
    assert (change[0].abs() > 1e-5).any(dim=0).all()
    assert change[1].abs().max() < 1e-5


def test_starflow_rule_never_widens_the_gaussian():
    alpha_c, alpha_u = torch.randn(2, 1000)
    _, alpha = Guidance(2.0, rule="starflow")(alpha_c, alpha_c, alpha_u, alpha_u, torch.ones(1000))
    assert (alpha <= alpha_c + 1e-6).all() and alpha.isfinite().all()


def test_unconditional_is_the_mean_class_embedding():
    flow, z = small_flow(), torch.randn(2, 6, 3)
    expected = flow(z, None)[0]
    assert torch.equal(flow(z, torch.tensor([-1, -1]))[0], expected)
    with torch.no_grad():
        for block in flow.blocks:
            block.class_embed[2] = block.class_embed[[0, 1, 3]].mean(dim=0)  # class 2 is the mean
    torch.testing.assert_close(flow(z, torch.tensor([2, 2]))[0], flow(z)[0], atol=1e-5, rtol=1e-5)
    assert (flow(z, torch.tensor([0, 1]))[0] - expected).abs().max() > 1e-3


def test_each_label_reads_its_own_embedding():
    block = small_flow().blocks[0]
    rows = block.condition(torch.tensor([0, 1, 2, 3]))
    assert rows.shape == (4, 1, 16)
    assert torch.equal(rows[:, 0], block.class_embed)


def test_a_flow_without_classes_works_and_ignores_guidance():
    flow, z = small_flow(num_classes=0), torch.randn(2, 6, 3)
    u, _ = flow(z)
    assert (flow.inverse(u) - z).abs().max() < 1e-4
    assert torch.equal(flow.inverse(u, guidance=2.0), flow.inverse(u))


@pytest.mark.parametrize("variant", VARIANTS)
def test_density_integrates_to_one(variant):
    flow = small_flow(num_latents=2, latent_dim=1, std=0.06, **variant).double()
    axis = torch.linspace(-16, 16, 161).double()
    grid = torch.cartesian_prod(axis, axis)[:, :, None]  # (161^2, K = 2, d = 1)
    with torch.no_grad():
        density = flow.log_prob(grid, torch.full((len(grid),), 1)).exp()
    assert abs(density.sum() * (axis[1] - axis[0]) ** 2 - 1) < 1e-4


def test_log_prob_is_the_change_of_variables():
    flow, z = small_flow(), torch.randn(2, 6, 3)
    u, logdet = flow(z)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(dim=(1, 2))
    torch.testing.assert_close(flow.log_prob(z), normal + logdet)


def test_a_fresh_flow_is_the_identity_in_both_scales():
    for scale in ("exp", "softplus"):
        flow = NormalizingFlow(6, 3, 16, (1, 2), 8, 4, scale=scale)
        z = torch.randn(2, 6, 3)
        u, logdet = flow(z)
        torch.testing.assert_close(u, z, atol=1e-6, rtol=0)
        assert logdet.abs().max() < 1e-5
        assert math.isclose(
            flow.log_prob(torch.zeros(1, 6, 3)).item(), -9 * math.log(2 * math.pi), rel_tol=1e-5
        )


def test_layer_without_gate_equals_torch_transformer_layer():
    layer = randomize(Layer(16, 8, gated=False))
    reference = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.proj": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    state = {}
    for key, value in layer.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    reference.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = reference(x, src_mask=causal, is_causal=True)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_gate_of_the_normed_input_multiplies_the_heads_before_the_output_projection():
    attention = randomize(CausalGatedAttention(16, 8, gated=True))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        found, gate, proj = attention(x), torch.sigmoid(attention.gate(x)), attention.proj
        attention.proj = torch.nn.Identity()
        attention.gate.weight.zero_()
        attention.gate.bias.fill_(30.0)  # sigmoid = 1: the gate is open, these are the heads
        expected = proj(attention(x) * gate)
        open_ = proj(attention(x))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - open_).abs().max() > 1e-2


def test_intermediates_are_block_after_block_and_end_in_u():
    flow, z = small_flow(), torch.randn(2, 6, 3)
    outputs, logdet = flow.intermediates(z)
    x, total, labels = z, 0.0, torch.tensor([-1, -1])
    for block, output in zip(flow.blocks, outputs, strict=True):
        x, block_logdet = block(x, labels)
        total = total + block_logdet
        assert torch.equal(output, x)
    u, expected = flow(z)
    assert torch.equal(x, u) and torch.equal(logdet, expected) and torch.equal(total, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant):
    """Of the training loss, for one direction in the space of every parameter tensor."""
    flow = small_flow(**variant).double()
    z, labels = torch.randn(2, 6, 3).double(), torch.tensor([1, -1])
    flow.log_prob(z, labels).sum().backward()
    for name, parameter in flow.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(flow.log_prob(z, labels).sum())
                parameter.sub_(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        found = (parameter.grad * direction).sum()
        assert abs(found - expected) < 1e-6 * max(1, abs(expected)), name
        # A bias on all keys alike moves no attention; everything else is learned from the loss.
        assert parameter.grad.abs().max() > 0, name


def test_precision_is_never_lowered_and_the_argument_never_changed():
    flow = small_flow().double()
    u = torch.randn(2, 6, 3).double()
    before = u.clone()
    z = flow.inverse(u, torch.tensor([0, 1]), guidance=1.0)
    assert z.dtype == torch.float64 and torch.equal(u, before)
    assert (flow(flow.inverse(u))[0] - u).abs().max() < 1e-12
    half = small_flow().bfloat16()
    u, logdet = half(torch.randn(2, 6, 3))
    assert u.dtype == logdet.dtype == half.inverse(u).dtype == torch.float32


def test_unknown_scale_rule_and_sampler_are_refused():
    with pytest.raises(ValueError, match="scale"):
        small_flow(scale="relu")
    with pytest.raises(ValueError, match="rule"):
        small_flow().inverse(torch.randn(2, 6, 3), guidance=1.0, rule="tarflwo")
    with pytest.raises(ValueError, match="sampler"):
        small_flow().inverse(torch.randn(2, 6, 3), sampler="newton")


# --------------------------------------------------------------------------------------------------
# Sampling: many tokens at once, and what the token loop promises


def trained_flow(steps: int = 60) -> NormalizingFlow:
    """A flow that has learned two classes of tokens that depend on the ones before them."""
    flow = NormalizingFlow(32, 4, 32, (1, 1, 2), 16, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    i, j = torch.arange(32)[:, None], torch.arange(32)
    decay = (0.5 ** (i - j)).tril()  # z_i = z_{i-1} / 2 + ...
    for _ in range(steps):
        labels = torch.randint(2, (32,))
        z = decay @ (0.5 * torch.randn(32, 32, 4) + labels[:, None, None])
        loss = -flow.log_prob(z, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def count_sweeps(flow: NormalizingFlow, *arguments, **options) -> tuple[torch.Tensor, list[int]]:
    """The result of flow.inverse, and for each pass through a block the number of the block."""
    passes: list[int] = []
    x = flow.inverse(*arguments, **options, watch=lambda block, solved: passes.append(block))
    return x, passes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_latents", [1, 2, 5, 16, 128])
def test_jacobi_equals_sequential_on_random_weights(num_latents, variant):
    flow = small_flow(num_latents=num_latents, latent_dim=8, **variant)
    labels = torch.tensor([0, 3, -1])
    u = flow(torch.randn(3, num_latents, 8), labels)[0].detach()
    before = u.clone()
    for guidance, rule in ((0.0, "tarflow"), (0.5, "tarflow"), (0.5, "starflow")):
        expected = flow.inverse(u, labels, guidance, rule=rule)
        found = flow.inverse(u, labels, guidance, rule=rule, sampler="jacobi", tolerance=1e-6)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert num_latents == 1 or (expected - u).abs().max() > 0.05
    assert torch.equal(u, before)


def test_jacobi_equals_sequential_on_a_trained_flow_in_fewer_sweeps():
    flow, u, labels = trained_flow(), torch.randn(32, 32, 4), torch.arange(32) % 2
    for guidance in (0.0, 1.0):
        for rule in ("tarflow", "starflow"):
            expected = flow.inverse(u, labels, guidance, rule=rule)
            found, passes = count_sweeps(flow, u, labels, guidance, rule=rule, sampler="jacobi")
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert (expected - u).abs().max() > 1
            assert 3 <= len(passes) < 3 * 31 and list(dict.fromkeys(passes)) == [2, 1, 0]


@pytest.mark.parametrize("window", [1, 2, 4, 7, 15, 100])
def test_windows_of_every_size_are_exact_in_float64(window):
    block = small_flow(std=0.02, num_latents=16).blocks[1].double()
    u, labels = torch.randn(2, 16, 3).double(), torch.tensor([0, 3])
    guidance, heard = Guidance(1.0), []
    found = block.inverse(u, labels, guidance, window, 1e-12, lambda *told: heard.append(told))
    expected = block.inverse(u, labels, guidance)
    blocks, solved = zip(*heard, strict=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert set(blocks) == {1}
    assert sum(solved) == 15 and min(solved) >= 1 and max(solved) <= window
    assert len(solved) == 15 if window == 1 else len(solved) < 15


def test_one_token_a_sweep_is_exact_whatever_the_tolerance_misses():
    """A map that jacobi cannot hurry: x_i = u_i + 3 x_{i-1}, so that all later tokens change."""
    u, solved = torch.randn(2, 9, 3).double(), []
    x = jacobi(u, lambda x, start: (3 * x, torch.zeros_like(x)), 100, 0.0, solved.append)
    expected = u.clone()
    for i in range(1, 9):
        expected[:, i] += 3 * expected[:, i - 1]
    assert torch.equal(x, expected) and solved == [1] * 8


def test_what_does_not_change_at_all_is_solved_at_once_also_at_tolerance_0():
    u, solved = torch.randn(2, 9, 3), []
    identity = jacobi(u, lambda x, start: (0 * x, 0 * x), 100, 0.0, solved.append)
    assert torch.equal(identity, u) and solved == [8]


def test_the_deep_block_works_on_32_tokens_at_a_time_and_the_others_on_all():
    flow, heard = NormalizingFlow(100, 2, 8, (1, 1), 8, 0), []  # the identity, solved at once
    flow.inverse(torch.randn(1, 100, 2), sampler="jacobi", watch=lambda *told: heard.append(told))
    assert heard == [(1, 32), (1, 32), (1, 32), (1, 3), (0, 99)]


def test_a_token_is_solved_only_when_all_before_it_are():
    """x_i = x_{i-1}: token 2 does not change in the first sweep, but when token 1 is known; and
    only in one channel of the second sample."""
    u = torch.zeros(2, 4, 2)
    u[1, 0, 1] = 1.0
    x = jacobi(u, lambda x, start: (x, torch.zeros_like(x)), 3, 0.5, lambda solved: None)
    assert torch.equal(x, u[:, :1].expand(2, 4, 2))


def test_a_guess_that_overflows_does_not_spoil_the_tokens_before_it():
    flow = small_flow(num_latents=16)
    block, labels = flow.blocks[2], torch.tensor([0, 3])
    u = torch.randn(2, 16, 3)
    expected = block.inverse(u, labels)
    true_predict, overflows = block.predict, []

    def predict(x, *arguments):
        """The first guess leads to infinity and NaN in three tokens: made so here, since weights
        that do so by themselves also break the plain inverse."""
        mu, alpha = (output.clone() for output in true_predict(x, *arguments))
        if not overflows:
            mu[:, 5], alpha[:, 7], alpha[:, 9] = math.nan, math.inf, 1000.0
        overflows.append(not (mu + alpha).isfinite().all())
        return mu, alpha

    block.predict = predict
    found = block.inverse(u, labels, window=16, tolerance=1e-6)
    assert overflows[0] and len(overflows) > 2 and not any(overflows[1:])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_overflows_token_by_token_is_not_hidden_by_jacobi():
    flow = small_flow()
    with torch.no_grad():
        flow.blocks[2].proj_out.bias.fill_(200.0)
    u = torch.randn(2, 6, 3)
    assert not flow.inverse(u).isfinite().all()
    assert not flow.inverse(u, sampler="jacobi").isfinite().all()


def test_a_cache_takes_many_tokens_as_it_takes_one_by_one():
    block, labels = small_flow().blocks[2].double(), torch.tensor([0, -1])
    x, condition = torch.randn(2, 6, 3).double(), block.condition(labels)
    expected = torch.cat(block.predict(block.embed(x, block.position, condition)), dim=-1)
    for parts in ([1] * 6, [6], [2, 3, 1], [1, 5], [5, -3, 3, 1]):  # -3: three tokens once more
        cache, start, found = KeyValueCache(depth=2, num_tokens=6), 0, expected.clone().zero_()
        for T in parts:
            if T > 0:
                here, cache.length = slice(start, start + T), start
                h = block.embed(x[:, here], block.position[here], condition)
                outputs = block.predict(h, cache)
                found[:, here] = torch.cat(outputs, dim=-1)
            start += T
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_cache_is_never_copied():
    cache = KeyValueCache(depth=2, num_tokens=6)
    first = cache.append(1, torch.randn(2, 3, 1, 4, 8))
    cache.length = 4
    both = cache.append(1, torch.randn(2, 3, 1, 2, 8))
    assert both.shape == (2, 3, 1, 6, 8) and both.data_ptr() == first.data_ptr()
    assert both.untyped_storage().data_ptr() == cache.buffer.untyped_storage().data_ptr()


def test_the_token_loop_never_waits_for_the_device():
    """On the meta device nothing can be read, so that any wait for a value raises."""
    flow = small_flow().to("meta")
    u, labels = torch.empty(2, 6, 3, device="meta"), torch.empty(2, device="meta").long()
    for rule in ("tarflow", "starflow"):
        assert flow.inverse(u, labels, guidance=1.0, rule=rule).shape == u.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        flow.inverse(u, labels, sampler="jacobi")


def test_watch_hears_of_every_token_deep_block_first():
    heard = []
    u = torch.randn(2, 6, 3)
    watched = small_flow()
    watched.inverse(u, watch=lambda block, solved: heard.append((block, solved)))
    assert heard == [(2, 1)] * 5 + [(1, 1)] * 5 + [(0, 1)] * 5


def test_inverse_in_bfloat16_keeps_a_float32_state_near_the_exact_one():
    flow, u, labels = trained_flow(), torch.randn(4, 32, 4), torch.arange(4) % 2
    exact = flow.inverse(u, labels, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flow.inverse(u, labels, 1.0)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()
