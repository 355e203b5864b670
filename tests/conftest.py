"""Without a GPU, Triton kernels run in Triton's interpreter, chosen before its import."""

import importlib.util
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

# `with torch.device(...)` remembers the allocators that it first meets, which tests replace.
_device_constructors()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Read when huggingface_hub is imported: prompt embeddings are cached here, not in the user's home.
ASSETS = tempfile.TemporaryDirectory(prefix="tbcm-assets-")
os.environ["HF_ASSETS_CACHE"] = ASSETS.name


@pytest.fixture(scope="session", autouse=True)
def interpreted_bfloat16() -> None:
    """Triton's interpreter cuts off what it casts to bf16 and multiplies the bits; here it rounds,
    and multiplies in fp32.
    """
    if "TRITON_INTERPRET" not in os.environ or not importlib.util.find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.tensor(x, device="cpu").bfloat16().view(torch.uint16).numpy()

    def widened(self, *factors, **options):
        a, b, *rest = factors
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest, **options)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = widened


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> None:
    """Triton's interpreter patches its language for a kernel, and again for each device function
    that the kernel calls, which was half of its time.
    """
    if "TRITON_INTERPRET" not in os.environ or not importlib.util.find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        modules = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if modules <= patched:
            return None  # a device function asks for nothing back
        scope = patch(function)
        patched.update(modules)
        restore = scope.restore

        def restore_all():
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = once


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """TBCM_TEST_DEVICE=cuda runs the tests that name no device on the GPU, without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    with torch.device(os.environ.get("TBCM_TEST_DEVICE", "cpu")):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel tests see NaN in memory that nobody has written."""
    if "kernels" not in request.keywords:
        return
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, _poisoned(allocate))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_threads() -> Iterator[Callable[[Callable[[], object]], list[object]]]:
    """Runs a function on one thread and twice on two, and leaves their number as it was."""
    before = torch.get_num_threads()

    def results(run: Callable[[], object]) -> list[object]:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(run())
        return found

    yield results
    torch.set_num_threads(before)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The implementations that each op has called: a test of one must not run another."""
    from tbcm_kernels import _dispatch

    found = defaultdict(set)
    module_of = _dispatch.implementation

    def implementation(op: str, impl: str) -> object:
        found[op].add(impl)
        return module_of(op, impl)

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    return found


@pytest.fixture
def need() -> Callable[[str], None]:
    """Skips the test where an implementation is not installed, as without a compiler."""

    def need(impl: str) -> None:
        from tbcm_kernels import _dispatch

        if impl != "reference" and (reason := _dispatch.missing(impl)):
            pytest.skip(reason)

    return need


@pytest.fixture
def gpu_on_meta(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Meta tensors are dispatched as on a GPU that has proved all; what an implementation lacks
    there may be put into the fixture.
    """
    from tbcm_kernels import _dispatch

    missing = dict.fromkeys(_dispatch._DEVICES)
    monkeypatch.setattr(_dispatch, "_known_choice", _dispatch._choice)
    monkeypatch.setattr(_dispatch, "_proved", lambda *_: True)
    monkeypatch.setattr(_dispatch, "_DEVICES", dict.fromkeys(_dispatch._DEVICES, "meta"))
    monkeypatch.setattr(_dispatch, "missing", missing.get)
    monkeypatch.setattr(_dispatch, "source", lambda op, impl: f"{op} {impl}")
    _dispatch._notice_fallback.cache_clear()
    return missing


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        return x

    return poisoned


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete SANA-Sprint teacher in miniature, on disc."""
    import tiny_pipeline

    return tiny_pipeline.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tiny_run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that distilled it for three steps."""
    import tiny_pipeline

    return tiny_pipeline.distil(tiny_teacher, tmp_path_factory.mktemp("distilled"))
