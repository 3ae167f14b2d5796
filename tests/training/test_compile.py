import pytest
import torch


@pytest.mark.slow
def test_compiled_run_has_the_same_weights_and_few_graphs(run, arguments, tmp_path):
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    weights = []
    options = ("--eps", "1e-3", "--epochs", "2", "--context_length", "16")
    for extra in ([], ["--compile"]):
        code, _, err = run(*arguments, *options, "--experiments", f"run{len(extra)}", *extra)
        assert code == 0, err
        weights.append(torch.load(tmp_path / f"logs/run{len(extra)}/last.pt", weights_only=True)["model"])
    assert 0 < counted["stats"]["unique_graphs"] <= 6 and "recompile_limit" not in err
    assert weights[0].keys() == weights[1].keys()
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-3, atol=1e-5, msg=name)
