"""What a command is pointed at: the same seeds make the same images, and the way there can be watched."""

import pytest
import torch

from diffdistill import api
from diffdistill.errors import UserError
from diffdistill.models.codec import images_at_once
from diffdistill.scoring import Settings
from diffdistill.targets import StockSampler, Target, open_target

SEEDS, CLASSES = [3, 1, 4], torch.tensor([0, 5, 9])


@pytest.fixture(scope="module")
def target():
    return open_target("digits-unet")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_watching_a_stock_scheduler_changes_no_image_and_gives_the_predictions_of_our_sampler(target, guidance):
    ours = target.sampler(4, guidance)
    stock = StockSampler(ours.scheduler_config(target.teacher.scheduler_config), 4, guidance)
    own, watched = target.predictions(ours)(SEEDS, CLASSES), target.predictions(stock)(SEEDS, CLASSES)
    assert [step.t for step in watched] == [step.t for step in own] == [999, 749, 499, 249]
    for mine, theirs in zip(own, watched, strict=True):
        torch.testing.assert_close(mine.images, theirs.images, atol=1e-4, rtol=0)
    for sampler, steps in ((ours, own), (stock, watched)):
        torch.testing.assert_close(target.generator(sampler)(SEEDS, CLASSES), steps[-1].images, atol=1e-5, rtol=0)
    assert (own[0].images - own[-1].images).abs().max() > 0.1  # there is something to see


def test_large_images_are_made_a_few_at_a_time():
    assert [images_at_once(edge, edge) for edge in (8, 64, 256, 512, 1024, 4096)] == [500, 500, 32, 8, 2, 1]


def test_no_more_images_are_made_at_once_than_there_is_room_for_and_they_stay_the_same(monkeypatch):
    rows, true = [], Target.generator

    def generator(target, sampler):
        generate = true(target, sampler)

        def counted(seeds, asked):
            rows.append(len(seeds))
            return generate(seeds, asked)

        return counted

    monkeypatch.setattr(Target, "generator", generator)
    whole = api.sample("digits-unet", steps=1, num=8).images
    monkeypatch.setattr("diffdistill.models.codec.MOST_PIXELS", 3 * 8 * 8)
    parts = api.sample("digits-unet", steps=1, num=8).images
    assert rows == [8, 3, 3, 2]
    assert (parts.int() - whole.int()).abs().max() <= 1  # rounded to bytes
    scored = api.evaluate("digits-unet", "digits-short", steps=[1], num_images=40, metrics=("pixels",))
    assert scored[1].cost.batch_size == 3 and max(rows) == 8


def test_no_images_at_once_is_refused():
    with pytest.raises(UserError, match="batch_size must be at least 1; got 0"):
        Settings(batch_size=0)


@pytest.fixture(scope="module")
def base_and_lora(tmp_path_factory):
    """A small Stable Diffusion, and a LoRA of it as its own pipeline class writes one."""
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict
    from text_pipelines import save

    folder = tmp_path_factory.mktemp("lora")
    base = save("sd", folder / "base")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipeline.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=weights)
    return base, folder / "lora"


def test_a_lora_gives_the_network_that_the_stock_pipeline_makes_of_it(base_and_lora):
    import diffusers

    base, lora = base_and_lora
    stock = diffusers.StableDiffusionPipeline.from_pretrained(base)
    stock.load_lora_weights(lora)
    ours, plain = (open_target(base, solver="lcm", lora=path) for path in (lora, None))
    size = stock.unet.config.sample_size
    x, t, text = (
        torch.randn(2, 4, size, size),
        torch.tensor([10, 500]),
        stock.text_encoder(torch.zeros(2, 8, dtype=torch.long))[0],
    )
    with torch.no_grad():
        expected, got, without = (
            unet(x, t, encoder_hidden_states=text).sample for unet in (stock.unet, ours.teacher.network, plain.teacher.network)
        )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - without).abs().max() > 1e-2
    assert ours.identity != plain.identity and ours.identity["lora"]
    images = ours.generator(ours.sampler(2, 1.0))([0, 1], ["a", "b"])
    assert len(images) == 2 and bool(images.isfinite().all())


def test_a_lora_that_is_none_or_goes_onto_a_student_is_refused(base_and_lora, tmp_path):
    base, _ = base_and_lora
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(UserError, match="cannot load the LoRA"):
        open_target(base, lora=tmp_path)
