"""The cache of prompt embeddings: what is read is what was encoded, once, whatever happens."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from filelock import FileLock

from tbcm import embeddings
from tbcm.embeddings import prompt_embeddings
from tbcm.errors import UserError
from tbcm.models import Teacher, load_teacher
from tbcm.text import TextEncoder


@pytest.fixture
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and three prompts to a file."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(embeddings, "CHUNK", 3)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """All batches that are encoded from here on."""
    seen, encode = [], TextEncoder.encode

    def watched(self: TextEncoder, prompts: list[str], **more: bool):
        seen.append(prompts)
        return encode(self, prompts, **more)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    return seen


PROMPTS = [*tiny_pipeline.PROMPTS, "a cat in the fog", "a dog on a mat", "two red owls"]


def test_rows_are_what_the_encoder_gives(teacher: Teacher):
    found = prompt_embeddings(teacher, PROMPTS)
    assert "text" not in vars(teacher)
    rows = [6, 0, 2, 2, 3]
    embeds, mask = teacher.text.encode([PROMPTS[row] for row in rows])
    text = found.text(rows)
    assert torch.equal(text.mask, mask) and text.embeds.dtype == torch.float32
    torch.testing.assert_close(text.embeds, embeds * mask[..., None])
    null, own = teacher.text.null()
    torch.testing.assert_close(found.null().embeds, null * own[..., None])
    assert torch.equal(found.null().mask, own)


def test_padding_has_no_part_in_what_the_network_computes(teacher: Teacher):
    text = prompt_embeddings(teacher, PROMPTS).text([0, 3])
    embeds, mask = teacher.text.encode([PROMPTS[0], PROMPTS[3]])
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        a, b = (
            teacher.transformer(x, e, t, encoder_attention_mask=m).sample
            for e, m in ((text.embeds, text.mask), (embeds, mask))
        )
    torch.testing.assert_close(a, b)


def test_a_second_run_encodes_nothing_and_loads_no_encoder(teacher: Teacher, encoded: list):
    first = prompt_embeddings(teacher, PROMPTS)
    encoded.clear()
    second = prompt_embeddings(teacher, PROMPTS)
    assert encoded == [] and "text" not in vars(teacher)
    assert torch.equal(first.text([4]).embeds, second.text([4]).embeds)


def test_after_a_kill_only_what_is_missing_is_encoded(
    teacher: Teacher, encoded: list, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    write, killed = embeddings.write_whole, 0

    def dying(path: Path, data: bytes) -> None:
        nonlocal killed
        killed += 1
        if killed == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(embeddings, "write_whole", dying)
    with pytest.raises(KeyboardInterrupt):
        prompt_embeddings(teacher, PROMPTS)
    assert len([*cache.rglob("*.safetensors")]) == 2
    encoded.clear()
    prompt_embeddings(teacher, PROMPTS)
    assert encoded == [PROMPTS[3:6], PROMPTS[6:]]


def test_a_long_prompt_is_refused_before_any_is_encoded(teacher: Teacher, encoded: list):
    with pytest.raises(UserError, match=r"seven .* has \d+ tokens"):
        prompt_embeddings(teacher, [*PROMPTS, "seven " * 400])
    assert encoded == []


def test_other_prompts_encoders_and_instructions_have_caches_of_their_own(teacher: Teacher):
    names = {embeddings.fingerprint(teacher, PROMPTS), embeddings.fingerprint(teacher, PROMPTS[1:])}
    teacher.instruct = True
    names.add(embeddings.fingerprint(teacher, PROMPTS))
    weights = next((teacher.path / "text_encoder").glob("*.safetensors"))
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        names.add(embeddings.fingerprint(teacher, PROMPTS))
    finally:
        weights.write_bytes(before)
    moved = weights.rename(weights.with_name("other.safetensors"))
    try:
        names.add(embeddings.fingerprint(teacher, PROMPTS))
    finally:
        moved.rename(weights)
    folder = teacher.path / "tokenizer" / "of" / "its"
    folder.mkdir(parents=True)
    try:
        names.add(embeddings.fingerprint(teacher, PROMPTS))  # empty, so nothing new
        (folder / "own.json").write_text("{}")
        names.add(embeddings.fingerprint(teacher, PROMPTS))
    finally:
        shutil.rmtree(folder.parent)
    teacher.variant = "bf16"
    names.add(embeddings.fingerprint(teacher, PROMPTS))
    assert len(names) == 7


def test_a_cache_that_is_a_file_is_named(
    teacher: Teacher, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    (cache / "file").touch()
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(cache / "file"))
    with pytest.raises(UserError, match="another folder by HF_ASSETS_CACHE"):
        prompt_embeddings(teacher, PROMPTS)


def test_a_cache_that_cannot_be_written_is_named(teacher: Teacher, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for owner, name in ((FileLock, "acquire"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(UserError, match=r"Permission denied.*HF_ASSETS_CACHE"):
                prompt_embeddings(teacher, [*PROMPTS, name])


def test_a_damaged_file_is_named(teacher: Teacher):
    found = prompt_embeddings(teacher, PROMPTS)
    (found.folder / "000001.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"000001.safetensors; delete it"):
        found.text([3])


@pytest.mark.parametrize("dies", [False, True])
def test_what_another_process_is_at_is_waited_for_and_taken_over_if_it_dies(
    dies: bool, teacher: Teacher, encoded: list
):
    """A lock held here stands for the other process: the system frees a dead one's locks."""
    folder = prompt_embeddings(teacher, PROMPTS).folder
    content = (folder / "000001.safetensors").read_bytes()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    encoded.clear()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / "000001.safetensors.lock"):
            other = pool.submit(prompt_embeddings, teacher, PROMPTS)
            wait_for(folder / "000002.safetensors")
            assert not (folder / "000001.safetensors").exists() and not other.done()
            if not dies:
                (folder / "000001.safetensors").write_bytes(content)
        other.result(timeout=60)
    assert encoded.count(PROMPTS[3:6]) == dies
    assert (folder / "000001.safetensors").read_bytes() == content


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)
