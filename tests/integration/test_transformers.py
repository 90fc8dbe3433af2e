"""transformers models on moesaic's attention and paged cache give what eager attention gives."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the demo or test extra")
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from moesaic.integrations import transformers as integration

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def tiny(config, dtype=torch.float32, attention=integration.NAME):
    torch.manual_seed(0)
    integration.register()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(params=["llama", "mistral-window"])
def config(request):
    if request.param == "llama":
        return LlamaConfig(**SIZES)
    return MistralConfig(**SIZES, sliding_window=5)


def cache_for(model, max_tokens=64, **kwargs):
    return integration.PagedCache(model.config, max_tokens=max_tokens, **kwargs)


def rounding(config, ids):
    """(fp64 logits of eager attention, largest error of eager attention in fp32)."""
    with torch.inference_mode():
        exact = tiny(config, torch.float64, "eager")(ids).logits
        error = (tiny(config, attention="eager")(ids).logits - exact).abs().max().item()
    return exact, error


@torch.inference_mode()
def test_prefill_and_decode_equal_eager_to_rounding(config):
    ids = torch.randint(1, 97, (2, 12))
    exact, error = rounding(config, ids)
    model = tiny(config)
    cache = cache_for(model, block_size=4)
    parts = [model(ids[:, :7], past_key_values=cache).logits]
    for i in range(7, 12):
        parts.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    assert (torch.cat(parts, 1) - exact).abs().max().item() <= 2 * error
    cache.pages.check()


@torch.inference_mode()
def test_without_a_cache_equals_eager_to_rounding(config):
    ids = torch.randint(1, 97, (2, 9))
    exact, error = rounding(config, ids)
    out = tiny(config)(ids, use_cache=False).logits
    assert (out - exact).abs().max().item() <= 2 * error


@torch.inference_mode()
def test_left_padding_changes_nothing(config):
    """Batched generation gives each prompt's own continuation; with pages and without."""
    model = tiny(config)
    prompts = [torch.randint(1, 97, (n,)) for n in (3, 8, 6)]
    alone = [
        model.generate(p[None], past_key_values=cache_for(model), max_new_tokens=5, do_sample=False)
        for p in prompts
    ]
    ids = torch.stack([torch.nn.functional.pad(p, (8 - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(p) for p in prompts]).long()
    cache = cache_for(model, max_tokens=3 * 16, block_size=4)
    for past in (cache, None):
        together = model.generate(
            ids, attention_mask=mask, past_key_values=past, max_new_tokens=5, do_sample=False
        )
        for row, want in zip(together, alone, strict=True):
            assert row[-5:].tolist() == want[0, -5:].tolist()
    # padding took no room: prompt and all but the last new token
    assert [cache.pages.length(b) for b in range(3)] == [3 + 4, 8 + 4, 6 + 4]


@torch.inference_mode()
def test_crop_and_reset():
    model = tiny(LlamaConfig(**SIZES))
    ids = torch.randint(1, 97, (1, 10))
    exact, error = rounding(LlamaConfig(**SIZES), ids)
    cache = cache_for(model)
    first = model(ids, past_key_values=cache).logits
    cache.crop(6)
    assert cache.get_seq_length() == 6
    again = model(ids[:, 6:], past_key_values=cache).logits
    assert (again - exact[:, 6:]).abs().max().item() <= 2 * error
    cache.reset()
    assert (cache.get_seq_length(), cache.pages.num_free_blocks) == (0, cache.pages.num_blocks)
    assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_errors():
    model = tiny(LlamaConfig(**SIZES))
    cache = cache_for(model, max_tokens=8)
    ids = torch.randint(1, 97, (1, 4))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="expected a batch of 1 as before, got 2"):
            model(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="DynamicCache for beam search"):
        cache.layers[0].reorder_cache(torch.tensor([0]))
    q = torch.zeros(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match=r"expected a padding mask \[batch, keys\]"):
        integration.attention(model, q, q, q, torch.zeros(1, 1, 2, 2))
    with pytest.raises(NotImplementedError, match="dropout: expected 0"):
        integration.attention(model, q, q, q, None, dropout=0.1)
