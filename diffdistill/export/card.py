"""README.md of an export: what it is, and the lines that sample from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffdistill.export.manifest import Manifest

NUM_REFERENCES = 4
REFERENCE_PROMPTS = (
    "a photograph of a red fox in the snow",
    "an oil painting of a lighthouse at night",
    "a bowl of fruit on a wooden table",
    "a small green robot reading a book",
)


HOLDS = {
    "merged": "This folder holds a whole pipeline; it needs nothing but diffusers.",
    "peft": "This folder holds a LoRA in PEFT's form; it needs the base pipeline, diffusers and peft.",
    "lora": "This folder holds a LoRA for the base pipeline's `load_lora_weights`.",
    "kohya": "This folder holds a LoRA in kohya's spelling, which `load_lora_weights` and other front ends read.",
}


def reference_labels(num_classes: int | None) -> list[int] | None:
    """Return the classes of the reference images, spread over all; None for an unconditional model."""
    if num_classes is None:
        return None
    return [i * num_classes // NUM_REFERENCES for i in range(NUM_REFERENCES)]


def snippet(manifest: Manifest, folder: str = ".") -> str:
    """Return the Python lines that load the export and draw four images.

    Args:
        manifest: of the export.
        folder: where the export is, as the lines shall name it.
    """
    pipeline, scheduler = manifest.pipeline_class, manifest.scheduler.class_name
    lines = ["import torch", f"from diffusers import {', '.join(sorted((pipeline, scheduler)))}"]
    if manifest.kind == "peft":
        lines.append("from peft import PeftModel")
    lines += ["", f'folder = "{folder}"  # this folder, or its id on the hub']
    if manifest.kind == "peft":
        component = manifest.component
        lines += [
            f'pipe = {pipeline}.from_pretrained("{manifest.base.path}")',
            f"pipe.{component} = PeftModel.from_pretrained(pipe.{component}, folder).merge_and_unload()",
        ]
    elif manifest.kind in ("lora", "kohya"):
        lines += [
            f'pipe = {pipeline}.from_pretrained("{manifest.base.path}")',
            'pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="few")',
        ]
    else:
        lines.append(f"pipe = {pipeline}.from_pretrained(folder)")
    lines += [
        f'pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")',
        "",
        f"seeds = {list(range(NUM_REFERENCES))}",
    ]
    labels = reference_labels(manifest.num_classes)
    arguments = [
        "generator=[torch.Generator().manual_seed(seed) for seed in seeds]",
        f"num_inference_steps={max(manifest.step_counts)}",
    ]
    times = manifest.times_call.get(str(max(manifest.step_counts)), {})
    arguments = [f"{name}={value!r}" for name, value in (manifest.call | times).items()] + arguments
    if manifest.pipeline_class == "ConsistencyModelPipeline":
        arguments.insert(0, "batch_size=len(seeds)")
    if labels is not None:
        arguments.insert(0, f"class_labels={labels}")
    if manifest.prompts is not None:
        lines.append("prompts = [")
        lines += [*(f'    "{prompt}",' for prompt in manifest.prompts), "]"]
        arguments.insert(0, "prompts")
    lines += ["images = pipe(", *(f"    {argument}," for argument in arguments), ").images", 'images[0].save("sample.png")']
    return "\n".join(lines)


def card(manifest: Manifest) -> str:
    """Return the text of README.md."""
    return (
        "\n".join(
            [
                *_header(manifest),
                "",
                *_what(manifest),
                "",
                "## Use",
                "",
                "```python",
                snippet(manifest),
                "```",
                "",
                *_notes(manifest),
                "",
                *_facts(manifest),
                *_metrics(manifest.metrics),
            ]
        )
        + "\n"
    )


def _header(manifest: Manifest) -> list[str]:
    header: dict[str, Any] = {
        "library_name": "peft" if manifest.kind == "peft" else "diffusers",
        "pipeline_tag": "unconditional-image-generation" if manifest.prompts is None else "text-to-image",
        "tags": ["diffusers", "diffusion-distillation", "few-step"],
    }
    if manifest.adapter is not None:
        header["tags"].append("lora")
    if not Path(manifest.base.path).is_absolute():
        header["base_model"] = manifest.base.id
    return ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---"]


def _steps(manifest: Manifest) -> str:
    *rest, last = [str(count) for count in manifest.step_counts]
    return f"{', '.join(rest)} or {last}" if rest else last


def _what(manifest: Manifest) -> list[str]:
    method = f" with {manifest.method}" if manifest.method else ""
    steps = _steps(manifest)
    return [
        f"# {Path(manifest.base.id).name} in {steps} step{'' if steps == '1' else 's'}",
        "",
        f"A few-step generator distilled{method} from `{Path(manifest.base.id).name}` by diffdistill. " + HOLDS[manifest.kind],
    ]


def _notes(manifest: Manifest) -> list[str]:
    notes = [
        f"- The sampler is `{manifest.scheduler.class_name}` with the settings in `scheduler/`. Other settings visit "
        "times the student was not trained for.",
    ]
    if manifest.trained_on is not None:
        notes.append(
            f"- The adapter was trained on the base's weights rounded to {manifest.trained_on.weights}, and is used and checked here on "
            f"the base's own: samples differ by {manifest.trained_on.sample_gap:.1%} (root mean square) from those on the rounded "
            "weights, on which metrics of the training run were taken."
        )
    if not manifest.pipeline_takes_lora:
        form = "merged" if manifest.kind == "merged" else "PEFT"
        notes.append(f"- `{manifest.pipeline_class}` has no `load_lora_weights`, so this folder is in the {form} form.")
    if manifest.prompts is not None:
        scale = manifest.call["guidance_scale"]
        inside = "the pipeline's own default is another, and guidance is inside the student"
        why = (
            inside
            if scale == manifest.guidance and not manifest.guidance_as_input
            else "it is an input of the network, and this is the value that was checked"
        )
        notes.append(f"- Pass `guidance_scale={scale:g}`: {why}.")
    if manifest.pipeline_class == "DiTPipeline":
        what = "guidance is inside the student" if manifest.guidance == 1 else "the student was trained to be sampled so"
        notes.append(f"- Pass `guidance_scale={manifest.guidance:g}`: {what}, and the pipeline's own default is 4.")
    dit_lcm = manifest.pipeline_class == "DiTPipeline" and manifest.scheduler.class_name == "LCMScheduler"
    if (dit_lcm or manifest.scheduler.config.get("stochastic_sampling")) and max(manifest.step_counts) > 1:
        when = " before diffusers 0.39" if manifest.pipeline_class == "SanaPipeline" else ""
        notes.append(
            f"- The noise between steps does not come from the call's generators{when}: call `torch.manual_seed` before it to "
            "repeat images of more than one step."
        )
    return notes


def _facts(manifest: Manifest) -> list[str]:
    rows = [("steps", "timesteps")]
    rows += [(steps, ", ".join(f"{t:g}" for t in times)) for steps, times in manifest.timesteps.items()]
    facts = ["## Sampling times", "", *_table(rows)]
    if manifest.adapter:
        facts += [
            "",
            f"LoRA of rank {manifest.adapter.rank} on {len(manifest.adapter.targets)} layers; the scale alpha / rank "
            "is inside the weights.",
        ]
    return [
        *facts,
        "",
        "Everything else, with hashes and the result of the check by stock diffusers, is in "
        "`diffdistill.json`. `reference.safetensors` holds the student's states and outputs for seeds 0 to 3.",
    ]


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return []
    rows = [("metric", "value")]
    rows += [(str(name), f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in metrics.items()]
    return ["", "## Metrics", "", *_table(rows)]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    head, *body = [f"| {left} | {right} |" for left, right in rows]
    return [head, "|---|---|", *body]
