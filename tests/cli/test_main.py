"""The command line's own errors, and doctor."""

import json
import os
import subprocess
import sys

import pytest

import tpfuse
from tpfuse.cli import doctor, inputs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tp", 3), "--tp 3 does not divide 2 key/value heads"),
        (("--tp", 2, "--set", "fule=3"), "did you mean 'fuel'?"),
        (("--tp", 2, "--set", "disable_passes=async_pt"), "did you mean 'async_tp'?"),
        (("--tp", 2, "--set", "fuel"), "expected field=value"),
        (("--tp", 2, "--compare", "--no-fuse"), "leave out --no-fuse"),
        (("--tp", 2, "--strict", "--no-fuse"), "leave out --no-fuse"),
        (("--tp", 2, "--set", "timeout=soon"), "expected seconds"),
        (("--tp", 2, "--set", "table=/no/table.json"), "/no/table.json: cannot be read as a table"),
        (("--tp", 2, "--set", f"dump={__file__}"), "cannot be written"),
        (("--tp", 2, "--json", "/"), "/: cannot be written: Is a directory"),
        (("--tp", 2, "--prompt", ""), "--prompt: it has no tokens"),
        (("--tp", 2, "--prompt", "w5 " * 120), "--max-new-tokens 20: more than the model's 128 positions"),
    ],
)
def test_bad_options_end_before_a_rank_starts(llama, cli, monkeypatch, options, told):
    monkeypatch.setattr("tpfuse.cli.run.launch", lambda *_, **__: pytest.fail("a rank was started"))
    status, _, errors = cli("run", llama, *options)
    assert status == 1
    assert told in " ".join(errors.split())


@pytest.mark.parametrize(
    ("package", "arguments", "told"),
    [
        ("transformers", ("run", "."), "pip install 'tpfuse[hf]'"),
        ("accelerate", ("explain", ".", "--tp", 2), "pip install 'tpfuse[hf]'"),
        ("gguf", ("explain", "x.gguf", "--tp", 2), "pip install 'tpfuse[gguf]'"),
        ("matplotlib", ("bench", "collectives", "--plot", "x"), "pip install 'tpfuse[plots]'"),
    ],
)
def test_an_extra_that_is_not_installed(cli, monkeypatch, tmp_path, package, arguments, told):
    installed = inputs.version
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr(inputs, "version", lambda name: None if name == package else installed(name))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("tpfuse.cli.bench.launch", lambda *_, **__: pytest.fail("a rank was started"))
    status, _, errors = cli(*arguments)
    assert status == 1 and package in errors and told in errors


def test_more_ranks_than_gpus(llama, cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, errors = cli("run", llama, "--tp", 2, "--device", "cuda")
    assert status == 1
    assert "--tp 2, but 1 GPUs are visible" in errors


def test_torchrun_with_another_number_of_ranks(llama, cli, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    status, _, errors = cli("run", llama, "--tp", 3)
    assert status == 1
    assert "--tp 3, but 2 ranks were started" in errors


@pytest.mark.parametrize(
    ("variables", "told"),
    [({"RANK": "0"}, "'MASTER_ADDR' is not set"), ({"RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "'x'")],
)
def test_torchrun_by_halves(llama, cli, monkeypatch, variables, told):
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    status, _, errors = cli("run", llama)
    assert status == 1
    assert told in errors and "start the ranks with torchrun" in errors


def test_a_locale_without_all_characters():
    done = subprocess.run(
        [sys.executable, "-m", "tpfuse.cli.__main__", "tune", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True,
    )  # fmt: skip
    assert b"N,N,?" in done.stdout


def test_what_is_written_to_a_full_disk(llama, cli):
    status, _, errors = cli("explain", llama, "--tp", 2, "--json", "/dev/full")
    assert status == 1 and "No space left on device" in errors


def test_the_version(cli):
    status, out, _ = cli("--version")
    assert status == 0 and out == f"tpfuse {tpfuse.__version__}\n" and tpfuse.__version__[0].isdigit()


def test_doctor_as_json(cli):
    status, out, _ = cli("doctor", "--json")
    facts = {fact["name"]: fact for fact in json.loads(out)}
    assert status == 0
    assert facts["torch"]["detail"].startswith("2.")
    assert facts["reference"]["usable"] is True
    assert {"C++", "triton", "flashinfer", "nccl", "gloo", "torch symmetric memory", "GGUF files"} <= facts.keys()


def test_doctor_judges_the_environment(cli, monkeypatch):
    monkeypatch.setenv("TPFUSE_KERNELS", "tritn")
    status, out, _ = cli("doctor", "--json")
    found = [f for f in json.loads(out) if f["area"] == "Settings"]
    assert status == 0 and found[0]["detail"] == "tritn"
    assert found[1]["usable"] is False and "did you mean 'triton'" in found[1]["detail"]


def test_doctor_names_a_missing_compiler(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    status, out, _ = cli("doctor")
    assert status == 0
    assert "none of g++, clang++, c++ found: Inductor cannot compile for CPUs" in " ".join(out.split())


def test_no_compiler(llama, cli, monkeypatch):
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setattr("tpfuse.cli.run.launch", lambda *_, **__: pytest.fail("a rank was started"))
    status, _, errors = cli("run", llama, "--tp", 2, "--device", "cpu")
    assert status == 1 and "none of /no/compiler found: Inductor cannot compile for CPUs (CXX names it)" in errors


def test_doctor_sees_a_compiler_given_by_name(monkeypatch, tmp_path):
    compiler = tmp_path / "my-cxx"
    compiler.write_text("#!/bin/sh\necho 'my compiler 1.2'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    fact = next(f for f in doctor.examine() if f.name == "C++")
    assert (fact.usable, fact.detail) == (True, "my compiler 1.2")


@pytest.mark.parametrize(("kernels", "usable"), [("new", True), ("old", False)])
def test_doctor_judges_the_table_of_this_machine(monkeypatch, tmp_path, kernels, usable):
    from tpfuse.config import table_path
    from tpfuse.lowering.table import Entry, Table
    from tpfuse.target import Target

    monkeypatch.setenv("TPFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "machine", lambda device: "2 x GPU")
    monkeypatch.setattr(doctor, "detect", lambda device, group: Target("cuda", versions={"kernels": "new"}))
    (missing,) = doctor._table()
    assert missing.usable is False and "run tpfuse tune" in missing.detail
    path = table_path("2 x GPU")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (damaged,) = doctor._table()
    assert damaged.usable is False and "no table of measurements" in damaged.detail
    Table("2 x GPU", {"kernels": kernels}, (Entry("op", "bfloat16", 2, ((None, "nccl"),)),)).save(path)
    (fact,) = doctor._table()
    assert fact.usable is usable and "1 entries" in fact.detail and ("kernels was old" in fact.detail) is not usable
