"""UNet2DModel: pixel-space UNet, class-conditional or not (DDPMPipeline, DDIMPipeline, ConsistencyModelPipeline)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION
from diffdistill.models.network import Classes, Family


class UNet2D(Family):
    """How to call diffusers' UNet2DModel.

    A teacher trained with label dropout has one row more in its label table than it has classes. The diffusers config does
    not say so; `diffdistill_teacher.json` in the pipeline folder does (config.num_classes), and without it there is no null label.
    """

    name = "unet2d"
    component = "unet"
    blocks = ("ResnetBlock2D", "Attention")
    lora_targets = {
        "attention": ATTENTION,
        "all": (
            *ATTENTION,
            "conv1",
            "conv2",
            "conv_shortcut",
            "conv",
            "time_emb_proj",
            "linear_1",
            "linear_2",
            "conv_in",
            "conv_out",
        ),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W); t goes in as float32, so fractional times are kept."""
        labels = cond.values.get("class_labels")
        return network(x, t.float(), class_labels=labels, return_dict=False)[0]

    def downscale(self, network: Any) -> int:
        """Return what all levels together divide the edges by: each but the last halves them."""
        return 2 ** (len(network.config.block_out_channels) - 1)

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP."""
        return [network.time_embedding]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the middle block and every up block."""
        blocks: dict[str, nn.Module] = {"mid": network.mid_block}
        blocks |= {f"up.{i}": block for i, block in enumerate(network.up_blocks)}
        return blocks

    def classes(self, network: Any, declared: int | None) -> Classes:
        """Return the classes: the rows of the label table, of which the one after the declared classes stands for none."""
        rows = network.config.num_class_embeds
        num = rows if declared is None else declared
        return Classes(num, num if rows is not None and rows > num else None)
