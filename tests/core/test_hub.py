"""Hub ids: real loading code, tried offline against a cache laid out as the hub client lays it out."""

import pytest
from huggingface_hub import constants

from mens_core.errors import ModelError
from mens_core.hf.hub import LAB_BASE, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one repository, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_repository_is_found_by_name_and_by_commit(cache):
    assert find_model("owner/name", None) == ("owner/name", cache)
    assert find_model("owner/name", COMMIT) == ("owner/name", cache)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("model", "revision"), [("owner/other", None), ("owner/name", "v2")])
def test_what_is_not_cached_is_an_error_that_names_it(model, revision):
    with pytest.raises(ModelError, match=model) as caught:
        find_model(model, revision)
    assert "network" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("model", ["./owner/name", "/owner/name", "name", "a/b/c", "owner/na me"])
def test_what_is_neither_folder_nor_hub_id_is_never_looked_up(model):
    with pytest.raises(ModelError, match="no such model folder"):
        find_model(model, None)


def test_no_model_is_the_lab_base():
    name, folder = find_model(None, None)
    assert name == LAB_BASE
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000


def test_a_folder_is_found_where_it_is(tmp_path):
    assert find_model(str(tmp_path), None) == (str(tmp_path), tmp_path.resolve())


@pytest.mark.parametrize("model", [None, "here"])
def test_a_revision_of_what_has_none_is_an_error(model, tmp_path):
    with pytest.raises(ModelError, match="only a hub id has revisions"):
        find_model(str(tmp_path) if model else None, "v2")
