"""losses.py and common/weights.py: each loss by hand, each frozen network against another
implementation of it, each way in which a weight file can be wrong."""

import copy
import hashlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lpips
import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import randomize

from common.weights import (
    RANDOM,
    WEIGHT_FILES,
    Frozen,
    Scripted,
    WeightFile,
    WeightsMissing,
    find_weights,
    load_weights,
)
from losses import (
    CLIP,
    HOG,
    TEACHERS,
    DINOv2,
    PatchDiscriminator,
    Perceptual,
    auxiliary_loss,
    discriminator_loss,
    finetune_loss,
    flow_nll,
    generator_loss,
    joint_loss,
    pixel_loss,
    reconstruction_loss,
)

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
OPENAI = np.array(
    [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]],
)[:, :, None, None]


def cubic_matrix(new: int, old: int, step: float) -> np.ndarray:
    """(new, old): bicubic resampling of one axis, a = -0.75, borders repeated, by the formula."""
    matrix = np.zeros((new, old))
    for i in range(new):
        source = (i + 0.5) * step - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            t = abs(source - tap)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


def resized(table: np.ndarray, new: int, step: float) -> np.ndarray:
    """(..., old, old) -> (..., new, new)."""
    matrix = cubic_matrix(new, table.shape[-1], step)
    return matrix @ table @ matrix.T


def resized_positions(table: torch.Tensor, new: int, step: float) -> torch.Tensor:
    """(1 + old^2, C) -> (1 + new^2, C), the class token's row kept."""
    side = math.isqrt(len(table) - 1)
    grid = resized(table[1:].numpy().T.reshape(-1, side, side), new, step)
    return torch.cat((table[:1], torch.from_numpy(grid.reshape(-1, new * new).T).float()))


def normalized(images: torch.Tensor, statistics: np.ndarray) -> np.ndarray:
    return ((images.numpy() + 1) / 2 - statistics[0]) / statistics[1]


# --------------------------------------------------------------------------------------------------
# The losses


def test_pixel_loss_is_the_mean_square_over_the_whole_image():
    x, y = torch.randn(2, 3, 3, 4, 4)
    expected = [np.mean((a - b) ** 2) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(pixel_loss(x, y).numpy(), expected, rtol=1e-6)


def test_mim_weight_scales_the_errors_in_masked_patches_only():
    x, y = torch.randn(2, 2, 3, 8, 8)
    mask = torch.tensor([[True, False, False, False], [False, True, True, False]])
    expected = np.zeros(2)
    for b, c, row, col in np.ndindex(2, 3, 8, 8):
        weight = 5 if mask[b, 2 * (row // 4) + col // 4] else 1
        expected[b] += weight * (x - y)[b, c, row, col] ** 2 / (3 * 8 * 8)
    np.testing.assert_allclose(pixel_loss(x, y, mask, 5.0).numpy(), expected, rtol=1e-5)
    assert torch.equal(pixel_loss(x, y, mask, 1.0), pixel_loss(x, y))


def test_nll_parts_add_up_to_the_negative_log_density_per_number():
    u, logdet = torch.randn(3, 4, 5).double(), torch.randn(3).double()
    square, volume = flow_nll(u, logdet)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(dim=(1, 2)) + logdet
    expected = -log_density / 20 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(square + volume, expected)
    torch.testing.assert_close(volume, -logdet / 20)


def test_sums_of_losses_weigh_their_second_term():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -10.0])
    for total in (reconstruction_loss, joint_loss, finetune_loss):
        assert total(first, second, 0.1).tolist() == [2.0, 1.0]


def test_equal_parts_average_to_the_whole():
    x, y = torch.randn(2, 8, 3, 4, 4).double()
    parts = [pixel_loss(x[i : i + 2], y[i : i + 2]).mean() for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), pixel_loss(x, y).mean())


def test_auxiliary_loss_is_the_negative_cosine_of_the_masked_patches_of_each_image():
    predicted, target = torch.randn(2, 3, 4, 5)
    # Numbers of masked patches that differ, and an image with none: that one counts all patches.
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    expected = []
    for h, f, hidden in zip(predicted.numpy(), target.numpy(), mask.numpy(), strict=True):
        patches = np.flatnonzero(hidden) if hidden.any() else range(4)
        cosines = [h[i] @ f[i] / np.linalg.norm(h[i]) / np.linalg.norm(f[i]) for i in patches]
        expected.append(-np.mean(cosines))
    np.testing.assert_allclose(auxiliary_loss(predicted, target, mask), expected, rtol=1e-5)


def test_auxiliary_loss_sends_gradient_through_masked_patches_only():
    predicted = torch.randn(2, 6, 5, requires_grad=True)
    mask = torch.rand(2, 6) < 0.5
    assert mask.any(dim=1).all()
    auxiliary_loss(predicted, torch.randn(2, 6, 5), mask).sum().backward()
    assert torch.equal(predicted.grad.abs().sum(dim=-1) > 0, mask)


def test_auxiliary_loss_raises_half_precision_and_never_lowers_double():
    mask = torch.ones(1, 2, dtype=torch.bool)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        h = torch.randn(1, 2, 4, dtype=dtype)
        assert auxiliary_loss(h, torch.randn(1, 2, 4), mask).dtype == expected


def test_hinge_losses_by_hand():
    real = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]).view(2, 1, 1, 2)
    fake = torch.tensor([[0.5, -2.0], [-1.0, -3.0]]).view(2, 1, 1, 2)
    assert generator_loss(fake).tolist() == [0.75, 2.0]
    # Real: hinges 1, 0 and 2, 0; fake: 1.5, 0 and 0, 0.
    assert discriminator_loss(real, fake).tolist() == [0.5 * (0.5 + 0.75), 0.5 * (1.0 + 0.0)]


# --------------------------------------------------------------------------------------------------
# The discriminator


def test_discriminator_is_the_published_patchgan():
    discriminator = randomize(PatchDiscriminator())
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    state = list(discriminator.state_dict().values())
    x = images = torch.randn(2, 3, 40, 40)

    x = F.leaky_relu(F.conv2d(x, state[0], state[1], stride=2, padding=1), 0.2)
    for first, stride in ((2, 2), (5, 2), (8, 1)):
        kernel, scale, shift = state[first : first + 3]
        x = F.conv2d(x, kernel, stride=stride, padding=1)
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()  # of the batch, in eval mode too
        x = F.leaky_relu(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), 0.2)
    x = F.conv2d(x, state[11], state[12], padding=1)
    for mode in (True, False):
        torch.testing.assert_close(discriminator.train(mode)(images), x)
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name])  # looking changes no statistics

    kernels = [tuple(value.shape) for value in state if value.ndim == 4]
    widths = [3, 64, 128, 256, 512, 1]
    assert kernels == [(widths[i + 1], widths[i], 4, 4) for i in range(5)]


@pytest.mark.parametrize("side, logits", [(256, 30), (32, 2), (24, 1)])
def test_discriminator_judges_overlapping_patches(side, logits):
    assert PatchDiscriminator()(torch.randn(2, 3, side, side)).shape == (2, 1, logits, logits)


def test_discriminator_and_lpips_refuse_images_that_leave_nothing_to_judge(perceptual):
    with pytest.raises(ValueError, match="at least 24 x 24 pixels, got 23 x 40"):
        PatchDiscriminator()(torch.randn(2, 3, 23, 40))
    small = torch.zeros(1, 3, 15, 16)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 15 x 16"):
        perceptual(small, small)


def test_discriminator_starts_like_dcgan():
    for module in PatchDiscriminator().modules():
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.mean()) < 0.003
            assert abs(module.weight.std() - 0.02) < 0.003
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and 0.01 < module.weight.std() < 0.03


def test_discriminator_and_decoder_each_learn_from_their_own_loss():
    discriminator, decoded = PatchDiscriminator(), torch.randn(2, 3, 32, 32, requires_grad=True)
    real = torch.randn(2, 3, 32, 32)
    discriminator_loss(discriminator(real), discriminator(decoded.detach())).sum().backward()
    assert decoded.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    generator_loss(discriminator(decoded)).sum().backward()
    assert decoded.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------
# Weight files


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """torch.hub's cache, empty; the published "vgg" file is a small one on this disk."""
    source = tmp_path / "published" / "vgg16-397923af.pth"
    source.parent.mkdir()
    torch.save({"a": torch.arange(3.0)}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(WEIGHT_FILES, "vgg", WeightFile(source.as_uri(), digest[:8]))
    return tmp_path / "home" / "hub" / "checkpoints"


def assert_helps(line: str, kind: str, place: Path) -> None:
    """One line that names the file, its address, where to put it and the flag."""
    assert "\n" not in line
    for word in (WEIGHT_FILES[kind].filename, WEIGHT_FILES[kind].url, str(place)):
        assert word in line
    assert f"--{kind} FILE" in line


def test_weights_are_downloaded_once_then_found(cache, monkeypatch):
    place = cache / "vgg16-397923af.pth"
    assert find_weights("vgg") == place
    assert torch.load(place, weights_only=True)["a"].tolist() == [0, 1, 2]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # calling it would raise
    assert find_weights("vgg") == place


def test_of_two_that_start_together_one_downloads_and_the_other_waits(cache, monkeypatch):
    real, calls = torch.hub.download_url_to_file, []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.5)
        real(*arguments)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(find_weights, ["vgg", "vgg"]))
    assert len(calls) == 1 and places == 2 * [cache / "vgg16-397923af.pth"]


def test_only_one_process_of_a_machine_shows_a_download_bar(cache, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    find_weights("vgg")
    assert capsys.readouterr().err == ""
    (cache / "vgg16-397923af.pth").unlink()
    monkeypatch.setenv("LOCAL_RANK", "0")
    find_weights("vgg")
    assert capsys.readouterr().err != ""


def test_a_flag_names_a_file_whatever_its_hash(cache, tmp_path):
    own = tmp_path / "own.pth"
    own.write_bytes(b"anything")
    assert find_weights("vgg", str(own)) == own
    with pytest.raises(WeightsMissing) as error:
        find_weights("vgg", str(tmp_path / "absent.pth"))
    assert_helps(str(error.value), "vgg", cache / "vgg16-397923af.pth")
    assert "absent.pth: no such file" in str(error.value)


def test_a_cached_file_with_another_hash_is_refused(cache):
    cache.mkdir(parents=True)
    place = cache / "vgg16-397923af.pth"
    torch.save({"a": torch.zeros(3)}, place)
    with pytest.raises(WeightsMissing) as error:
        find_weights("vgg")
    assert_helps(str(error.value), "vgg", place)
    assert f"expected {WEIGHT_FILES['vgg'].sha256}" in str(error.value)
    assert "delete it" in str(error.value)


def test_a_download_with_another_hash_leaves_nothing_behind(cache, monkeypatch):
    wrong = WEIGHT_FILES["vgg"]._replace(sha256="00000000")
    monkeypatch.setitem(WEIGHT_FILES, "vgg", wrong)
    with pytest.raises(WeightsMissing) as error:
        find_weights("vgg")
    assert_helps(str(error.value), "vgg", cache / "vgg16-397923af.pth")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_a_failed_download_is_one_line_that_helps(cache, monkeypatch, kind):
    def fail(*arguments, **options):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsMissing, match="Name or service not known") as error:
        find_weights(kind)
    assert_helps(str(error.value), kind, cache / WEIGHT_FILES[kind].filename)


def test_published_hashes_are_those_in_the_file_names():
    # torch.hub's convention: NAME-HASH.pth; the others are long and come with the address.
    for kind in ("vgg", "inception"):
        name, digest, _ = WEIGHT_FILES[kind].filename.replace(".", "-").rsplit("-", 2)
        assert WEIGHT_FILES[kind].sha256 == digest
    assert len(WEIGHT_FILES["dino"].sha256) == 64
    assert WEIGHT_FILES["clip"].sha256 in WEIGHT_FILES["clip"].url


def test_random_weights_need_no_file():
    for kind in WEIGHT_FILES:
        assert find_weights(kind, "random") == RANDOM


@pytest.mark.parametrize("content", ["noise", "other keys", "other shape", "a list", "absent"])
def test_a_file_that_holds_something_else_is_one_line_that_helps(cache, tmp_path, content):
    path, layer = tmp_path / "given.pth", nn.Linear(2, 3)
    if content == "noise":
        path.write_bytes(bytes(range(256)))
    elif content == "a list":
        torch.save([torch.zeros(3)], path)
    elif content == "other keys":
        torch.save({"weight": layer.weight, "bias": layer.bias, "more": layer.bias}, path)
    elif content == "other shape":
        torch.save({"weight": layer.bias, "bias": layer.bias}, path)
    with pytest.raises(WeightsMissing) as error:
        load_weights(layer, "vgg", path)
    assert_helps(str(error.value), "vgg", cache / "vgg16-397923af.pth")
    assert str(path) in str(error.value)


def test_random_networks_are_the_same_every_time_and_move_no_other_random_number():
    before = torch.get_rng_state()
    first = DINOv2(RANDOM, grid=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    for name, value in DINOv2(RANDOM, grid=1).state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name


# --------------------------------------------------------------------------------------------------
# The perceptual distance


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> tuple[nn.Sequential, Path]:
    """VGG16's convolutions with random weights, and their file in torchvision's layout."""
    torch.manual_seed(1)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], False).eval()
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, path)
    return features, path


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    before = torch.get_rng_state()
    perceptual = Perceptual(RANDOM)
    assert torch.equal(torch.get_rng_state(), before)
    return perceptual


def test_perceptual_is_lpips_by_its_formula(vgg):
    features, path = vgg
    perceptual = Perceptual(path)
    heads = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True
    )
    x, y = torch.rand(2, 2, 3, 48, 32) * 2 - 1
    expected = torch.zeros(2)
    with torch.no_grad():
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        a, b = (x - shift) / scale, (y - shift) / scale
        for i, layer in enumerate(features):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):  # the last ReLU before each pooling
                unit_a, unit_b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
                head = heads[f"lin{(3, 8, 15, 22, 29).index(i)}.model.1.weight"]  # (1, C, 1, 1)
                expected += (head * (unit_a - unit_b) ** 2).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(perceptual(x, y), expected)


def test_perceptual_ignores_autocast(perceptual):
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        inside = perceptual(x, y.bfloat16())
    assert torch.equal(inside, perceptual(x, y.bfloat16().float()))


def test_frozen_networks_compute_in_the_dtype_of_their_weights(perceptual):
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    single = perceptual(x, y)
    double = copy.deepcopy(perceptual).double()(x, y)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-6)
    assert CLIP(RANDOM, grid=1).double()(x).dtype == torch.float64


# --------------------------------------------------------------------------------------------------
# The teachers


def test_dinov2_agrees_with_timm_at_the_official_positions(tmp_path):
    model = timm.create_model("vit_base_patch14_dinov2", pretrained=False, img_size=224).eval()
    randomize(model, 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Tokens so small that the eps of each LayerNorm shows, and blocks that still matter.
            if name.startswith("patch_embed"):
                parameter.mul_(0.005)
            elif name.endswith("gamma"):
                parameter.uniform_(0.001, 0.005)
    table = 0.005 * torch.randn(1 + 37 * 37, 768)
    official = model.state_dict() | {"pos_embed": table[None], "mask_token": torch.ones(1, 768)}
    assert len(official) == 175
    torch.save(official, tmp_path / "dino.pth")
    teacher = DINOv2(tmp_path / "dino.pth", grid=16)

    images = torch.rand(1, 3, 224, 224) * 2 - 1
    pixels = torch.from_numpy(normalized(images, IMAGENET)).float()
    with torch.no_grad():
        model.pos_embed.copy_(resized_positions(table, 16, 37 / 16.1))
        expected = model.forward_features(pixels)[:, 1:]
    features = teacher(images)
    assert features.shape == (1, 256, teacher.width)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)

    # At its own size the table is used as it is.
    own = DINOv2(tmp_path / "dino.pth", grid=37)
    assert torch.equal(own.position, table)


def write_archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """A TorchScript archive with half-precision parameters of these names, as OpenAI's."""
    root = nn.Module()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, nn.Parameter(value.half(), requires_grad=False))
    torch.jit.script(root).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_clip_agrees_with_open_clip_from_an_archive_and_from_state_dicts(tmp_path):
    whole = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()
    visual = randomize(whole.visual, 0.02)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            # Tokens so small that the eps of each LayerNorm shows.
            if any(part in name for part in ("embed", "conv1", "ln_pre", "out_proj", "c_proj")):
                parameter.mul_(0.005)
    visual.half().float()  # the archive holds halves
    visual.output_tokens = True
    tower = {name: value.clone() for name, value in visual.state_dict().items()}
    assert len(tower) == 152
    prefixed = {f"visual.{name}": value for name, value in tower.items()}
    # The text tower has names of the image tower, at other sizes.
    text = {"positional_embedding": torch.zeros(77, 512), "ln_final.weight": torch.zeros(512)}
    text["transformer.resblocks.0.ln_1.weight"] = torch.zeros(512)
    write_archive(prefixed | text, tmp_path / "archive.pt")
    torch.save(tower, tmp_path / "tower.pt")

    small, large = (torch.rand(1, 3, side, side) * 2 - 1 for side in (224, 256))
    with torch.no_grad():
        at_224 = visual(torch.from_numpy(normalized(small, OPENAI)).float())[1]
        positions = resized_positions(tower["positional_embedding"], 16, 14 / 16)
        visual.positional_embedding = nn.Parameter(positions)
        at_256 = visual(torch.from_numpy(normalized(large, OPENAI)).float())[1]

    from_archive, from_tower = CLIP(tmp_path / "archive.pt", 14), CLIP(tmp_path / "tower.pt", 16)
    assert from_archive.position.dtype == torch.float32
    torch.testing.assert_close(from_archive(small), at_224, rtol=0, atol=1e-4)
    torch.testing.assert_close(from_tower(large), at_256, rtol=0, atol=1e-4)
    from_whole = from_tower.convert(text | prefixed)
    for name, value in from_tower.convert(tower).items():
        assert torch.equal(value, from_whole[name]), name


@pytest.mark.parametrize("teacher, side", [(DINOv2, 28), (CLIP, 32)])
def test_teachers_resize_by_plain_bicubic_interpolation(teacher, side):
    teacher, images = teacher(RANDOM, grid=2), torch.rand(1, 3, 48, 48) * 2 - 1
    by_hand = torch.from_numpy(resized(images.numpy(), side, 48 / side)).float()
    torch.testing.assert_close(teacher(images), teacher(by_hand), rtol=0, atol=1e-4)


def test_hog_agrees_with_a_loop_over_pixels():
    images = torch.rand(2, 3, 40, 40, dtype=torch.float64) * 2 - 1
    pixels = resized(images.numpy(), 32, 40 / 32)  # grid 2, patches of 16 pixels
    cells = np.zeros((2, 4, 4, 3, 9))
    for b, c, row, col in np.ndindex(2, 3, 32, 32):
        picture = pixels[b, c]
        right = picture[row, min(col + 1, 31)] - picture[row, max(col - 1, 0)]
        down = picture[min(row + 1, 31), col] - picture[max(row - 1, 0), col]
        degrees = np.degrees(np.arctan2(down, right)) % 180
        low = int((degrees - 10) // 20)  # bin k is centred at 10 + 20 k degrees
        share = (degrees - 10) / 20 - low
        histogram = cells[b, row // 8, col // 8, c]
        histogram[low % 9] += (1 - share) * np.hypot(right, down)
        histogram[(low + 1) % 9] += share * np.hypot(right, down)
    cells /= np.linalg.norm(cells, axis=-1, keepdims=True)
    expected = np.zeros((2, 4, 3, 9, 2, 2))
    for b, row, col in np.ndindex(2, 4, 4):
        expected[b, 2 * (row // 2) + col // 2, :, :, row % 2, col % 2] = cells[b, row, col]
    features = HOG(grid=2)(images)
    np.testing.assert_allclose(features.numpy(), expected.reshape(2, 4, 108), atol=1e-9)


def assert_frozen(network: Frozen) -> None:
    nn.Sequential(network).train()  # what a parent does
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_only_teach(name):
    weights = [] if name == "hog" else [RANDOM]
    teacher = TEACHERS[name](*weights, grid=2)
    assert_frozen(teacher)
    features = teacher(torch.rand(2, 3, 32, 32, requires_grad=True) * 2 - 1)
    assert features.shape == (2, 4, teacher.width)
    assert not features.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_teacher_only_teaches(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(2), nn.Dropout(0.5))
    torch.jit.script(network).save(str(tmp_path / "own.pt"))  # in training mode, as it was
    teacher = Scripted(str(tmp_path / "own.pt"), 2, 32)
    assert_frozen(teacher)
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    features = teacher(images)
    assert not features.requires_grad and teacher.width == 16
    torch.testing.assert_close(features, network.eval()(images).detach())
    with torch.autocast("cpu", torch.bfloat16):  # as in training on a GPU
        assert torch.equal(teacher(images), features)


def test_perceptual_only_measures_and_lets_the_gradient_through(perceptual):
    assert_frozen(perceptual)
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    perceptual(x, y).sum().backward()
    assert y.grad.abs().sum() > 0


def test_lpips_equals_the_package_with_its_gradient(perceptual):
    x, y = torch.rand(2, 2, 3, 48, 32) * 2 - 1
    weight = torch.tensor([2.0, -0.5])  # of the two images in the loss
    ours, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
    distance, expected = perceptual(x, ours), perceptual.lpips(x, theirs).flatten()
    torch.testing.assert_close(distance, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # where no gradient can be taken
        assert torch.equal(perceptual(x, ours), distance)
    (distance * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-3)
