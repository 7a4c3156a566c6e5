"""Captions: what holds exactly in the flow, in the data, in a run; what a user is told."""

import itertools
import math
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    assert_same,
    last,
    launcher,
    randomize,
    read_log,
    without_time,
    write_pictures,
)
from judge_captions import bits
from test_train import RUN_IN_FLOAT64

import evaluate
import sample
import spectral
import train
from common import data, shapes
from common.runs import InputError
from common.shapes import COLOURS, NAMES, PAIRS, SHAPES
from flow import NormalizingFlow

CAPTIONS = torch.tensor([[0, 5, 2, -1], [6, -1, -1, -1], [3, 3, 1, 4]])  # L = 4 of 7 words
EMPTY = torch.full_like(CAPTIONS, -1)
ONE_WAY_AND_THE_OTHER = pytest.mark.parametrize("depths", [(1, 1, 2), (1, 2)])  # of the deep block


def caption_flow(std: float = 0.1, **changes) -> NormalizingFlow:
    sizes = dict(num_latents=6, latent_dim=3, width=16, depths=(1, 1, 2), head_dim=8)
    sizes |= dict(num_classes=7, caption_words=4)
    return randomize(NormalizingFlow(**{**sizes, **changes}), std).double()


def latents(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 6, 3, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# The flow


def test_an_empty_caption_is_no_caption_to_the_bit():
    flow, z = caption_flow(), latents()
    assert torch.equal(flow.log_prob(z, EMPTY), flow.log_prob(z))
    for how in (dict(), dict(guidance=2.0), dict(sampler="jacobi")):
        assert torch.equal(flow.inverse(z, EMPTY, **how), flow.inverse(z, **how))
    assert (flow.log_prob(z, CAPTIONS) - flow.log_prob(z)).abs().min() > 1e-3


def test_a_dropped_caption_is_an_empty_one_to_the_bit(tiny):
    config = replace(tiny, caption_words=4, num_classes=7, label_drop=0.5)
    step = train.JointTraining(train.MIMFlow(config), train.FrozenNetworks(None, {}))
    randomize(step, 0.1)
    images, rows = torch.rand(8, 3, 16, 16), torch.randint(7, (8, 4))
    draws = train.draw_randomness(config, 0, torch.device("cpu"))
    assert 0 < draws.drop_label.sum() < 8
    by_hand = torch.where(draws.drop_label[:, None], torch.full_like(rows, -1), rows)
    kept = draws._replace(drop_label=torch.zeros(8, dtype=torch.bool))
    losses = [step(images, y, d, 1.0)[0] for y, d in ((rows, draws), (by_hand, kept), (rows, kept))]
    assert losses[0] == losses[1] != losses[2]


def test_a_flow_without_captions_has_the_same_weights_and_numbers_as_ever():
    def names(**changes) -> set[str]:
        return {name for name, _ in caption_flow(**changes).named_parameters()}

    block = {"position", "proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias"}
    plain = names(caption_words=0, num_classes=0)
    outer = {n.split(".", 2)[2] for n in plain if ".layers." not in n}
    assert outer == block
    assert names(caption_words=0) - plain == {f"blocks.{i}.class_embed" for i in range(3)}
    assert names() - plain == {"blocks.2.class_embed", "blocks.2.place"}
    # And no random number is drawn for what is not there: sums of the weights, of what is drawn
    # next, of densities and of guided samples, at commit 3f5c35a.
    unconditional = (92.09757, -14.59992, -73.02225, -8.96666)
    four_classes = (99.01325, 1.47645, -58.46797, -10.81788)
    for classes, before in {0: unconditional, 4: four_classes}.items():
        torch.manual_seed(3)
        flow = NormalizingFlow(6, 3, 16, (1, 2), 8, num_classes=classes)
        sums = [sum(float(p.detach().double().sum()) for p in flow.parameters())]
        z, labels = torch.randn(2, 6, 3), torch.tensor([classes - 1, -1])
        flow, z = randomize(flow, 0.1).double(), z.double()
        with torch.no_grad():
            found = z, flow.log_prob(z, labels), flow.inverse(z, labels, guidance=0.5)
        sums += [float(x.sum()) for x in found]
        assert sums == pytest.approx(before, abs=1e-4)


@ONE_WAY_AND_THE_OTHER
def test_only_the_deep_block_reads_and_its_first_token_does(depths):
    flow, z = caption_flow(depths=depths), latents()
    one, _ = flow.intermediates(z, CAPTIONS)
    other, _ = flow.intermediates(z, CAPTIONS.roll(1, 0))
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))
    first = -1 if flow.blocks[-1].backward else 0
    assert (one[-1] - other[-1])[:, first].abs().min() > 1e-4
    without, _ = flow.intermediates(z)
    assert (without[-1][:, first] - one[-2][:, first]).abs().min() > 1e-4  # the places predict it


@ONE_WAY_AND_THE_OTHER
@pytest.mark.parametrize("variant", [{}, dict(gated=False, scale="softplus")])
def test_inverse_of_forward_is_the_input_with_captions(depths, variant):
    flow, z = caption_flow(depths=depths, **variant), latents()
    u, _ = flow(z, CAPTIONS)
    assert (u - z).abs().max() > 0.1
    for sampler in ("sequential", "jacobi"):
        found = flow.inverse(u, CAPTIONS, sampler=sampler, tolerance=0.0)
        torch.testing.assert_close(found, z, atol=1e-12, rtol=0)
    deep, last_but_one = flow.blocks[-1], flow.intermediates(z, CAPTIONS)[0][-2]
    for window in range(1, 7):
        found = deep.inverse(u, CAPTIONS, window=window, tolerance=0.0)
        torch.testing.assert_close(found, last_but_one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
@pytest.mark.parametrize("annealed", [True, False])
def test_guided_samples_are_the_formula_on_the_whole_sequence_read_anew(rule, annealed):
    flow, u, w = caption_flow(), latents(), 1.5
    deep, L = flow.blocks[-1], 4

    def predicted(x, captions, i):  # mu and alpha of token i from [places, x_0 .. x_5]
        tokens = deep.proj_in(x) + deep.position
        places = []
        for row in captions.tolist():
            words = [deep.class_embed[word] if word >= 0 else torch.zeros(16) for word in row]
            places.append(torch.stack(words).double() + deep.place)
        outputs = deep.predict(torch.cat((torch.stack(places), tokens), dim=1))
        return (output[:, L + i - 1] for output in outputs)

    x = u.clone()
    for i in range(6):
        mu_c, a_c = predicted(x, CAPTIONS, i)
        mu_u, a_u = predicted(x, EMPTY, i)
        w_i = w * i / 5 if annealed else w
        if rule == "tarflow":
            mu, sigma = mu_c + w_i * (mu_c - mu_u), torch.exp(a_c + w_i * (a_c - a_u))
        else:
            s = torch.minimum(a_c.exp() / a_u.exp(), torch.ones((), dtype=torch.float64)) ** 2
            mu = ((1 + w_i) * mu_c - w_i * s * mu_u) / (1 + w_i - w_i * s)
            sigma = a_c.exp() / torch.sqrt(1 + w_i - w_i * s)
        x[:, i] = u[:, i] * sigma + mu
    how = dict(guidance=w, annealed=annealed, rule=rule)
    shallow = flow.blocks[0].inverse(flow.blocks[1].inverse(x, CAPTIONS), CAPTIONS)
    for sampler in ("sequential", "jacobi"):
        found = flow.inverse(u, CAPTIONS, sampler=sampler, tolerance=0.0, **how)
        torch.testing.assert_close(found, shallow, atol=1e-10, rtol=0)
    assert (shallow - flow.inverse(u, CAPTIONS)).abs().max() > 1e-3
    unguided = flow.inverse(u, CAPTIONS)
    changed = deep(flow.intermediates(unguided, CAPTIONS)[0][-2], CAPTIONS)[0] - u
    assert changed.abs().max() < 1e-10


@ONE_WAY_AND_THE_OTHER
def test_logdet_is_that_of_the_dense_jacobian_with_captions(depths):
    flow, z = caption_flow(depths=depths), latents()
    _, logdet = flow(z, CAPTIONS)
    found = spectral.singular_extremes(flow, z, CAPTIONS)
    for i in range(3):
        dense = torch.autograd.functional.jacobian(
            lambda x, i=i: flow(x.view(1, 6, 3), CAPTIONS[i : i + 1])[0].flatten(), z[i].flatten()
        )
        sign, expected = torch.linalg.slogdet(dense)
        assert sign == 1 and abs(logdet[i] - expected) < 1e-10 and abs(expected) > 0.01
        values = torch.linalg.svdvals(dense)
        assert abs(found.sigma_max[i] / values[0] - 1) < 1e-4
        assert abs(found.sigma_min[i] / values[-1] - 1) < 1e-4
    nothing = spectral.singular_extremes(flow, z)
    assert_same(nothing.sigma_max, spectral.singular_extremes(flow, z, EMPTY).sigma_max)


@ONE_WAY_AND_THE_OTHER
def test_a_token_depends_on_no_later_one_and_on_every_word(depths):
    block, z = caption_flow(depths=depths).blocks[-1], latents(1)
    caption = torch.tensor([[0, 5, 2, 1]])
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x, caption)[0], z)
    influence = jacobian[0, :, :, 0].abs().amax(dim=(1, 3))  # (token of u, token of x)
    if block.backward:
        influence = influence.flip(0, 1)
    assert (influence.triu(1) == 0).all() and (influence.tril() > 0).sum() == 21
    for place in range(4):
        other = caption.clone()
        other[0, place] = 6
        moved = (block(z, other)[0] - block(z, caption)[0]).abs().amax(dim=2)
        assert (moved > 1e-9).all()


def test_captions_of_a_batch_do_not_mix():
    flow, z, order = caption_flow(), latents(), torch.tensor([2, 0, 1])
    whole = flow.log_prob(z, CAPTIONS)
    torch.testing.assert_close(flow.log_prob(z[order], CAPTIONS[order]), whole[order])
    samples = flow.inverse(z, CAPTIONS, guidance=1.0)
    torch.testing.assert_close(
        flow.inverse(z[order], CAPTIONS[order], guidance=1.0), samples[order]
    )
    for i in range(3):
        alone = flow.log_prob(z[i : i + 1], CAPTIONS[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1])


def test_an_empty_place_reads_no_word_and_the_order_of_words_counts():
    flow, z = caption_flow(), latents()
    flow.log_prob(z, CAPTIONS).sum().backward()
    table = flow.blocks[-1].class_embed
    used = set(CAPTIONS.unique().tolist()) - {-1}
    assert [bool(row.abs().max() > 0) for row in table.grad] == [i in used for i in range(7)]
    table.grad = None
    flow.log_prob(z, EMPTY).sum().backward()
    assert table.grad is None or (table.grad == 0).all()
    exchanged = CAPTIONS[:, [1, 0, 2, 3]]
    change = flow.log_prob(z, exchanged) - flow.log_prob(z, CAPTIONS)
    assert change[0].abs() > 1e-4 and change[2] == 0  # the third caption has one word twice


def test_the_mixture_of_all_captions_costs_at_most_their_number(tiny, tmp_path):
    model = train.MIMFlow(replace(tiny, caption_words=8, num_classes=21), captioned().class_names)
    randomize(model.flow, 0.1)
    everything = [shapes.describe(shape, colour) for shape in SHAPES for colour in COLOURS]
    z = torch.randn(60, 4, 4)
    true, mixture, _ = bits(model, z, everything, everything)
    assert (mixture - true).max() <= math.log2(60) + 1e-4
    assert (mixture - true).min() < 0 < (mixture - true).max()
    one = bits(model, z[:5], everything[:5], everything[3:4])
    torch.testing.assert_close(one[1][3], one[0][3])  # a mixture of one is that one


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \(3, 4\), got \(3,\)"):
        caption_flow()(latents(), CAPTIONS[:, 0])
    with pytest.raises(ValueError, match=r"labels must be \(3,\), got \(3, 4\)"):
        caption_flow(caption_words=0).log_prob(latents(), CAPTIONS)


# --------------------------------------------------------------------------------------------------
# Pictures with captions


def captioned(split: str = "train") -> shapes.CaptionedShapes:
    return data.open_dataset(None, 32, split, seed=0, places=8)


def test_held_out_pairs_never_come_and_every_word_does():
    dataset, pairs, words = captioned(), Counter(), Counter()
    assert len(dataset) == 50_000 and len(PAIRS) == 50
    for index in range(50_000):
        (shape, colour, _, _), _ = dataset.attributes(index)
        pairs[shape, colour] += 1
        words.update(dataset.row(index, epoch=0).tolist())
    missing = set(itertools.product(range(10), range(6))) - pairs.keys()
    assert missing == {(s, c) for s in range(10) for c in range(6) if (s + c) % 6 == 0}
    assert pairs.keys() == set(PAIRS) and min(pairs.values()) > 800
    assert words.keys() == {*range(len(dataset.class_names)), -1} and min(words.values()) > 3000
    sizes = sum(words[dataset.known[size]] for size in shapes.SIZES)
    assert 0.74 < sizes / 50_000 < 0.76  # a quarter of the captions does not name it
    val = captioned("val")
    assert any(val.attributes(i)[0] != dataset.attributes(i)[0] for i in range(9))
    assert {val.attributes(i)[0][:2] for i in range(2000)} == set(PAIRS)


def test_captions_say_what_is_there_and_change_with_the_epoch_only():
    dataset, ways = captioned(), set()
    for index in range(40):
        image, row = dataset[7, index]
        assert torch.equal(row, dataset.row(index, 7)) and row.shape == (8,)
        assert torch.equal(image, dataset[8, index][0]) and torch.equal(image, dataset[index][0])
        names = dataset.class_names
        said = {names[word] for word in row.tolist() if word >= 0} - {"a", "on", "ground"}
        values = dataset.attributes(index)[0]
        full = [k[i] for k, i in zip(NAMES, values, strict=True)]
        assert said <= set(full) and full[0] in said
        assert dataset.caption(index) == f"a {full[3]} {full[1]} {full[0]} on a {full[2]} ground"
        ways |= {dataset.caption(index, epoch) for epoch in range(60)} if index == 0 else set()
    assert len(ways) >= 12  # three wordings, three attributes that may be left out


def test_pictures_of_the_preset_shapes_are_what_they_were():
    """Means of commit 3f5c35a, before render_shape could be told ground and radius."""
    before = [-0.362112, -0.133864, -0.412428, -0.551757, -0.448392]
    before += [-0.446002, -0.548665, -0.610498, -0.477734, -0.494725]
    found = [float(shapes.ShapesDataset(32)[i][0].mean()) for i in range(10)]
    assert found == pytest.approx(before, abs=1e-4)


def test_own_captions_are_lines_beside_the_picture(tmp_path):
    folder = tmp_path / "set"
    write_pictures(folder, 4)
    (folder / "0.txt").write_text("A red Bus.\n\n  a blue bus, parked\n42\n")
    (folder / "1.txt").write_text("\ufeffa red tram\n", "utf-8")
    (folder / "2.txt").write_bytes(b"\n")
    dataset = data.open_dataset(str(folder), 16, seed=3, places=3)
    assert dataset.class_names == ("a", "bus", "red")  # twice or more; "tram" comes once
    assert [dataset.row(i).tolist() for i in range(4)] == [
        [0, 2, 1],
        [0, 2, -1],
        [-1] * 3,
        [-1] * 3,
    ]
    seen = Counter(tuple(dataset.row(0, epoch).tolist()) for epoch in range(400))
    assert seen.keys() == {(0, 2, 1), (0, 1, -1)} and min(seen.values()) > 150
    assert dataset.row(0, 5).tolist() == dataset[5, 0][1].tolist()
    for epoch in range(20):  # flipped in half of the epochs if there were no captions
        assert torch.equal(dataset[epoch, 1][0], dataset[1][0])
    pictures = data.Pictures(str(folder), 16, places=3)
    images, rows, _ = pictures[range(4)]
    assert images.shape == (4, 3, 16, 16) and rows.shape == (4, 3)
    assert "no val/" in pictures.describe()["split"]  # training sees them all


def test_check_data_names_what_stands_alone(tmp_path, capsys):
    for split in ("train", "val"):
        write_pictures(tmp_path / split, 3)
        for i in (0, 2, 7):
            (tmp_path / split / f"{i}.txt").write_text("a bus")
    with pytest.raises(SystemExit) as end:
        data.check_data(str(tmp_path), 16, 4)
    said = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and said[-1].startswith("6 pictures, 2 words, 4 captions or")
    for split in ("train", "val"):
        assert f"{tmp_path / split / '1.png'} has no caption" in said
        assert f"{tmp_path / split / '7.txt'} has no picture" in said
    assert len(said) == 5


def test_a_folder_without_captions_is_one_clear_line(tmp_path, capsys):
    write_pictures(tmp_path / "set", 2)
    with pytest.raises(SystemExit):
        data.open_dataset(str(tmp_path / "set"), 16, places=3)
    assert "no word comes twice" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# A run


@pytest.fixture
def captions(tiny) -> train.Config:
    return replace(tiny, preset="captions", caption_words=8, num_classes=None, label_drop=0.3)


def test_resumed_equals_uninterrupted_with_captions(captions, tmp_path):
    train.main(captions)
    stopped = replace(captions, out=str(tmp_path / "stopped"), lr_decay=0.0)
    whole = replace(stopped, out=str(tmp_path / "whole"))
    train.main(whole)
    train.main(replace(stopped, steps=4))
    train.main(stopped)
    for key in ("model", "ema", "optimizer", "step", "class_names"):
        assert_same(last(whole.run_dir)[key], last(stopped.run_dir)[key])
    assert without_time(read_log(whole.run_dir))[-1] == without_time(read_log(stopped.run_dir))[-1]
    assert last(captions.run_dir)["class_names"] == list(captioned().class_names)


def test_two_processes_equal_one_with_captions(tiny_flags, tmp_path, float64):
    flags = ["--preset", "captions", *tiny_flags, "--num-workers", "0", "--steps", "3"]
    script = tmp_path / "run64.py"
    script.write_text(RUN_IN_FLOAT64)
    train.main(train.parse_arguments([*flags, "--out", str(tmp_path / "one")])[0])
    two = [*launcher(2), str(script), *flags, "--out", str(tmp_path / "two")]
    how = dict(env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run(two, timeout=240, **how)
    assert done.returncode == 0, done.stderr
    one, two = (last(tmp_path / name)["model"] for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


def test_phase_two_reads_as_many_words_as_phase_one(captions, tmp_path, capsys):
    train.main(replace(captions, steps=1))
    init, out = str(captions.run_dir / "model.pt"), str(tmp_path / "two")
    two = replace(captions, phase="decoder", gan_weight=0.0, init=init, out=out, caption_words=5)
    assert "has --caption-words 8: add" in told(lambda: train.main(two), capsys)


def told(work, capsys, code: int = 2) -> str:
    """The one line with which `work` ends."""
    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_prompts_from_a_checkpoint_to_a_grid_and_what_is_refused(captions, tmp_path, capsys):
    train.main(replace(captions, steps=2))
    assert "21 words; " in capsys.readouterr().out  # and not 21 classes
    path, out, lines = captions.run_dir / "model.pt", tmp_path / "x.npz", tmp_path / "prompts"

    def ask(*flags):
        return lambda: sample.main(sample.parse_arguments([str(path), *map(str, flags)]))

    ask("--prompt", "A RING", "", "--num", 5, "--npz", out)()
    pictures = np.load(out)
    assert pictures["arr_0"].shape == (5, 16, 16, 3) and pictures["arr_1"].tolist() == [
        0,
        1,
        0,
        1,
        0,
    ]
    lines.write_text("a ring\n\n")
    ask("--prompts", lines, "--num", 3, "--npz", tmp_path / "y.npz")()  # one prompt
    found = np.load(tmp_path / "y.npz")
    assert (found["arr_0"][::2] == pictures["arr_0"][:3:2]).all() and not found["arr_1"].any()
    model = train.load_checkpoint(path)
    noise = train.sample_noise(0, range(1, 2), 4, 4)
    expected = shapes.to_uint8(model.sample(noise, None, 1.0)).permute(0, 2, 3, 1)[0]
    assert (pictures["arr_0"][1] == expected.numpy()).all()  # "" = the empty caption
    ask("--prompt", "a ring", "a star")()
    assert (captions.run_dir / "grid.png").exists()

    assert "words: a, arrow, bar" in told(ask(), capsys)
    line = told(ask("--prompt", "a green dog and a cat"), capsys)
    assert line.startswith("error: unknown: dog, and, cat;") and "yellow" in line
    assert "is too long: this model reads 8 words" in told(ask("--prompt", "a " * 9), capsys)
    assert shapes.read_prompts(["a " * 8], None, ["a"], 8)[1] == [[0] * 8]
    assert "without such a flag" in told(ask("--classes", "3"), capsys)
    assert "is no file" in told(ask("--prompts", tmp_path), capsys)
    with pytest.raises(InputError, match="cannot read star"):  # a word, and no class to sample
        ask("--reconstruct", "star")()
    for what in ("probe", "map"):
        flags = evaluate.parse_arguments([what, str(path), "--device", "cpu"])
        assert "has no classes" in told(lambda f=flags: evaluate.main(f), capsys)
    flags = evaluate.parse_arguments(["generation", str(path), str(out)])
    flags.device = torch.device("cpu")
    assert "--prompts FILE --npz" in told(lambda: evaluate.sample_checkpoint(flags), capsys)


def test_what_captions_cannot_go_with_is_refused(captions, tmp_path, capsys):
    frozen = dict(freeze_autoencoder=True, init="x.pt")
    line = told(lambda: train.check_config(replace(captions, prior="emigm", **frozen)), capsys)
    assert "--caption-words needs --prior flow" in line
    assert "--caption-words" in told(
        lambda: train.check_config(replace(captions, num_classes=0)), capsys
    )
    with pytest.raises(SystemExit):
        sample.main(
            sample.parse_arguments([str(ROOT / "checkpoints/shapes.pt"), "--prompt", "a ring"])
        )
    assert "without such a flag" in capsys.readouterr().err
