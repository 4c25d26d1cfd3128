"""`tpfuse bench`: what ends it before a rank starts."""

import pytest


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--world", 2), "--world 2, but 0 GPUs are visible"),
        (("--tokens", "1,x"), "expected numbers from 1 on"),
        (("--scheme", "fp8_tensr"), "did you mean 'fp8_tensor'"),
        (("--table", __file__), "is no table of measurements"),
        (("--table", "/no/table.json"), "cannot be read as a table"),
    ],
)
def test_bad_options_end_before_a_rank_starts(cli, monkeypatch, options, told):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("tpfuse.cli.bench.launch", lambda *_, **__: pytest.fail("a rank was started"))
    status, _, errors = cli("bench", "collectives", *options)
    assert status == 1
    assert told in " ".join(errors.split())


def test_what_others_are_compared_with_is_never_left_out(cli):
    status, _, errors = cli("bench", "e2e", "--without", "nccl+inductor,torch_async_tp")
    assert status == 1 and "nccl+inductor cannot be left out" in " ".join(errors.split())
