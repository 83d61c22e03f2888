"""What comes from elsewhere runs no code and writes nowhere else: pipelines, pickles, YAML, archives, names."""

import ast
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import text_pipelines
import yaml

import diffdistill
from diffdistill.config import load_config
from diffdistill.data.captioned import load_captioned
from diffdistill.errors import UserError
from diffdistill.evaluation.external.image_folder import ImageFile, Layout, write_folder
from diffdistill.export import verify
from diffdistill.export.manifest import Manifest
from diffdistill.files import hash_json, inside
from diffdistill.models.loading import load_teacher
from diffdistill.training import checkpoint

PACKAGE = Path(diffdistill.__file__).parent
EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import CLIPTextModel
class Encoder(CLIPTextModel):
    pass
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return text_pipelines.save("sd", tmp_path_factory.mktemp("pipelines") / "stock")


@pytest.fixture
def pipeline(stock, tmp_path):
    """A copy of a stock pipeline, the file that its own code would leave, and a function that changes its index."""
    folder, marker = tmp_path / "pipeline", tmp_path / "it-ran"
    shutil.copytree(stock, folder)

    def change(**entries):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))

    return folder, marker, change


def code_beside_the_weights(folder, marker, change):
    (folder / "text_encoder" / "encoders.py").write_text(EVIL.format(marker=str(marker)))
    change(text_encoder=["encoders", "Encoder"])


def code_under_a_known_name(folder, marker, change):
    (folder / "text_encoder" / "transformers.py").write_text(EVIL.format(marker=str(marker)))
    change(text_encoder=["transformers", "Encoder"])


def code_by_auto_map(folder, marker, change):
    (folder / "text_encoder" / "encoders.py").write_text(EVIL.format(marker=str(marker)))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModel": "encoders.Encoder"}}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    change(text_encoder=["transformers", "AutoModel"])


WAYS = [code_beside_the_weights, code_under_a_known_name, code_by_auto_map]


@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_pipeline_never_runs_unasked(pipeline, way):
    folder, marker, change = pipeline
    way(folder, marker, change)
    with pytest.raises(UserError, match="Python code of its own for text_encoder, .*teacher_options.trust_remote_code: true"):
        load_teacher(folder).condition(["a b"])
    assert not marker.exists()


def test_code_of_a_pipeline_runs_where_the_config_trusts_it(pipeline):
    folder, marker, change = pipeline
    code_beside_the_weights(folder, marker, change)
    load_teacher(folder, trust_remote_code=True).condition(["a b"])
    assert marker.exists()  # so the tests above would have seen it run


def test_a_pipeline_of_a_class_of_its_own_is_refused(pipeline):
    folder, marker, change = pipeline
    (folder / "pipeline.py").write_text(EVIL.format(marker=str(marker)))
    change(_class_name=["pipeline", "Encoder"])
    with pytest.raises(UserError, match="a class of its own, .*Save its parts in a pipeline of diffusers"):
        load_teacher(folder, trust_remote_code=True)
    assert not marker.exists()


def test_an_export_from_elsewhere_is_checked_without_running_its_code(pipeline, monkeypatch):
    folder, marker, change = pipeline
    code_beside_the_weights(folder, marker, change)
    monkeypatch.setattr(Manifest, "read", lambda folder: None)
    with pytest.raises(UserError, match="Python code of its own"):
        verify(folder)
    assert not marker.exists()


def calls(tree):
    """Return every call in a module as (dotted name, keyword arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def dangerous(name, keywords):
    """Tell whether a call may run code that a file holds."""
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return keywords.get("allow_pickle", "False") != "False"
    if name == "yaml.load":
        return keywords.get("Loader") != "_Loader"  # ours, a SafeLoader: see the test below
    if keywords.get("shell", "False") != "False" or keywords.get("trust_remote_code") == "True":
        return True
    return name in (
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "yaml.unsafe_load",
        "yaml.full_load",
        "joblib.load",
    ) or name.endswith(("pickle.load", "pickle.loads", ".extractall", ".extract"))


def test_no_call_of_the_package_can_run_what_a_file_holds():
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, keywords in calls(ast.parse(path.read_text()))
        if dangerous(name, keywords)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "pickle.load(f)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(f)",
        "eval(x)",
    ],
)
def test_that_test_sees_what_it_looks_for(line):
    assert [dangerous(*call) for call in calls(ast.parse(line))] == [True]


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "run.yaml").write_text(f"teacher: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'it-ran'}]\n")
    with pytest.raises(UserError, match="run.yaml"):
        load_config(tmp_path / "run.yaml")
    assert not (tmp_path / "it-ran").exists()
    from diffdistill.yaml_files import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "", ".", "a/.."])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out of"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.png", "a/../b", "..a"])
def test_a_name_within_its_folder_is_taken(tmp_path, name):
    assert tmp_path in inside(tmp_path, name).parents


def test_image_names_of_a_prompt_file_cannot_leave_the_folder(tmp_path):
    layout = Layout([ImageFile("../../stolen.png", "a prompt", (0,))], {}, lambda images: images[0])
    with pytest.raises(UserError, match="leads out of"):
        write_folder(lambda seeds, prompts: None, layout, tmp_path / "images", {})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    folder = tmp_path / "checkpoints" / "step_0000001"
    folder.mkdir(parents=True)
    content = {"schema": checkpoint.SCHEMA, "step": 1, "state": {}, "files": {"../../elsewhere.safetensors": "0" * 64}}
    (folder / checkpoint.STATE).write_text(json.dumps({**content, "sha256": hash_json(content)}))
    assert "not a file of this folder" in checkpoint.find_fault(folder)


def test_a_shard_is_read_in_place_whatever_its_members_are_called(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, content in (("../../evil.png", b"no image"), ("../../evil.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    records = load_captioned(tmp_path, "text")
    assert [record.caption for record in records] == ["a caption"]
    assert [path.name for path in tmp_path.iterdir()] == ["shard.tar"] and not (tmp_path.parent.parent / "evil.png").exists()
