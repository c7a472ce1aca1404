"""Which files beside the weights belong to a result: no links out of the model, and code of strangers is announced, or
left out.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import models
from support.conversions import files_of, run_conversion, run_merge

from loftq_cli.errors import InputError
from loftq_cli.output.side_files import find_side_files

Loftq = Callable[..., "Done"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "model", layers=1)


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to add files to; results are written beside it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(source, tmp_path / "model")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def loftq(run: Callable[..., tuple[int, str, str]]) -> Loftq:
    return lambda *arguments: Done(*run(*arguments))


@pytest.fixture
def quantize(loftq: Loftq) -> Loftq:
    one_layer = ("--method", "qlora", "--rank", "4", "--include", "q_proj")
    return lambda model, output, *options: loftq("quantize", model, output, *one_layer, *options)


def test_a_file_of_more_than_200_mb_is_left(tmp_path: Path) -> None:
    for name, nbytes in (("tokenizer.json", 200_000_000), ("corpus.json", 200_000_001)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, nbytes)

    assert find_side_files(tmp_path) == ([Path("tokenizer.json")], [Path("corpus.json")])


# Links.


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("config.json", "../id_rsa"),
        ("vocab.txt", "../id_rsa"),
        ("vocab.txt", "{}/id_rsa"),
        ("1_Pooling/vocab.txt", "../../id_rsa"),
    ],
    ids=["config", "relative", "absolute", "in a folder"],
)
def test_a_link_out_of_the_model_is_refused_and_the_remedy_works(
    link: str, target: str, model: Path, tmp_path: Path, quantize: Loftq
) -> None:
    secret = (model / "config.json").read_text() if link == "config.json" else "secret"
    (tmp_path / "id_rsa").write_text(secret)
    (model / link).parent.mkdir(exist_ok=True)
    (model / link).unlink(missing_ok=True)
    (model / link).symlink_to(target.format(tmp_path))
    refused = quantize(model, "out")
    assert refused.returncode == 2
    assert f"{model / link}: is a link out of the model's folder, to {tmp_path / 'id_rsa'} (" in refused.stderr
    assert not list(tmp_path.glob("*out*"))
    remedy = refused.stderr.partition("of the link: ")[2].rpartition(")")[0]
    assert shlex.split(remedy)[0] == "cp"
    subprocess.run(remedy, shell=True, check=True)
    assert quantize(model, "out").returncode == 0
    assert link == "config.json" or (tmp_path / "out" / link).read_text() == secret  # the user has said so


def test_a_link_out_of_a_base_is_not_merged_into_a_result_either(model: Path, tmp_path: Path) -> None:
    run_conversion(model, tmp_path / "base", method="qlora", rank=4)
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "base" / "vocab.txt").symlink_to("../id_rsa")
    with pytest.raises(InputError, match=r"base/vocab\.txt: is a link out of the model's folder"):
        run_merge(tmp_path / "base", tmp_path / "base" / "qlora_init", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_link_to_a_folder_is_not_followed(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("secret")
    (model / "extra").symlink_to(tmp_path / "home")
    assert quantize(model, "out").returncode == 0
    assert not any("id_rsa" in name for name in files_of(tmp_path / "out"))


def test_a_link_inside_the_model_is_copied_as_a_file(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    (model / "1_Pooling").mkdir()
    (model / "vocab.txt").write_text("a b")
    (model / "1_Pooling" / "vocab.txt").symlink_to("../vocab.txt")
    assert quantize(model, "out").returncode == 0
    assert (tmp_path / "out" / "1_Pooling" / "vocab.txt").read_text() == "a b"
    assert not (tmp_path / "out" / "1_Pooling" / "vocab.txt").is_symlink()


def as_in_the_hub_cache(model: Path, cache: Path, name: str = "models--ada--llama") -> Path:
    """The snapshot of a repository as huggingface_hub lays it out: files are links to blobs."""
    repository = cache / name
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_cache_gives_the_files_of_its_blobs(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    (model / "vocab.txt").write_text("a b")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    snapshot = as_in_the_hub_cache(model, tmp_path / "cache")
    assert quantize(snapshot, "out").returncode == 0
    (tmp_path / "a link").symlink_to(snapshot)
    assert quantize(tmp_path / "a link", "out2").returncode == 0
    for output in ("out", "out2"):
        assert (tmp_path / output / "vocab.txt").read_text() == "a b"
        assert (tmp_path / output / "1_Pooling" / "config.json").read_text() == "{}"


def test_a_link_of_a_snapshot_to_a_blob_of_another_repository_is_refused(
    model: Path, tmp_path: Path, quantize: Loftq
) -> None:
    (model / "vocab.txt").write_text("private")
    as_in_the_hub_cache(model, tmp_path / "cache", "models--ada--private")
    (model / "vocab.txt").unlink()
    snapshot = as_in_the_hub_cache(model, tmp_path / "cache")
    private = tmp_path / "cache" / "models--ada--private"
    blob = next(blob for blob in (private / "blobs").iterdir() if blob.read_bytes() == b"private")
    (snapshot / "vocab.txt").symlink_to(blob)
    assert "vocab.txt: is a link out of the model's folder" in quantize(snapshot, "out").stderr


def test_a_folder_called_snapshots_alone_opens_nothing_but_blobs(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    home = tmp_path / "snapshots" / "model"
    home.parent.mkdir()
    shutil.move(model, home)
    (tmp_path / "id_rsa").write_text("secret")
    (home / "vocab.txt").symlink_to("../../id_rsa")
    assert "is a link out of the model's folder" in quantize(home, "out").stderr


# Code.


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.fixture
def with_code(model: Path) -> Path:
    edit(model / "config.json", auto_map={"AutoModel": "modeling_odd.Odd"}, _name_or_path="/home/ada/model")
    edit(model / "tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["tokenization.Odd", None]})
    (model / "modeling_odd.py").write_text("raise SystemExit('never run')")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("raise SystemExit('never run')")
    return model


FOUND = ["modeling_odd.py", "tokenizer_config.json", "custom_generate/generate.py"]
CODE = ["config.json", "custom_generate/generate.py", "modeling_odd.py", "tokenizer_config.json"]


def test_code_of_a_stranger_is_named_in_the_summary_the_card_and_the_report(
    with_code: Path, tmp_path: Path, quantize: Loftq, loftq: Loftq
) -> None:
    done = quantize(with_code, "out", "-q")
    line = next(line for line in done.stdout.splitlines() if line.startswith("code "))
    assert "which loaders run with trust_remote_code (--no-remote-code leaves the code out)" in line
    card = (tmp_path / "out" / "README.md").read_text()
    notes = json.loads((tmp_path / "out" / "loftq_report.json").read_text())["notes"]
    for text in (line, card, "\n".join(notes)):
        assert [name for name in CODE if name not in text] == []
    assert "trust_remote_code=True" in card
    assert json.loads(quantize(with_code, "out2", "--json").stdout)["code_files"] == CODE[:1] + FOUND

    merged = loftq("merge", "out", "out/qlora_init", "merged", "-q")
    assert next(line for line in merged.stdout.splitlines() if line.startswith("code ")).count(".py") == 2
    assert "`modeling_odd.py`" in (tmp_path / "merged" / "README.md").read_text()


def test_a_model_without_code_has_no_word_of_code(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    edit(model / "tokenizer_config.json", tokenizer_class="Plain", auto_mapping="no code")
    done = quantize(model, "out")
    assert "trust_remote_code" not in done.stdout + done.stderr + (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()


def has_code(output: Path) -> list[str]:
    """Files with Python, or with a key that names Python: found by their text."""
    return sorted(n for n, data in files_of(output).items() if n.endswith(".py") or b'"auto_map"' in data)


def test_no_remote_code_leaves_all_of_it_out_and_nothing_else(
    with_code: Path, tmp_path: Path, quantize: Loftq, loftq: Loftq
) -> None:
    for output, options in (("with", ()), ("without", ("--no-remote-code",))):
        assert quantize(with_code, output, "-q", *options).returncode == 0
        adapter = f"{output}/qlora_init"
        assert loftq("merge", "with", adapter, f"merged {output}", *options, "--force").returncode == 0
    assert has_code(tmp_path / "with") == has_code(tmp_path / "merged with") == CODE
    assert has_code(tmp_path / "without") == has_code(tmp_path / "merged without") == []
    assert json.loads((tmp_path / "without" / "tokenizer_config.json").read_text()) == {"tokenizer_class": "Odd"}
    configs = [json.loads((tmp_path / output / "config.json").read_text()) for output in ("with", "without")]
    del configs[0]["auto_map"]
    assert configs[0] == configs[1]
    weights = [load_file(tmp_path / output / "model.safetensors") for output in ("with", "without")]
    assert weights[0].keys() == weights[1].keys()
    for output in ("without", "merged without"):
        assert "verified: " in loftq("inspect", output, "--verify").stdout
        assert "trust_remote_code" not in (tmp_path / output / "README.md").read_text()


def test_a_result_without_code_is_done_and_a_result_with_code_is_another(with_code: Path, quantize: Loftq) -> None:
    assert quantize(with_code, "out", "--no-remote-code").returncode == 0
    assert "already done" in quantize(with_code, "out", "--no-remote-code").stderr
    assert "exists already" in quantize(with_code, "out").stderr
    edit(with_code / "tokenizer_config.json", tokenizer_class="Even")
    assert "exists already" in quantize(with_code, "out", "--no-remote-code").stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"auto\\u005fmap": {"AutoTokenizer": ["evil.Evil", null]}, "a": NaN}',
        '{"auto_map": 1, "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}',
        '{"processor": {"auto_map": {"AutoProcessor": "evil.Evil"}}}',
        '{"custom_pipelines": {"text": {"impl": "evil.Evil"}}}',
    ],
    ids=["escaped", "twice", "inside", "pipelines"],
)
def test_code_that_hides_in_a_config_is_found(text: str, model: Path, tmp_path: Path, quantize: Loftq) -> None:
    (model / "tokenizer_config.json").write_text(text)
    assert "note: tokenizer_config.json: code of the original" in quantize(model, "out").stderr
    assert quantize(model, "clean", "--no-remote-code").returncode == 0
    kept = (tmp_path / "clean" / "tokenizer_config.json").read_text()
    assert "evil" not in kept
    assert '"auto_map"' not in json.dumps(json.loads(kept))


def test_a_config_that_is_no_json_is_copied_as_it_is(model: Path, tmp_path: Path, quantize: Loftq) -> None:
    (model / "tokenizer_config.json").write_text('{"auto_map": ')
    assert quantize(model, "out", "--no-remote-code").returncode == 0
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"auto_map": '


def test_weights_of_a_lone_file_have_no_side_files(tmp_path: Path, source: Path, quantize: Loftq) -> None:
    lone = tmp_path / "lone" / "weights.safetensors"
    lone.parent.mkdir()
    save_file(load_file(source / "model.safetensors"), lone)
    (lone.parent / "vocab.txt").symlink_to("/etc/hostname")
    assert quantize(lone, str(tmp_path / "out")).returncode == 0
