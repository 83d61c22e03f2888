"""Other packages' statistics: what each format holds, what it implies, and everything that is refused."""

import os
import pickle
from hashlib import sha256

import numpy as np
import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.statistics_files import (
    CLEAN,
    PYTORCH,
    READERS,
    TENSORFLOW,
    Pipeline,
    read_statistics,
    write_edm,
)

MU = np.array([1.0, -2.0])
SIGMA = np.array([[2.0, 0.5], [0.5, 1.0]])
MU_S = np.array([3.0, 4.0, 5.0])
SIGMA_S = np.diag([7.0, 8.0, 9.0])
FEATURES = np.array([[0.0, 0.0], [2.0, 1.0], [4.0, 5.0]], dtype=np.float32)  # mean (2, 2), covariance (4, 5; 5, 7)
DINO = Pipeline("dinov2-vit-l-14", "torch_bicubic")
CMMD = Pipeline("clip-vit-l-14-336px", "pil_bicubic_u8")


def edm(folder, **arrays):
    path = folder / "set.npz"
    np.savez(path, **{"mu": MU, "sigma": SIGMA} | arrays)
    return path


def edm2(folder, protocol=4, **entries):
    stored = {"num_images": 50000, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU_S, "sigma": SIGMA_S}}
    path = folder / "set.pkl"
    path.write_bytes(pickle.dumps(stored | entries, protocol=protocol))
    return path


def adm(folder):
    path = folder / "VIRTUAL_set.npz"
    images = np.zeros((5, 2, 2, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, mu=MU.astype(np.float32), sigma=SIGMA, mu_s=MU_S.astype(np.float32), sigma_s=SIGMA_S)
    return path


def clean_fid(folder, name="set_clean_custom_na", **arrays):
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **arrays or {"mu": MU.astype(np.float32), "sigma": SIGMA})
    return path


def kid(folder):
    return clean_fid(folder, "set_clean_custom_na_kid", feats=FEATURES)


def cmmd(folder):
    path = folder / "set.npy"
    np.save(path, FEATURES)
    return path


def torch_fidelity(folder, name="set-inception-v3-compat-stat-fid-2048", stored=None):
    path = folder / f"{name}.pt"
    torch.save({"mu": MU.astype(np.float32), "sigma": SIGMA} if stored is None else stored, path)
    return path


MADE = {  # what writes the file, its format, the pipeline that fits, the metric it is for
    "edm": (edm, "edm", TENSORFLOW, "fid"),
    "edm2": (edm2, "edm2", TENSORFLOW, "fid"),
    "adm": (adm, "adm", TENSORFLOW, "fid"),
    "clean-fid": (clean_fid, "clean-fid", CLEAN, "fid"),
    "kid": (kid, "clean-fid", CLEAN, "kid"),
    "pytorch-fid": (edm, "pytorch-fid", PYTORCH, "fid"),
    "cmmd": (cmmd, "cmmd", CMMD, "cmmd"),
    "torch-fidelity": (torch_fidelity, "torch-fidelity", TENSORFLOW, "fid"),
}
every_file = pytest.mark.parametrize(("make", "format", "pipeline", "metric"), MADE.values(), ids=MADE)


# --- What is read


@every_file
def test_moments_and_origin_are_those_of_the_file(tmp_path, make, format, pipeline, metric):
    path = make(tmp_path)
    found = read_statistics(path, pipeline, dim=2, format=format)
    mean, covariance = ([2, 2], [[4, 5], [5, 7]]) if make in (kid, cmmd) else (MU, SIGMA)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.mean.tolist() == list(mean)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-15)
    origin = found.origin
    assert (origin.format, origin.path, origin.metric, origin.pipeline) == (format, path, metric, pipeline)
    assert origin.sha256 == sha256(path.read_bytes()).hexdigest()


def test_every_format_is_tested_above():
    assert {format for _, format, _, _ in MADE.values()} == set(READERS)


def test_counts_are_what_the_file_says_and_no_guess(tmp_path):
    found = {name: read_statistics(make(tmp_path), pipeline, 2, format) for name, (make, format, pipeline, _) in MADE.items()}
    counts = {name: statistics.count for name, statistics in found.items() if statistics.count is not None}
    assert counts == {"edm2": 50000, "kid": 3, "cmmd": 3}  # not adm: its 5 images are no count of the set behind mu and sigma


@pytest.mark.parametrize("make", [kid, cmmd])
def test_features_come_back_as_they_are(tmp_path, make):
    pipeline = CLEAN if make is kid else CMMD
    features = read_statistics(make(tmp_path), pipeline, dim=2).features
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features, FEATURES)


def test_torch_fidelity_features_are_a_bare_tensor(tmp_path):
    path = torch_fidelity(tmp_path, "set-inception-v3-compat-features-2048", torch.from_numpy(FEATURES))
    found = read_statistics(path, TENSORFLOW, dim=2)
    assert found.count == 3 and found.covariance.tolist() == [[4, 5], [5, 7]]


def test_torch_fidelity_statistics_may_be_tensors(tmp_path):
    path = torch_fidelity(tmp_path, stored={"mu": torch.from_numpy(MU), "sigma": torch.from_numpy(SIGMA)})
    assert read_statistics(path, TENSORFLOW, dim=2).mean.tolist() == list(MU)


def test_adm_has_a_spatial_pair_of_its_own_size(tmp_path):
    spatial = read_statistics(adm(tmp_path), TENSORFLOW, dim=2).spatial
    assert spatial.mean.tolist() == list(MU_S)
    np.testing.assert_array_equal(spatial.covariance, SIGMA_S)


def test_edm2_gives_the_entry_of_the_extractor(tmp_path):
    path = edm2(tmp_path)
    assert read_statistics(path, DINO, dim=3).mean.tolist() == list(MU_S)
    assert read_statistics(path, DINO._replace(resize="pil_bicubic_u8"), dim=3).origin.metric == "fd_dinov2"
    with pytest.raises(UserError, match="nothing for extractor 'digits'.*holds num_images, fid, fd_dinov2"):
        read_statistics(path, Pipeline("digits", "identity"), dim=3)


@pytest.mark.parametrize("core", ["core", "_core"])  # numpy 1 and numpy 2
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_and_numpy_are_read(tmp_path, core, protocol):
    path = edm2(tmp_path, protocol, fid={"mu": MU.astype(">f4"), "sigma": np.asfortranarray(SIGMA)})
    if protocol < 4:  # there the names are lines of text
        path.write_bytes(
            path.read_bytes().replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", b"numpy." + core.encode())
        )
    found = read_statistics(path, TENSORFLOW, dim=2)
    assert found.mean.tolist() == list(MU) and found.covariance.tolist() == SIGMA.tolist()


def test_rounding_of_float32_sums_passes_and_is_mirrored(tmp_path):
    path = edm(tmp_path, sigma=SIGMA + [[0, 1e-6], [0, 0]])
    covariance = read_statistics(path, TENSORFLOW, dim=2, format="edm").covariance
    assert covariance[0, 1] == covariance[1, 0] == pytest.approx(0.5 + 5e-7, rel=1e-12)
    path = edm(tmp_path, sigma=np.diag([1.0, -1e-6]))
    assert read_statistics(path, TENSORFLOW, dim=2, format="edm").covariance[1, 1] == -1e-6


# --- Which format, which pipeline


def test_the_format_is_found_where_the_content_tells(tmp_path):
    for name in ("edm2", "adm", "kid", "cmmd", "torch-fidelity"):
        make, format, pipeline, _ = MADE[name]
        assert read_statistics(make(tmp_path), pipeline, dim=2).origin.format == format


def test_three_packages_write_the_same_npz_so_it_must_be_named(tmp_path):
    with pytest.raises(UserError, match=r"not clear.*format=\.\.\., one of: edm, pytorch-fid, clean-fid"):
        read_statistics(edm(tmp_path), TENSORFLOW, dim=2)


def test_a_format_that_the_content_denies_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no edm file; it holds adm statistics"):
        read_statistics(adm(tmp_path), TENSORFLOW, dim=2, format="edm")
    with pytest.raises(UserError, match="Did you mean 'edm2'"):
        read_statistics(edm2(tmp_path), TENSORFLOW, dim=2, format="edm22")


@pytest.mark.parametrize("content", [b"", b"mu: 1", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "zip without members"])
def test_a_file_of_nothing_known_lists_the_formats(tmp_path, content):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="nothing that is known here.*one of: edm, edm2, adm"):
        read_statistics(path, TENSORFLOW, dim=2)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file of statistics .*gone\.npz"):
        read_statistics(tmp_path / "gone.npz", TENSORFLOW, dim=2)


@every_file
def test_another_resize_or_network_is_refused_with_both(tmp_path, make, format, pipeline, metric):
    path = make(tmp_path)
    for resize in {TENSORFLOW.resize, CLEAN.resize, PYTORCH.resize} - {pipeline.resize}:
        with pytest.raises(
            UserError, match=rf"features of {pipeline}; this evaluation uses {pipeline.extractor} after {resize}"
        ):
            read_statistics(path, pipeline._replace(resize=resize), dim=2, format=format)
    with pytest.raises(UserError, match="vgg16"):
        read_statistics(path, pipeline._replace(extractor="vgg16"), dim=2, format=format)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("ffhq_clean_trainval70k_1024", {CLEAN}),
        ("lsun_horse_legacy_tensorflow_train_256", {TENSORFLOW}),
        ("my_clean_set_legacy_pytorch_custom_na", {PYTORCH}),  # "clean" is part of the data set's name
        ("ffhq_clean_clip_vit_b_32_trainfull_256", {Pipeline("clip-vit-b-32", "pil_bicubic_u8")}),
        ("renamed", {CLEAN, TENSORFLOW, PYTORCH, Pipeline("clip-vit-b-32", "pil_bicubic_u8")}),
    ],
)
def test_the_name_of_a_clean_fid_file_decides_its_pipeline(tmp_path, name, fits):
    path = clean_fid(tmp_path, name)
    for pipeline in (CLEAN, TENSORFLOW, PYTORCH, Pipeline("clip-vit-b-32", "pil_bicubic_u8"), CMMD):
        if pipeline in fits:
            assert read_statistics(path, pipeline, dim=2, format="clean-fid").origin.pipeline == pipeline
        else:
            with pytest.raises(UserError, match="the two do not compare"):
                read_statistics(path, pipeline, dim=2, format="clean-fid")


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("cifar10-train-inception-v3-compat-stat-fid-2048", "inception"),
        ("my-clip-vit-set-dinov2-vit-l-14-stat-fid-dinov2", "dinov2-vit-l-14"),
        ("set-clip-vit-l-14-336px-features-clip", "clip-vit-l-14-336px"),
        ("renamed", "inception"),
    ],
)
def test_the_name_of_a_torch_fidelity_file_decides_its_network(tmp_path, name, network):
    path = torch_fidelity(tmp_path, name)
    assert read_statistics(path, Pipeline(network, "tf1_bilinear"), dim=2).count is None
    with pytest.raises(UserError, match=f"features of {network} after tf1_bilinear"):
        read_statistics(path, Pipeline("vgg16", "tf1_bilinear"), dim=2)


# --- Code


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil_pickle(folder, protocol, evil):
    return edm2(folder, protocol, extra=[evil])


def evil_torch(folder, protocol, evil):
    return torch_fidelity(folder, stored={"mu": MU, "sigma": SIGMA, "extra": evil})


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(("make", "name"), [(evil_pickle, f"{os.name}.system"), (evil_torch, f"{os.name}.system")])
def test_a_pickle_with_code_is_named_and_not_run(tmp_path, make, name, protocol):
    trace = tmp_path / "it-ran"
    path = make(tmp_path, protocol, Evil(trace))
    with pytest.raises(UserError, match=f"asks for {name}, which is no array.*Nothing was run"):
        read_statistics(path, TENSORFLOW, dim=2)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # the trap is a trap


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "numpy._core.multiarray scalar", "copyreg _reconstructor"]
)
def test_no_other_name_passes(tmp_path, name):
    path = tmp_path / "set.pkl"
    path.write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(UserError, match=f"asks for {name.replace(' ', '[.]')}, "):
        read_statistics(path, TENSORFLOW, dim=2)


@pytest.mark.parametrize(("make", "format"), [(edm, "edm"), (edm, "clean-fid"), (kid, None), (cmmd, None)])
def test_pickled_objects_inside_numpy_files_are_refused_and_not_run(tmp_path, make, format):
    trace = tmp_path / "it-ran"
    objects = np.array([Evil(trace), None], dtype=object)
    if make is edm:
        path = edm(tmp_path, mu=objects)
    elif make is kid:
        path = clean_fid(tmp_path, feats=objects)
    else:
        np.save(path := tmp_path / "set.npy", objects)
    with pytest.raises(UserError, match="Object arrays cannot be loaded.*pickled objects where arrays belong"):
        read_statistics(path, CMMD if make is cmmd else TENSORFLOW, dim=2, format=format)
    assert not trace.exists()


# --- Damage


@every_file
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, make, format, pipeline, metric, kept):
    path = make(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"cannot be read as .* cut short"):
        read_statistics(path, pipeline, dim=2, format=format)


def test_a_flipped_byte_in_an_npz_is_refused(tmp_path):
    path = edm(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(SIGMA.tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        read_statistics(path, TENSORFLOW, dim=2, format="edm")


BAD_ARRAYS = {
    "not square": ({"sigma": SIGMA[:1]}, r"the covariance of .* is \(1, 2\); .* needs \(2, 2\)"),
    "not symmetric": ({"sigma": [[2.0, 0.5], [0.4, 1.0]]}, "differ by 0.1, the largest is 2"),
    "negative eigenvalue": ({"sigma": [[1.0, 2.0], [2.0, 1.0]]}, "eigenvalue -1, the largest is 3"),
    "negative definite": ({"sigma": -SIGMA}, "eigenvalue -2.21"),
    "NaN": ({"sigma": SIGMA * np.nan}, "the covariance of .* holds NaN"),
    "infinite": ({"mu": [np.inf, 0.0]}, "the mean of .* holds NaN or infinity"),
    "another dimension": ({"mu": MU_S, "sigma": SIGMA_S}, r"the mean of .* is \(3,\); .* needs \(2,\)"),
    "a row": ({"mu": MU[None]}, r"the mean of .* is \(1, 2\)"),
    "integers": ({"mu": [1, 2]}, r"int64 \(2,\); it must hold real floats"),
    "empty": ({"mu": [], "sigma": np.zeros((0, 0))}, r"float64 \(0,\); it must hold"),
    "complex": ({"sigma": SIGMA + 0j}, r"complex128 \(2, 2\); it must hold real floats"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_are_no_moments_are_refused(tmp_path, arrays, message):
    for path, format in ((edm(tmp_path, **arrays), "edm"), (edm(tmp_path, **arrays), "pytorch-fid")):
        with pytest.raises(UserError, match=message):
            read_statistics(path, TENSORFLOW if format == "edm" else PYTORCH, dim=2, format=format)


def test_the_spatial_pair_is_checked_as_well(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, mu=MU, sigma=SIGMA, mu_s=MU_S, sigma_s=-SIGMA_S)
    with pytest.raises(UserError, match="the spatial covariance of .* has the eigenvalue -9"):
        read_statistics(path, TENSORFLOW, dim=2)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (FEATURES[:, :1], r"is \(3, 1\); .* needs \(N, 2\)"),
        (FEATURES[:1], r"is \(1, 2\); .* with N of two or more"),
        (FEATURES[0], r"is \(2,\)"),
        (FEATURES * np.nan, "holds NaN"),
    ],
)
def test_features_that_are_none_are_refused(tmp_path, features, message):
    np.save(tmp_path / "set.npy", features)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "set.npy", CMMD, dim=2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_images": 1}, "num_images = 1"),
        ({"num_images": "all"}, "num_images = 'all'"),
        ({"fid": 3}, "cannot be read as edm2"),
        ({"fid": {"mu": MU, "sigma": np.array([[1, 2]])}}, "an array of type 'i8'"),
        ({"fid": {"mu": MU, "sigma": np.array([[{}]], dtype=object)}}, "an array of type 'O8'"),
    ],
)
def test_an_edm2_dict_that_is_none_is_refused(tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        read_statistics(edm2(tmp_path, **entries), TENSORFLOW, dim=2)


def test_a_pickle_that_is_no_dict_is_refused(tmp_path):
    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="a pickled list"):
        read_statistics(path, TENSORFLOW, dim=2)


def test_bytes_that_do_not_fill_the_shape_are_refused(tmp_path):
    path = edm2(tmp_path)
    path.write_bytes(
        path.read_bytes().replace(MU.tobytes(), MU.tobytes()[:8] + b"\x00" * 8).replace(b"K\x02\x85", b"K\x04\x85")
    )
    with pytest.raises(UserError, match="cannot reshape array of size 2"):
        read_statistics(path, TENSORFLOW, dim=2)


# --- Moments that are written


def test_edm_statistics_survive_the_round_trip(tmp_path):
    mean, covariance = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([[2, 1 / 3], [1 / 3, 1]], dtype=torch.float64),
    )
    path = write_edm(tmp_path / "made.npz", mean, covariance)
    with np.load(path) as stored:  # as EDM's fid.py opens it
        assert sorted(stored.files) == ["mu", "sigma"]
        assert stored["mu"].dtype == stored["sigma"].dtype == np.float64
    found = read_statistics(path, TENSORFLOW, dim=2, format="edm")
    assert torch.equal(found.mean, mean) and torch.equal(found.covariance, covariance)


def test_images_without_statistics_say_how_to_get_them(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((3, 4, 5, 3), np.uint8))
    with pytest.raises(UserError, match="holds images and no statistics.*open_images"):
        read_statistics(tmp_path / "samples.npz", TENSORFLOW, dim=2)
