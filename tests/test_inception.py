"""common/inception.py: the FID's network against torch-fidelity's with the same random weights."""

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from common.inception import FIDInception, inception_features, load_inception, tf1_resize
from common.runs import file_sha256
from common.weights import WEIGHT_FILES, WeightsMissing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the layout of the published weights, with batch statistics that matter."""
    torch.manual_seed(1)
    state = {}
    for name, value in FIDInception().state_dict().items():
        if name.endswith(("bn.running_var", "bn.weight")):
            value.uniform_(0.7, 1.4)
        elif name.endswith(("bn.running_mean", "bias")):
            value.normal_(0, 0.1)
        if not name.endswith("num_batches_tracked"):
            state[name] = value
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(str(weights), CPU)[0]


@pytest.fixture(scope="module")
def fidelity(weights):
    kinds = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("", kinds, feature_extractor_weights_path=str(weights))


def test_the_network_has_the_published_names_and_size(weights):
    state = torch.load(weights)
    assert len(state) == 472 and sum(x.numel() for x in state.values()) == 23_885_392
    assert state["Mixed_6d.branch7x7_2.bn.bias"].shape == (160,)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["fc.weight"].shape == (1008, 2048)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (299, 299), (320, 200), (512, 511)])
def test_resize_is_tensorflow_ones_to_the_bit(shape):
    images = 255 * torch.rand(2, 3, *shape)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    assert torch.equal(tf1_resize(images, 299), expected)


@pytest.mark.parametrize("size", [64, 256, 299])
def test_features_equal_those_of_torch_fidelity(network, fidelity, size):
    # Each picture of another contrast, so that features differ.
    images = (255 * torch.rand(5, 1, 1, 1) * torch.rand(5, 3, size, size)).to(torch.uint8)
    seen = []
    branch = fidelity.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        expected, logits = fidelity(images)
    branch.remove()
    pool, spatial = inception_features(network, images.float())
    assert pool.std() > 0.1 and logits.std() > 0.1
    np.testing.assert_allclose(pool, expected.numpy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.logits(torch.from_numpy(pool)), logits, rtol=1e-4, atol=1e-4)
    channels_last = seen[0][:, :7].numpy().transpose(0, 2, 3, 1)  # (5, 17, 17, 7)
    np.testing.assert_allclose(spatial, channels_last.reshape(5, 2023), rtol=1e-4, atol=1e-5)


def test_a_file_with_batch_norm_counters_loads_and_another_network_does_not(
    network, tmp_path, capsys
):
    path = tmp_path / "other.pth"
    torch.save(network.state_dict(), path)  # an OrderedDict with counters and metadata
    again, protocol = load_inception(str(path), CPU)
    assert torch.equal(again.fc.weight, network.fc.weight) and not again.train().training
    assert protocol == {"inception": {"file": str(path), "sha256": file_sha256(path)}}
    assert f"{path} is not the published Inception" in capsys.readouterr().out
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if k != "Mixed_6d.branch1x1.bn.bias"}, path)
    with pytest.raises(WeightsMissing, match=f"other.pth .*{WEIGHT_FILES['inception'].filename}"):
        load_inception(str(path), CPU)


def test_random_weights_are_the_same_every_time_and_move_no_other_random_number():
    before = torch.get_rng_state()
    first, protocol = load_inception("random", CPU)
    assert protocol == {"inception": "random"} and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second, _ = load_inception("random", CPU)
    assert torch.equal(
        first.Mixed_7c.branch_pool.conv.weight, second.Mixed_7c.branch_pool.conv.weight
    )
