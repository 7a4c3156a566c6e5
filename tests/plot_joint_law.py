"""What it costs to reveal tokens together: a law of two tokens that is known (not collected).

    python tests/plot_joint_law.py          # half a minute on one core; writes docs/emigm_joint.png

    z_0 = -1 or +1,    z_1 = z_0 + 0.1 n,    n ~ N(0, 1)

A small `emigm.MaskedPrior` learns it. Revealed one after the other, its tokens agree; revealed in
one step, each is as it should be, and knows nothing of the other: half of the samples fall into
corners where the truth has nothing.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not by pytest
from emigm import MaskedPrior, draw_tokens, sampling_order, visible_slots  # noqa: E402

STEPS, BATCH, LR = 300, 128, 4e-3
SMALL = dict(num_latents=2, latent_dim=1, width=16, heads=2, encoder_depth=1, decoder_depth=1)
SMALL |= dict(buffer=1, head_width=48, head_depth=2, num_classes=0)


def truth(count: int, generator: torch.Generator) -> Tensor:
    """Samples (count, 2, 1) of the law."""
    sign = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    other = sign + 0.1 * torch.randn(count, generator=generator)
    return torch.stack((sign, other), dim=1)[:, :, None]


def train_prior(steps: int = STEPS) -> MaskedPrior:
    """A prior trained on the law, in seconds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    prior, labels = MaskedPrior(**SMALL), torch.full((BATCH,), -1)
    prior.fit(truth(4096, generator))
    optimizer = torch.optim.AdamW(prior.parameters(), LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        draws = draw_tokens(BATCH, 2, 1, "linear", 0.0, generator=generator)
        slots = visible_slots(2, "linear", 0.0)
        loss = prior(truth(BATCH, generator), labels, draws, slots).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prior


def sample(prior: MaskedPrior, count: int, steps: int) -> Tensor:
    """Samples (count, 2) of the prior, its two tokens revealed in `steps` steps."""
    u = torch.randn(count, 2, 1, generator=torch.Generator().manual_seed(2))
    order = sampling_order(0, range(count), 2)
    how = dict(steps=steps, evaluations=32, schedule="linear")
    return prior.sample(u, order=order, **how)[:, :, 0]


def main() -> None:
    from matplotlib.figure import Figure

    prior, count = train_prior(3 * STEPS), 1000
    panels = {
        "truth": truth(count, torch.Generator().manual_seed(3))[:, :, 0],
        "both tokens in 1 step": sample(prior, count, steps=1),
        "one after the other, 2 steps": sample(prior, count, steps=2),
    }
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, z) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        correlation = torch.corrcoef(z.T)[0, 1]
        axes.scatter(z[:, 0], z[:, 1], s=4, alpha=0.3)
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xlabel="z_0", ylabel="z_1", aspect="equal")
        axes.set_title(f"{name}\ncorrelation {correlation:.2f}", fontsize=10)
    path = ROOT / "docs/emigm_joint.png"
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
