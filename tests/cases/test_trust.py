"""Files made to do harm: nothing in them is run, no name leads away, no size is believed.

Each kind is tried by members of its own: a file, a folder, a name or a number that a stranger
could have left where the project reads or writes.
"""

import ast
import json
import multiprocessing
import os
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data import manifest
from data.hub import join_parts
from data.index import HEADER, MAGIC, TokenFile
from data.manifest import Subsets
from data.maps import build_once
from data.partial import LENGTHS, REJECTS, SUBSETS, TOKENS, PartialCorpus
from l2e.analysis.weights import Weights
from l2e.files import fresh_folder, inside, own_folder, refuse_foreign
from l2e.hub import refuse_escapes
from launch.checkpoint import folders
from launch.checkpoint.huggingface import reshard
from launch.checkpoint.stored import StoredCheckpoint
from launch.checkpoint.tensorfile import write_tensor_file
from launch.checkpoint.tokenizer_files import write_tokenizer
from launch.engine.compiling import use_own_cache
from launch.training.provenance import environment
from model.config import ModelConfig
from model.huggingface import HuggingFaceWeights, read_config, write_hugging_face
from model.parameters import parameter_shapes

ROOT = Path(__file__).resolve().parents[2]
STRANGER = 12345  # a user that is not this one
TINY = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=300)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")


class Harm:
    """What a pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# --- nothing is run -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "a list", "not a tensor"])
@pytest.mark.parametrize("reader", ["analysis", "export"])
def test_a_pickle_of_weights_runs_nothing(tmp_path, how, reader) -> None:
    done, path = tmp_path / "done", tmp_path / "pytorch_model.bin"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(Harm(done)))
    elif how == "a list":
        torch.save([torch.ones(2)], path)
    elif how == "not a tensor":
        torch.save({"weight": {"inner": 1}}, path)
    else:
        torch.save({"weight": Harm(done)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*: fetch it again"):
        Weights(tmp_path) if reader == "analysis" else HuggingFaceWeights(tmp_path, TINY)
    assert not done.exists()


def test_shuffled_maps_of_objects_are_refused(tmp_path) -> None:
    done = tmp_path / "done"
    build_once(tmp_path / "cache", {}, lambda: {"first": np.arange(5)})
    (path,) = (tmp_path / "cache").rglob("first.npy")
    np.save(path, np.array([Harm(done)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="delete the folder"):
        build_once(tmp_path / "cache", {}, pytest.fail)
    assert not done.exists()


# What would run what a file says; a call by these names, or with these arguments, is none of ours.
RUNS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_line_of_the_project_unpickles_anything() -> None:
    """`torch.load` says weights_only=True itself: older versions have another default."""
    wrong = []
    for package in ("bench", "configs", "data", "l2e", "launch", "model"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names]
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    bad = any(name.split(".")[0] in RUNS for name in names)
                elif isinstance(node, ast.Call):
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    called = ast.unparse(node.func)
                    bad = called == "torch.load" and said.get("weights_only") != "True"
                    bad |= said.get("allow_pickle", "False") != "False"
                    bad |= "trust_remote_code" in said or called in ("eval", "exec", "yaml.load")
                else:
                    continue
                if bad:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


# --- no name leads away ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "", None, 7, "a\0b"])
def test_names_that_leave_their_folder(tmp_path, name) -> None:
    with pytest.raises(ValueError, match="is no file in"):
        inside(tmp_path, name, tmp_path / "index.json")


def test_names_that_stay(tmp_path) -> None:
    assert inside(tmp_path, "part/a..b", tmp_path / "x") == tmp_path / "part" / "a..b"


@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("how", ["absolute", "upward"])
def test_an_index_of_weights_names_files_of_its_folder(tmp_path, index, how) -> None:
    outside, folder = tmp_path / f"outside.{index.rsplit('.', 1)[1]}", tmp_path / "model"
    save_file({"a": torch.ones(1)}, outside)
    folder.mkdir()
    name = str(outside) if how == "absolute" else f"../{outside.name}"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="is no file in"):
        HuggingFaceWeights(folder, TINY)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "{"])
def test_an_index_that_is_none(tmp_path, content) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is no index of weights"):
        HuggingFaceWeights(tmp_path, TINY)


def checkpoint(folder: Path, model: ModelConfig = TINY, **tensors: torch.Tensor) -> Path:
    """A checkpoint's folder with a manifest that fits."""
    temporary = folders.begin(folder)
    save_file(tensors, temporary / "model-00001-of-00001.safetensors")
    records = {
        name: folders.write_text(temporary / name, text)
        for name, text in {
            "config.json": json.dumps({"model": model.model_dump()}),
            "state.json": json.dumps({"step": 0}),
        }.items()
    }
    records |= {
        "model-00001-of-00001.safetensors": folders.copy_file(
            temporary / "model-00001-of-00001.safetensors", temporary / "copy"
        )
    }
    (temporary / "copy").unlink()
    folders.commit(temporary, folder, records)
    return folder


def test_a_checkpoints_manifest_names_files_of_its_folder(tmp_path) -> None:
    """`reshard` copies what it names: reading and writing would both leave their folder."""
    (tmp_path / "secret").write_text("mine")
    made = checkpoint(tmp_path / "step_0000001")
    path = made / folders.FILES
    told = json.loads(path.read_text())
    told["files"]["../secret"] = {"bytes": 4, "sha256": "0"}
    path.write_text(json.dumps(told))
    assert "is no file in" in folders.damage(made)[0]
    with pytest.raises(ValueError, match="is no file in"):
        reshard(StoredCheckpoint(made), tmp_path / "new", 1, 1)


@pytest.mark.parametrize(
    "stray", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
)
def test_files_that_a_checkpoints_manifest_does_not_name_are_not_read(tmp_path, stray) -> None:
    """The parts of another split, left there by a copy, held the same names: the last one won."""
    made = checkpoint(tmp_path / "step_0000001", a=torch.ones(3))
    save_file({"a": torch.zeros(3), "b": torch.ones(1)}, made / stray)
    save_file({"a": torch.zeros(3)}, made / "exp_avg-00001-of-00001.safetensors")
    found = StoredCheckpoint(made)
    assert {kind: [*tensors] for kind, tensors in found.tensors.items()} == {"model": ["a"]}
    assert found.read("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["index", "one file"])
@pytest.mark.parametrize(
    "stray", ["model-00009-of-00009.safetensors", "zz_consolidated.safetensors", "a.safetensors"]
)
def test_files_that_an_index_does_not_name_are_not_read(tmp_path, kind, stray) -> None:
    own = "model-00001-of-00001.safetensors" if kind == "index" else "model.safetensors"
    save_file({"a": torch.ones(1, 1), "only": torch.ones(1, 1)}, tmp_path / own)
    if kind == "index":
        index = json.dumps({"weight_map": {"a": own, "only": own}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    save_file({"a": torch.zeros(1, 1), "more": torch.ones(1)}, tmp_path / stray)
    weights = Weights(tmp_path)
    assert weights.entries("a", np.array([0]), np.array([0])).item() == 1
    with pytest.raises(ValueError, match="no weight named more"):
        weights.shape("more")


def hub_copy(cache: Path) -> Path:
    """A repository as the hub's cache keeps it; returns its snapshot."""
    snapshot = cache / "models--a--b" / "snapshots" / "0f3c"
    blobs = cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (blobs / f"of_{name}").write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/of_{name}")
    return snapshot


@pytest.mark.parametrize("how", ["file", "folder", "chain", "another repository"])
def test_links_of_the_hubs_cache_stay_in_their_repository(tmp_path, how) -> None:
    snapshot = hub_copy(tmp_path / "hub")
    refuse_escapes(snapshot)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("mine")
    (tmp_path / "hub" / "models--a--b2").mkdir()
    target = {
        "file": tmp_path / "secret" / "key",
        "folder": tmp_path / "secret",
        "chain": snapshot.parents[1] / "blobs" / "on",
        "another repository": tmp_path / "hub" / "models--a--b2",
    }[how]
    if how == "chain":
        target.symlink_to(tmp_path / "secret" / "key")
    (snapshot / "tokenizer.json").symlink_to(target)
    with pytest.raises(ValueError, match=r"tokenizer\.json: is a link to .*outside"):
        refuse_escapes(snapshot)


def test_a_hub_model_with_a_stray_link_is_not_opened(tmp_path, monkeypatch) -> None:
    """By the verbs that let transformers load it."""
    from l2e.analysis.networks import open_network
    from launch.evaluation.models import huggingface_config

    snapshot = hub_copy(tmp_path)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text(snapshot.name)
    (tmp_path / "secret").write_text("mine")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for opened in (open_network, huggingface_config):
        with pytest.raises(ValueError, match="outside of its repository"):
            opened("a/b")


# --- nothing is written or read through a link, or another user's ----------------------------


@pytest.mark.parametrize("name", ["lock", TOKENS, LENGTHS, SUBSETS, REJECTS])
def test_a_preparation_writes_through_no_link(tmp_path, name) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "out.partial"
    precious.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(precious)
    with pytest.raises(ValueError, match=r"out\.partial: can't be written"):
        PartialCorpus(folder, {})
    assert precious.read_text() == "mine"


def test_a_preparation_in_a_linked_folder(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        PartialCorpus(tmp_path / "out.partial", {})
    assert not list((tmp_path / "elsewhere").iterdir())


def write_json(path: Path) -> None:
    from data.files import write_json

    write_json(path, {})


def write_features(path: Path) -> None:
    from data.features import write

    write(path, {"a": [{"text": "b"}]})


def train_tokenizer(path: Path) -> None:
    from data.tokenizer import train_sentencepiece

    train_sentencepiece(["The quick brown fox jumps over a lazy dog."] * 9, path, 290)


def point_latest(path: Path) -> None:
    folders.point_latest(path.with_name("step_0000001"))


WRITERS = {
    "out.json.partial": write_json,
    "out.jsonl.partial": write_features,
    "out.model.partial": train_tokenizer,
    "latest.partial": point_latest,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_beside_a_result_follows_no_link(tmp_path, name) -> None:
    """The names are known before; a link under one of them would lead the writing elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / name).symlink_to(precious)
    WRITERS[name](tmp_path / name.rsplit(".", 1)[0])
    assert precious.read_text() == "mine"
    assert not (tmp_path / name).exists()
    assert not (tmp_path / name.rsplit(".", 1)[0]).is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_take_its_place_leaves_nothing_beside_it(tmp_path, name) -> None:
    """A folder under a result's name, for example."""
    place = tmp_path / name.rsplit(".", 1)[0]
    place.mkdir()
    with pytest.raises((OSError, ValueError)):
        WRITERS[name](place)
    assert list(tmp_path.iterdir()) == [place]


def test_token_files_of_the_hub_are_joined_beside_a_link(tmp_path) -> None:
    """The repository had one file, which was linked; its next revision comes in two."""
    source, target = tmp_path / "snapshot", tmp_path / "local" / "pile"
    source.mkdir()
    target.parent.mkdir()
    for name in ("0.bin", "1.bin", "i.idx"):
        (source / name).write_bytes(name.encode())
    for ending in ("bin", "idx"):
        Path(f"{target}.{ending}").symlink_to(tmp_path / f"precious.{ending}")
    (tmp_path / "precious.bin").write_bytes(b"mine")
    join_parts(source, target)
    assert (tmp_path / "precious.bin").read_bytes() == b"mine"
    assert Path(f"{target}.bin").read_bytes() == b"0.bin1.bin"
    assert Path(f"{target}.idx").read_bytes() == b"i.idx"


@pytest.mark.parametrize("kind", ["link", pytest.param("another user's", marks=as_root)])
def test_a_cache_is_taken_from_nobody_else(tmp_path, kind) -> None:
    made = build_once(tmp_path / "theirs", {}, lambda: {"first": np.arange(5)})
    (entry,) = (tmp_path / "theirs").iterdir()
    cache = tmp_path / "mine"
    cache.mkdir()
    if kind == "link":
        (cache / entry.name).symlink_to(entry)
    else:
        shutil.copytree(entry, cache / entry.name)
        os.chown(cache / entry.name, STRANGER, STRANGER)
    with pytest.raises(ValueError, match=r"data\.cache_dir .*(is a link|another user)"):
        build_once(cache, {}, lambda: made)


@as_root
def test_what_the_owner_of_the_folder_left_is_taken(tmp_path) -> None:
    """A disk of the network may say another owner than the one who writes, of all there is."""
    (tmp_path / "entry").mkdir()
    os.chown(tmp_path / "entry", STRANGER, STRANGER)
    with pytest.raises(ValueError, match="another user"):
        refuse_foreign("cache", tmp_path / "entry")
    os.chown(tmp_path, STRANGER, STRANGER)
    refuse_foreign("cache", tmp_path / "entry")


@as_root
@pytest.mark.parametrize("name", ["cache", "cache/deeper", "link"])
def test_a_cache_in_a_folder_open_to_all_is_made_by_this_user(tmp_path, name) -> None:
    """Whoever makes it can replace it: a stranger may be faster than the run that checked."""
    tmp_path.chmod(0o1777)
    build_once(tmp_path / "fresh" / "deeper", {}, lambda: {"first": np.arange(5)})
    (tmp_path / "cache" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    own_folder("cache", tmp_path / name)
    os.chown(tmp_path / name.split("/")[0], STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(ValueError, match="another user"):
        build_once(tmp_path / name, {}, lambda: {"first": np.arange(5)})
    tmp_path.chmod(0o755)  # nobody else can have put it here but who owns the folder
    own_folder("cache", tmp_path / name)


@pytest.mark.parametrize(
    "kind",
    ["ours", "link", "file", "open to all", pytest.param("another user's", marks=as_root)],
)
def test_compiled_code_lies_where_nobody_else_can_put_any(tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    guessed = tmp_path / f"l2e_inductor_{os.geteuid()}"
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        guessed.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        guessed.touch()
    elif kind == "open to all":
        guessed.mkdir()
        guessed.chmod(0o777)
    elif kind == "another user's":
        guessed.mkdir(mode=0o700)
        os.chown(guessed, STRANGER, STRANGER)
    use_own_cache()
    used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert (used == guessed) == (kind == "ours")
    assert stat.S_IMODE(used.lstat().st_mode) == 0o700
    assert used.stat().st_uid == os.geteuid()


# --- the user's umask -----------------------------------------------------------------------


def write_under(umask: int, folder: Path, tokenizer: Path) -> None:
    """What the project makes, in a process of this umask."""
    os.umask(umask)
    folder.mkdir()
    build_once(folder / "cache", {}, lambda: {"first": np.arange(5)})
    fresh_folder(folder, "activations-")
    write_json(folder / "manifest.json")
    write_features(folder / "features.jsonl.gz")
    PartialCorpus(folder / "out.partial", {})
    shapes = parameter_shapes(TINY)
    write_hugging_face(folder / "hf", TINY, lambda name: torch.ones(shapes[name]))
    write_tokenizer(tokenizer, folder / "hf", [])
    write_tensor_file(folder / "l2e.safetensors", {"a": torch.ones(3)})
    folders.point_latest(folder / "step_0000001")
    (folder / "parts").mkdir()
    for name in ("0.bin", "1.bin", "i.idx"):
        (folder / "parts" / name).touch()
    join_parts(folder / "parts", folder / "pile")


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o027])
def test_files_have_the_users_umask(tmp_path, tokenizer, umask) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=write_under, args=(umask, tmp_path / "all", tokenizer.path)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    made = [path for path in (tmp_path / "all").rglob("*") if not path.is_symlink()]
    assert len(made) > 20
    for path in made:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# --- sizes and counts -----------------------------------------------------------------------

HUGE = 2**50


@pytest.mark.parametrize(("documents", "bounds"), [(HUGE, 1), (0, HUGE), (2**63, 2**63)])
def test_counts_of_an_index_are_held_against_its_size(tmp_path, documents, bounds) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(8))
    (tmp_path / "x.idx").write_bytes(HEADER.pack(MAGIC, 1, 4, documents, bounds) + bytes(40))
    with pytest.raises(ValueError, match="truncated"):
        TokenFile(tmp_path / "x")


@pytest.mark.parametrize("shape", [(HUGE,), (6,), (2**20, 2**30)])
def test_a_maps_size_is_held_against_its_file(tmp_path, shape) -> None:
    build_once(tmp_path, {}, lambda: {"first": np.arange(5)})
    (path,) = tmp_path.rglob("first.npy")
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(40))
    with pytest.raises(ValueError, match="delete the folder"):
        build_once(tmp_path, {}, pytest.fail)


def test_subsets_are_as_many_as_documents(tmp_path) -> None:
    told = {key: kind() for key, kind in manifest.REQUIRED.items()} | {"documents": 10}
    manifest.path(tmp_path / "x").write_text(json.dumps(told))
    np.zeros(7, np.int32).tofile(tmp_path / "x.subsets")
    with pytest.raises(ValueError, match="counts 7 documents, its manifest 10"):
        Subsets(tmp_path / "x")


@pytest.mark.parametrize("change", [{"hidden_size": 2**20}, {"num_layers": 10_000}])
def test_a_checkpoint_gets_no_memory_that_its_tensors_do_not_need(tmp_path, change) -> None:
    """Its configuration asks for terabytes; the tensors beside it are of a few bytes."""
    model = TINY.model_copy(update=change)
    made = checkpoint(tmp_path / "step_0000001", model, a=torch.ones(3))
    with pytest.raises(ValueError, match=r"should be .* by its config\.json"):
        StoredCheckpoint(made).build_model()


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": HUGE}, {"hidden_size": HUGE}, {"vocab_size": HUGE}],
)
def test_a_configurations_counts_are_bounded(tmp_path, change) -> None:
    shape = {
        "model_type": "gpt_neox",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape | change))
    with pytest.raises(ValueError, match="less than or equal"):
        read_config(tmp_path)


# --- secrets --------------------------------------------------------------------------------


def test_only_listed_variables_are_written_down(monkeypatch) -> None:
    """A key may have any name, also one that begins as Slurm's or Python's own do."""
    for name in ("SLURM_JWT", "HF_TOKEN", "PYTHONPATH", "NCCL_COMM_ID", "A_NEW_NAME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert environment()["SLURM_JOB_ID"] == "17"
    assert "secret" not in environment().values()
