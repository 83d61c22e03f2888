"""Methods by name, the settings' self-description, and LPIPS from files."""

import pytest
import torch
from torch.nn import functional as F

from diffdistill.distillers import registry
from diffdistill.distillers.lpips import LPIPSConfig, load_lpips
from diffdistill.errors import UserError


def test_the_table_names_every_method_and_its_paper():
    assert registry.names()[: len(registry.DISTILLERS)] == list(registry.DISTILLERS)
    assert {"guidance", "progressive", "consistency", "lcm", "dmd2", "dmd"} <= registry.DISTILLERS.keys()
    for name, config in registry.configs().items():
        method = registry.get(name)
        assert method.name == name and method.paper.startswith("arXiv:") and method.summary
        assert method.Config is config
        config()  # every setting has a default


def test_an_unknown_name_lists_the_known_ones_and_hints_at_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'consistency'.*progressive"):
        registry.get("consistancy")


def test_every_setting_says_what_it_means():
    for config in registry.configs().values():
        for name, field in config.model_fields.items():
            assert field.description, f"{config.__name__}.{name}"
        assert config.model_validate(config().model_dump(mode="json")) == config()


def test_another_package_adds_a_method_by_an_entry_point(monkeypatch):
    class Found(list):
        names = {"theirs", "dmd2"}  # ours wins over a foreign dmd2

    class Entry:
        value = "package:Theirs"

        @staticmethod
        def load():
            return registry.DMD2

    monkeypatch.setattr(registry, "entry_points", lambda group, name=None: Found([Entry]))
    assert registry.names()[-1] == "theirs" and registry.names().count("dmd2") == 1
    assert registry.get("theirs") is registry.DMD2
    monkeypatch.setattr(Entry, "load", staticmethod(lambda: int))
    with pytest.raises(UserError, match="subclass of Distiller"):
        registry.get("theirs")


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    from torchvision.models.vgg import cfgs, make_layers

    folder = tmp_path_factory.mktemp("lpips")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = make_layers(cfgs["D"])
    vgg = {f"features.{key}": value for key, value in layers.state_dict().items()} | {"classifier.0.bias": torch.zeros(1)}
    linear = {f"lin{k}.model.1.weight": torch.full((1, c, 1, 1), float(k == 0)) for k, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg.pth")
    torch.save(linear, folder / "linear.pth")
    return LPIPSConfig(vgg=folder / "vgg.pth", linear=folder / "linear.pth"), vgg


def test_lpips_of_the_first_layer_equals_the_formula(lpips_files):
    config, vgg = lpips_files
    distance = load_lpips(config, (3, 16, 256))
    y, z = torch.rand(2, 1, 3, 16, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def unit(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
        for layer in (0, 2):
            x = F.relu(F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1))
        return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()

    expected = (unit(y) - unit(z)).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distance(y, z), expected, atol=1e-6, rtol=1e-5)
    assert float(distance(y, y)) == 0
    grey = torch.rand(2, 1, 8, 8, requires_grad=True)
    distance(grey, grey.detach() + 0.1).sum().backward()
    assert bool(grey.grad.isfinite().all()) and float(grey.grad.abs().max()) > 0


def test_lpips_refuses_latents_missing_files_and_other_weights(lpips_files, tmp_path):
    config, _ = lpips_files
    with pytest.raises(UserError, match="latents"):
        load_lpips(config, (4, 8, 8))
    with pytest.raises(UserError, match="no LPIPS weights"):
        load_lpips(LPIPSConfig(vgg=tmp_path / "none.pth", linear=config.linear), (3, 8, 8))
    for file in (config.vgg, config.linear):
        with pytest.raises(UserError, match="are not VGG-16"):
            load_lpips(LPIPSConfig(vgg=file, linear=file), (3, 8, 8))
