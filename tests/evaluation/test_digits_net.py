import pytest
import torch

from diffdistill.data.digits import digits
from diffdistill.errors import UserError
from diffdistill.evaluation.digits_net import DigitsNet, DigitsNetConfig
from diffdistill.evaluation.images import to_uint8

DIGITS = to_uint8(digits().images)


def make(**config) -> DigitsNet:
    torch.manual_seed(0)
    return DigitsNet(DigitsNetConfig(**config)).eval()


def test_features_are_the_layer_before_the_logits():
    network = make()
    features, logits = network(DIGITS[:5])
    assert features.shape == (5, 64) and logits.shape == (5, 10) and features.dtype == torch.float32
    torch.testing.assert_close(logits, network.head(features))
    assert features.std() > 0


def test_bytes_are_read_as_the_minus_one_to_one_scale():
    network = make()
    torch.testing.assert_close(network(DIGITS[:9]).logits, network.classify(DIGITS[:9] / 127.5 - 1).logits)
    near = network.classify(digits().images[:9]).logits  # bytes differ from the levels by at most half a step of 2/255
    torch.testing.assert_close(network(DIGITS[:9]).logits, near, atol=5e-3, rtol=0)


def test_other_inputs_are_refused():
    network = make()
    for images in (torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 images"):
            network(images)


@pytest.mark.parametrize("config", [{}, {"channels": [8], "num_features": 5, "num_classes": 3}, {"channels": [4, 4, 8, 8]}])
def test_a_saved_network_comes_back_as_the_config_describes(tmp_path, config):
    network = make(**config)
    network.save(tmp_path)
    loaded = DigitsNet.load(tmp_path)
    assert loaded.config == network.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(DIGITS[:3]).logits, network(DIGITS[:3]).logits)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no readable digits classifier"):
        DigitsNet.load(tmp_path)
    make().save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(UserError, match="no readable digits classifier"):
        DigitsNet.load(tmp_path)
    make(num_features=32).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="no readable digits classifier"):
        DigitsNet.load(tmp_path)
