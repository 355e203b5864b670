"""The package as its users meet it: names, docstrings, imports, what is said without a kernel."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

import tbcm_kernels
from tbcm_kernels import _dispatch
from tbcm_kernels.testing import Proof

ROOT = Path(__file__).parents[1]
WITHOUT_TANGENT = {"merge_attention", "tangent_loss", "trajectory_step"}
WITHOUT_EXTENSION = "import sys; sys.modules['tbcm_kernels._C'] = None\n"


def python(program: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", tbcm_kernels.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(tbcm_kernels, name)
    assert public.__doc__ and public.__doc__.split("\n")[0].endswith((".", ":"))
    if inspect.isfunction(public) and inspect.signature(public).parameters:
        assert "Args:" in public.__doc__ and "Raises:" in public.__doc__
        assert all(
            p.annotation is not p.empty for p in inspect.signature(public).parameters.values()
        )
        assert inspect.signature(public).return_annotation is not inspect.Signature.empty


def test_every_op_has_both_forms_and_a_readme() -> None:
    for op in _dispatch.OPS:
        names = set(importlib.import_module(f"tbcm_kernels.{op}").__all__)
        assert names <= set(tbcm_kernels.__all__)
        values = {n for n in names if not n.endswith("_jvp")} - WITHOUT_TANGENT
        assert {f"{n}_jvp" for n in values} <= names
        assert (ROOT / "tbcm_kernels" / op / "README.md").read_text().startswith(f"# {op}")


def test_import_is_light() -> None:
    """No CUDA context, no model library, no kernel: the first call that needs one loads it."""
    loaded = python(
        "import sys, torch, tbcm_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sys.modules)"
    ).split()
    heavy = {"diffusers", "transformers", "triton", "torch._dynamo", "tbcm", "tbcm_kernels.sana"}
    assert not heavy & set(loaded)
    kernels = [m for m in loaded if re.fullmatch(r"tbcm_kernels.*\._?(C|triton|cpu)", m)]
    assert kernels == []


def test_without_triton_the_rest_works() -> None:
    """fp64 asks every implementation why it cannot run, and a missing one must have an answer."""
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tbcm_kernels as tk, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "tk.rms_norm(torch.ones(2, 4).double())\n"
        "try: tk.rms_norm(torch.ones(2, 4), impl='triton')\n"
        "except ValueError as e: assert 'triton' in str(e)\n"
        "else: raise SystemExit('no error')"
    )


def test_trainer_stays_out_of_the_library() -> None:
    for path in (ROOT / "tbcm_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tbcm\b", path.read_text(), re.MULTILINE), path


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout"
)
def test_no_machine_paths() -> None:
    """A path of the machine that a file was written on means nothing elsewhere."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    pattern = re.compile(rb"(?<![\w.])/(work|root|home|opt|mnt|workspace)/\w")
    assert [f for f in files if f.is_file() and pattern.search(f.read_bytes())] == []


def test_module_prints_a_row_for_each_op() -> None:
    printed = python("import runpy; runpy.run_module('tbcm_kernels', run_name='__main__')")
    assert printed.startswith(f"tbcm_kernels {tbcm_kernels.__version__}")
    assert {line.split()[0] for line in printed.splitlines()} >= set(_dispatch.OPS)
    assert "in float32" in printed.splitlines()[1]


def test_the_trainer_without_its_packages_is_told() -> None:
    """`pip install tbcm-kernels` brings the command, and not what it runs on."""
    for name, line in (("jsonargparse", ""), ("rich", "info")):
        lack = f"import sys; sys.modules['{name}'] = None; from tbcm.__main__ import main"
        program = [sys.executable, "-c", f"{lack}; sys.exit(main())", *line.split()]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{name} is not installed; pip install 'tbcm-kernels[train]'" in done.stderr


def test_a_record_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("tbcm_kernels.testing.__main__")
    monkeypatch.setattr(main, "proofs", lambda *_: iter(()))
    with warnings.catch_warnings():
        main.main(["--record", str(tmp_path / "new" / "proofs.jsonl")])
    file = tmp_path / "new" / "proofs.jsonl"
    assert file.exists()
    with pytest.raises(SystemExit):
        main.main(["--record", str(file / "inside")])
    assert "inside cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "code"), [([[]], 0), ([[], ["y: off"]], 1), ([], 1)])
def test_proofs_are_added_to_the_record_and_a_fault_fails(
    found: list[list[str]], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module("tbcm_kernels.testing.__main__")
    made = [Proof("adaln", "cpu", "cpu", torch.float32, 3, faults) for faults in found]
    monkeypatch.setattr(main, "proofs", lambda *_: iter(made))
    file = tmp_path / "proofs.jsonl"
    file.write_text("{}\n")
    assert main.main(["--impl", "cpu", "--record", str(file)]) == code
    _, *rows = map(json.loads, file.read_text().splitlines())
    assert [row["faults"] for row in rows] == found


@pytest.mark.parametrize("name", ["figures", "proofs"])
def test_help_writes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("wrote"))
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "bench" / f"{name}.py"), run_name="__main__")
    assert f"python -m bench.{name}" in capsys.readouterr().out


def test_absent_extension_is_said_and_falls_back() -> None:
    printed = python(
        WITHOUT_EXTENSION + "import runpy; runpy.run_module('tbcm_kernels', run_name='__main__')"
    )
    assert "the compiled extension is not there" in printed.splitlines()[-1]
    printed = python(
        WITHOUT_EXTENSION + "import warnings, torch, tbcm_kernels as tk\n"
        "x = torch.randn(2, 3, 8)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    values = tk.adaln_jvp(x, tx=x), tk.adaln_jvp(x, tx=x)\n"
        "expected = tk.adaln_jvp(x, tx=x, impl='reference')\n"
        "assert all(torch.equal(a, b) for v in values for a, b in zip(v, expected))\n"
        "assert len(said) == 1 and 'plain PyTorch reference' in str(said[0].message)\n"
        "try:\n"
        "    tk.adaln(x, impl='cpu')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert "`TBCM_BUILD_CPU=1 pip install" in printed


@pytest.mark.parametrize("nvcc", ["exit 1", "echo garbage"])
def test_broken_cuda_leaves_the_cpu_kernels(
    nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With an nvcc that fails, and with objects that do not link."""
    built: list[Extension] = []

    def build(command: build_ext) -> None:
        (extension,) = command.extensions
        if "cudart_static" in extension.libraries:
            raise OSError("the linker failed")
        built.append(extension)

    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TBCM_BUILD_CUDA", "auto")
    monkeypatch.setattr(build_ext, "build_extensions", build)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    module = runpy.run_path("setup.py")
    plain = Extension("tbcm_kernels._C", ["csrc/registration.cpp"])
    command = module["OptionalBuild"](Distribution({"ext_modules": [plain]}))
    command.extensions, command.build_temp = [plain], str(tmp_path)
    command.build_extensions()
    assert built == [plain] and plain.sources == ["csrc/registration.cpp"]
    assert "building without CUDA kernels: " in capfd.readouterr().err


@pytest.mark.parametrize("why", ["the compiler failed", "csrc is not there", "TBCM_BUILD_CPU is 0"])
def test_a_failed_build_leaves_no_older_extension(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def build(command: build_ext) -> None:
        raise OSError(why)

    monkeypatch.setattr(build_ext, "build_extensions", build)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("TBCM_BUILD_CUDA", "0")
    monkeypatch.setenv("TBCM_BUILD_CPU", "0" if why.endswith("0") else "auto")
    monkeypatch.chdir(tmp_path)
    if why != "csrc is not there":
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "registration.cpp").touch()
    module = runpy.run_path(str(ROOT / "setup.py"))
    plain = Extension("tbcm_kernels._C", [], py_limited_api=True)
    command = module["OptionalBuild"](Distribution({"ext_modules": [plain]}))
    command.ensure_finalized()
    older = Path(command.get_ext_fullpath(plain.name))
    older.parent.mkdir(parents=True)
    older.touch()
    command.extensions = [plain]
    command.build_extensions()
    assert f"without the compiled extension: {why}" in capfd.readouterr().err
    assert not older.exists()
    command.distribution.command_obj["build_ext"] = command
    wheel = module["HonestWheel"](command.distribution)
    assert wheel.get_tag() == ("py3", "none", "any")


@pytest.mark.parametrize("name", ["TBCM_BUILD_CPU", "TBCM_BUILD_CUDA"])
def test_a_build_switch_that_says_something_else_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(setuptools, "setup", lambda **_: pytest.fail("it went on"))
    monkeypatch.setenv(name, "yes")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"{name} must be auto, 0 or 1, not 'yes'"):
        runpy.run_path("setup.py")


def test_an_extension_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("tbcm_kernels._C") is None:
        pytest.skip("there is no extension")
    missing = _dispatch.missing.__wrapped__
    assert missing("cpu") is None
    monkeypatch.setattr(_dispatch, "_sources", lambda: "another")
    assert "was not built from this checkout's csrc" in missing("cpu")
